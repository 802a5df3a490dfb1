"""The in-band form: what the handshake says, in parts, inside QEMU's own framing.

::

    src -> dst  "QEVM" version:u32   08 OPEN_RETURN_PATH 0   (08 FEATURES length:u16 part)*
    dst -> src                                               (FEATURES length:u16 part)*

The bodies are those of the first form, byte for byte (docs/protocol, "In-band form"); a
length has 16 bits here, so a long one comes in several parts, and a part may end anywhere.
"""

from __future__ import annotations

import struct
from typing import Final

from qmigd.errors import ProtocolError
from qmigd.stream.format import MAGIC as STREAM_MAGIC
from qmigd.stream.format import VERSION, CommandNumber, SectionType

__all__ = [
    "MAX_PART",
    "MIG_CMD_FEATURES",
    "MIG_RP_MSG_FEATURES",
    "OPENING",
    "Framing",
    "frame",
]

#: The command in the stream, and the message on the return path.  QEMU counts its own from 1,
#: and has come to 11 and 7 by 11.1; these are far from that.  "FE", for features.
MIG_CMD_FEATURES: Final = int(CommandNumber.FEATURES)
MIG_RP_MSG_FEATURES: Final = 0x4645

#: Bytes in a part: its length has 16 bits.
MAX_PART: Final = 0xFFFF

#: How such a connection begins: as a stream of QEMU's does that has a return path.
OPENING: Final = STREAM_MAGIC + struct.pack(
    ">IBHH", VERSION, SectionType.COMMAND, CommandNumber.OPEN_RETURN_PATH, 0
)

_HEAD_COMMAND: Final = struct.pack(">BH", SectionType.COMMAND, MIG_CMD_FEATURES)
_HEAD_ANSWER: Final = struct.pack(">H", MIG_RP_MSG_FEATURES)


def frame(data: bytes, *, by_source: bool) -> bytes:
    """Return what has to be sent for ``data``; nothing for nothing."""
    head = _HEAD_COMMAND if by_source else _HEAD_ANSWER
    parts = (data[at : at + MAX_PART] for at in range(0, len(data), MAX_PART))
    return b"".join(head + struct.pack(">H", len(part)) + part for part in parts)


class Framing:
    """Takes the peer's framing off.

    :ivar left: bytes of the present part that are still to come; 0: framing is next.
    :ivar opened: the peer can be spoken to.
    """

    def __init__(self, *, by_source: bool) -> None:
        """:param by_source: what is read is the source's, else the destination's."""
        self.left = 0
        self.opened = not by_source
        self._by_source = by_source
        self._head = _HEAD_COMMAND if by_source else _HEAD_ANSWER
        self._got = b""

    @property
    def wanted(self) -> int:
        """How many bytes of framing are to come before the next part, for certain."""
        size = len(self._head) + 2 if self.opened else len(OPENING)
        return size - len(self._got)

    def take(self, data: bytes) -> bytes:
        """Take framing from the front of ``data``; returns the rest, which is of a part.

        To be called where :attr:`left` is 0.

        :raises ProtocolError: ``bad-frame``: it is no such framing.
        """
        while data and not self.left:
            size = self.wanted
            self._got, data = self._got + data[:size], data[size:]
            self._check()
            if self.wanted:
                break
            if self.opened:
                self.left = int.from_bytes(self._got[-2:], "big")
                if not self.left:
                    raise ProtocolError("A part of the handshake is empty.", code="bad-frame")
            self.opened = True
            self._got = b""
        return data

    def _check(self) -> None:
        expected = self._head if self.opened else OPENING
        if expected.startswith(self._got[: len(expected)]):
            return
        if not self._by_source:
            what = (
                "MIG_RP_MSG_FEATURES has to come on the return path. If a qmigd listens there, it "
                "is for the handshake's first form: leave out 'in-band:'"
            )
        elif self._got.startswith(STREAM_MAGIC):
            what = (
                "QEMU's stream has to open its return path, and say MIG_CMD_FEATURES, before "
                "anything else. A QEMU alone does not: 'legacy-listen' is for that"
            )
        else:
            what = "MIG_CMD_FEATURES has to come, in a stream that begins as QEMU's does"
        raise ProtocolError(f"{what}; {ascii(self._got)} came.", code="bad-frame")
