"""Every limit of the handshake, in one place (docs/protocol, "Limits").

They are part of version 1: a peer may count on being served up to them and on
being refused beyond them.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "HANDSHAKE_DEADLINE",
    "MAX_BEFORE_START",
    "MAX_BODY",
    "MAX_FEATURES",
    "MAX_GUEST",
    "MAX_JSON_DEPTH",
    "MAX_JSON_MARKS",
    "MAX_OPENING",
    "MAX_STRING",
    "MAX_VERSIONS",
]

#: Bytes in a string; its length is one byte, and 0 is not a length.
MAX_STRING: Final = 255

#: Features in a Greeting or a Reply.
MAX_FEATURES: Final = 256

#: Versions in a Greeting.
MAX_VERSIONS: Final = 16

#: Bytes of a whole Greeting or Reply.
MAX_OPENING: Final = 64 * 1024

#: Bytes in the body of a message.
MAX_BODY: Final = 64 * 1024

#: Bytes in the body of GUEST, which describes every device of a guest.
MAX_GUEST: Final = 1024 * 1024

#: Bytes in all the bodies that one side sends before START.
MAX_BEFORE_START: Final = 1024 * 1024

#: Levels of objects and arrays in a JSON body, the body itself being the first.
MAX_JSON_DEPTH: Final = 32

#: Bytes ``,``, ``[`` and ``{`` in a JSON body.  They bound the number of values,
#: and so what a body of little more than brackets can cost once it is parsed.
MAX_JSON_MARKS: Final = 32 * 1024

#: Seconds from the connection to START, or to ATTACHED on a payload channel.
HANDSHAKE_DEADLINE: Final = 10.0
