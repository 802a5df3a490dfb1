"""The return path: what the destination says, both ways.

::

    message            type:u16 length:u16 data
    1 SHUT             error:u32; 0: all is well, and nothing follows
    2 PONG             value:u32, that of a PING
    3 REQ_PAGES_ID     start:u64 length:u32 name
    4 REQ_PAGES        start:u64 length:u32, of the block named last
    5 RECV_BITMAP      name; behind the message  size:u64 bitmap  0x0123456789abcdef
    6 RESUME_ACK       value:u32 = 1
    7 SWITCHOVER_ACK   nothing

A name is a byte with its length, and that many bytes.  Integers are big-endian; the bitmap has a
bit for each page of the block, the lowest bit of the first byte first, and is padded to a
multiple of 8 bytes.  A bit is 1 where the destination has the page.

Source: migration/migration.c and ram.c of QEMU.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qmigd.errors import StreamError
from qmigd.stream.format import DEFAULT_PAGE_SIZE
from qmigd.stream.names import counted, read_counted
from qmigd.stream.pieces import Decoder, Format

__all__ = [
    "Bitmap",
    "Message",
    "MessageType",
    "PageRequest",
    "Pong",
    "ResumeAck",
    "ReturnPath",
    "Shut",
    "SwitchoverAck",
    "Unknown",
    "encode",
    "request_pages",
]

_HEAD: Final = struct.Struct(">HH")
_RANGE: Final = struct.Struct(">QI")

#: QEMU's source takes no message with more data.
_MOST: Final = 512

#: RAMBLOCK_RECV_BITMAP_ENDING, and MIGRATION_RESUME_ACK_VALUE.
_ENDING: Final = 0x0123456789ABCDEF
_RESUME: Final = 1


class MessageType(IntEnum):
    """MIG_RP_MSG_*."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


#: The lengths of those that have one only.
_LENGTHS: Final[Mapping[int, int]] = {
    MessageType.SHUT: 4,
    MessageType.PONG: 4,
    MessageType.REQ_PAGES: _RANGE.size,
    MessageType.RESUME_ACK: 4,
    MessageType.SWITCHOVER_ACK: 0,
}


@dataclass(frozen=True)
class Shut:
    """The last message.

    :ivar error: not 0: the destination failed.
    """

    error: int


@dataclass(frozen=True)
class Pong:
    """The answer to a PING."""

    value: int


@dataclass(frozen=True)
class PageRequest:
    """Pages that a vCPU of the destination waits for.

    :ivar block: empty to encode the short form: the same block as before.  A decoder puts the
        name in.
    :ivar start: in the block, bytes, as is the length.
    """

    block: str
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class Bitmap:
    """What the destination has of a block.

    :ivar pages: True where it has the page.
    """

    block: str
    pages: NDArray[np.bool_]


@dataclass(frozen=True)
class ResumeAck:
    """The destination is ready to go on."""


@dataclass(frozen=True)
class SwitchoverAck:
    """The destination's devices are ready for the switch (capability ``switchover-ack``)."""


@dataclass(frozen=True)
class Unknown:
    """A message of a type that QEMU has not got."""

    type: int
    data: bytes


Message: TypeAlias = Shut | Pong | PageRequest | Bitmap | ResumeAck | SwitchoverAck | Unknown


def encode(message: Message) -> bytes:
    """Return a message, and what goes behind it."""
    match message:
        case Shut(value):
            return _encode(MessageType.SHUT, struct.pack(">I", value))
        case Pong(value):
            return _encode(MessageType.PONG, struct.pack(">I", value))
        case PageRequest("", start, length):
            return _encode(MessageType.REQ_PAGES, _RANGE.pack(start, length))
        case PageRequest(block, start, length):
            data = _RANGE.pack(start, length) + counted(block)
            return _encode(MessageType.REQ_PAGES_ID, data)
        case Bitmap(block, pages):
            bits = np.packbits(pages, bitorder="little").tobytes()
            bits = bits.ljust(-(-len(bits) // 8) * 8, b"\0")
            head = _encode(MessageType.RECV_BITMAP, counted(block))
            return b"".join((head, struct.pack(">Q", len(bits)), bits, struct.pack(">Q", _ENDING)))
        case ResumeAck():
            return _encode(MessageType.RESUME_ACK, struct.pack(">I", _RESUME))
        case SwitchoverAck():
            return _encode(MessageType.SWITCHOVER_ACK, b"")
        case Unknown(number, data):
            return _encode(number, data)


def request_pages(start: int, length: int, block: str, before: str) -> bytes:
    """Return a request, short where it is for the same block as the one before."""
    return encode(PageRequest("" if block == before else block, start, length))


def _encode(number: int, data: bytes) -> bytes:
    if len(data) > _MOST:
        raise ValueError(f"A message has at most {_MOST} bytes of data, not {len(data)}.")
    return _HEAD.pack(number, len(data)) + data


class ReturnPath(Decoder[Message]):
    """Takes what comes on the return path, in pieces of any size."""

    def __init__(self, blocks: Mapping[str, int], page_size: int = DEFAULT_PAGE_SIZE) -> None:
        """Expect a message.

        :param blocks: bytes of each block of RAM; no other can be asked for.
        :param page_size: the target's, in bytes.
        """
        self._blocks = blocks
        self._page_size = page_size
        self._last = ""
        super().__init__("the return path")

    def _format(self) -> Format:
        while True:
            self._between = True
            number, length = _HEAD.unpack((yield _HEAD.size))
            self._between = False
            at = self.position
            if length != _LENGTHS.get(number, length) or length > _MOST:
                expected = _LENGTHS.get(number, f"at most {_MOST}")
                raise StreamError(
                    at + 2, f"{expected} bytes in a message of type {number}", f"{length}"
                )
            data = bytes((yield length)) if length else b""
            message: Message
            match number:
                case MessageType.SHUT:
                    message = Shut(int.from_bytes(data, "big"))
                case MessageType.PONG:
                    message = Pong(int.from_bytes(data, "big"))
                case MessageType.REQ_PAGES_ID | MessageType.REQ_PAGES:
                    message = self._request(number, data)
                case MessageType.RECV_BITMAP:
                    message = yield from self._bitmap(self._block(data))
                case MessageType.RESUME_ACK:
                    if int.from_bytes(data, "big") != _RESUME:
                        raise StreamError(self.position, "RESUME_ACK with 1", f"0x{data.hex()}")
                    message = ResumeAck()
                case MessageType.SWITCHOVER_ACK:
                    message = SwitchoverAck()
                case _:
                    message = Unknown(number, data)
            self._events.append(message)

    def _block(self, data: bytes, at: int = 0) -> str:
        name = read_counted(data[at:], self.position + at)
        if name not in self._blocks:
            raise StreamError(self.position + at + 1, "a block of RAM that there is", repr(name))
        return name

    def _request(self, number: int, data: bytes) -> PageRequest:
        if len(data) < _RANGE.size:
            raise StreamError(self.position, "start and length of pages", f"{len(data)} bytes")
        start, length = _RANGE.unpack_from(data)
        if number == MessageType.REQ_PAGES_ID:
            self._last = self._block(data, _RANGE.size)
        if not self._last:
            raise StreamError(self.position, "the name of a block in the first request", "none")
        most = self._blocks[self._last]
        if start % self._page_size or length % self._page_size or not 0 < length <= most - start:
            raise StreamError(
                self.position,
                f"whole pages of {self._last}, which has {most} bytes",
                f"{length} bytes from {start:#x}",
            )
        return PageRequest(self._last, start, length)

    def _bitmap(self, block: str) -> Generator[int, memoryview, Bitmap]:
        pages = self._blocks[block] // self._page_size
        expected = -(-pages // 64) * 8
        size = int.from_bytes((yield 8), "big")
        if size != expected:
            raise StreamError(
                self.position, f"{expected} bytes of bitmap for {pages} pages", f"{size}"
            )
        bits = np.frombuffer((yield size), np.uint8)
        got = np.unpackbits(bits, count=pages, bitorder="little").view(np.bool_)
        ending = int.from_bytes((yield 8), "big")
        if ending != _ENDING:
            raise StreamError(
                self.position, f"{_ENDING:#018x} behind the bitmap", f"{ending:#018x}"
            )
        return Bitmap(block, got)
