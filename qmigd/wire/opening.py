"""What a connecting side may say first: a Reply, a role header, or an ERROR.

The first bytes tell which, and so what kind of connection it is.  An ERROR in
this place comes from a source that cannot do with the Greeting.
"""

from __future__ import annotations

from collections.abc import Collection

from qmigd.errors import ProtocolError
from qmigd.wire.greeting import MAGIC, STREAM_MAGIC, Reply, read_reply_after_magic
from qmigd.wire.messages import HEADER_SIZE, Message, MessageType, read_body
from qmigd.wire.reading import Reading
from qmigd.wire.role import CHANNEL_MAGIC, RoleHeader, read_role_after_magic

__all__ = ["read_opening"]

_ERROR = MessageType.ERROR.to_bytes(2, "big")
_BEGINNINGS = (MAGIC, CHANNEL_MAGIC, STREAM_MAGIC, _ERROR)


def read_opening(versions: Collection[int]) -> Reading[Reply | RoleHeader | Message]:
    """Read the first item that comes in on the destination.

    :param versions: those in this side's Greeting.
    :raises ProtocolError: ``bad-magic``, ``early-payload``, or what the item's own
        reading raises.
    """
    got = b""
    while True:
        # An ERROR's header is the shortest of what may come; after it the magics' rest.
        end = HEADER_SIZE if len(got) < HEADER_SIZE else len(MAGIC)
        got += yield end - len(got)
        if got.startswith(_ERROR):
            if len(got) == HEADER_SIZE:
                return (yield from read_body(got, _admit))
        elif got.startswith(STREAM_MAGIC):
            raise ProtocolError(
                "QEMU's stream came at once. This port wants a handshake first: a Reply, "
                "START, and then the stream.",
                code="early-payload",
            )
        elif not any(beginning.startswith(got) for beginning in _BEGINNINGS):
            raise ProtocolError(
                f"A Reply or a role header should begin with {ascii(MAGIC)} or "
                f"{ascii(CHANNEL_MAGIC)}, but {ascii(got)} came.",
                code="bad-magic",
            )
        elif got == MAGIC:
            return (yield from read_reply_after_magic(versions))
        elif got == CHANNEL_MAGIC:
            return (yield from read_role_after_magic(versions))


def _admit(kind: MessageType, length: int) -> None:
    """Admit an ERROR; the first two bytes have shown that it is one."""
