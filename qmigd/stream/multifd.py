"""multifd channels: pages and device state in :mod:`packets <qmigd.stream.packets>`, both ways.

:class:`Packer` makes the packets of a channel.  :class:`Unpacker` is fed with what comes
through one and gives them back; who wants the pages to go from the socket straight into RAM
reads by :func:`packet_size` and :func:`read_packet`, and unpacks with a :class:`Decompressor`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from qmigd.errors import StreamError
from qmigd.stream.format import DEFAULT_PAGE_SIZE
from qmigd.stream.names import read_padded, to_bytes
from qmigd.stream.packer import Packer, runs
from qmigd.stream.packets import (
    COMPRESSION,
    DEVICE,
    DEVICE_STATE,
    HEAD,
    HEAD_SIZE,
    INITIAL,
    INITIAL_SIZE,
    MAGIC,
    PACKET_SIZE,
    PAGES,
    SYNC,
    VERSION,
    DevicePacket,
    DeviceState,
    Initial,
    PageData,
    PagePacket,
    page_packet_size,
)
from qmigd.stream.packing import COMPRESSIONS, FLAGS, Compressor, Decompressor
from qmigd.stream.pieces import Buffer, Decoder, Format

__all__ = [
    "COMPRESSIONS",
    "DEVICE_STATE",
    "HEAD_SIZE",
    "INITIAL_SIZE",
    "MAGIC",
    "PACKET_SIZE",
    "SYNC",
    "Compressor",
    "Decompressor",
    "DevicePacket",
    "DeviceState",
    "FullPackets",
    "Initial",
    "Packer",
    "PageData",
    "PagePacket",
    "Unpacker",
    "packet_size",
    "page_packet_size",
    "read_initial",
    "read_packet",
    "runs",
]

#: QEMU reads compressed pages into a buffer of twice a packet's size.
_MOST_COMPRESSED: Final = 2 * PACKET_SIZE

#: Bytes of a device's state that are handed on at one time.
_PART: Final = 1 << 20


def read_initial(data: Buffer, offset: int = 0) -> Initial:
    """Read an initial packet, :data:`INITIAL_SIZE` bytes.

    :param offset: where it is, for the error.
    :raises StreamError: it is none.
    """
    magic, version, uuid, channel, _ = INITIAL.unpack(data)
    _check_magic(magic, version, offset)
    return Initial(UUID(bytes=uuid), channel)


def _check_magic(magic: int, version: int, at: int) -> None:
    if (magic, version) != (MAGIC, VERSION):
        raise StreamError(
            at,
            f"a packet's magic {MAGIC:#x} and version {VERSION}",
            f"{magic:#x} and {version}",
        )


def packet_size(head: Buffer, page_size: int, offset: int = 0) -> int:
    """Return the bytes of a packet, by its first :data:`HEAD_SIZE`.

    :param offset: where it is, for the error.
    :raises StreamError: no packet begins so.
    """
    magic, version, flags = HEAD.unpack(head)
    _check_magic(magic, version, offset)
    if flags & ~(SYNC | DEVICE_STATE | COMPRESSION):
        raise StreamError(
            offset + 8, "flags of a packet (SYNC, compression, DEVICE_STATE)", hex(flags)
        )
    if flags & DEVICE_STATE:
        return DEVICE.size
    return page_packet_size(page_size)


def read_packet(
    data: Buffer,
    page_size: int,
    offset: int = 0,
    blocks: Mapping[str, int] | None = None,
) -> PagePacket | DevicePacket:
    """Read a packet, :func:`packet_size` bytes, but not what follows it.

    :param offset: where it is, for the error.
    :param blocks: bytes of each block of RAM, where they are known: then nothing outside of
        them is taken.
    :raises StreamError: it makes no sense.
    """
    (flags,) = struct.unpack_from(">I", data, 8)
    if flags & DEVICE_STATE:
        _, _, _, device, instance, size = DEVICE.unpack(data)
        return DevicePacket(read_padded(device, offset + 12), instance, size)
    room = PACKET_SIZE // page_size
    _, _, _, _, normal, size, number, zero, name = PAGES.unpack_from(data)
    if normal > room or zero > room - normal:
        raise StreamError(
            offset + 16, f"at most {room} pages", f"{normal} normal and {zero} zero pages"
        )
    if not normal:
        size = 0  # an old QEMU leaves there what it was in the packet before
    block = read_padded(name, offset + 64) if normal + zero else ""
    places = np.frombuffer(data, ">u8", normal + zero, PAGES.size).astype(np.uint64)
    if blocks is not None and normal + zero and block not in blocks:
        raise StreamError(offset + 64, "a block of RAM that there is", repr(block))
    most = (1 << 63) if blocks is None or not block else blocks[block]
    if len(places) and (
        int(np.bitwise_or.reduce(places)) & (page_size - 1)
        or int(np.maximum.reduce(places)) + page_size > most
    ):
        # In this order nothing wraps round.
        wrong = (places % page_size != 0) | (places >= most) | (most - places < page_size)
        at = int(wrong.argmax())
        raise StreamError(
            offset + PAGES.size + 8 * at,
            f"the offset of a page of {page_size} bytes in a block of {most}",
            hex(int(places[at])),
        )
    compression = FLAGS.get(flags & COMPRESSION)
    if compression is None:
        raise StreamError(
            offset + 8, f"a compression out of {', '.join(COMPRESSIONS)}", f"flags {flags:#x}"
        )
    exact = normal * page_size
    if (size != exact) if compression == "none" else (size > _MOST_COMPRESSED):
        expected = f"{exact}" if compression == "none" else f"at most {_MOST_COMPRESSED}"
        raise StreamError(offset + 20, f"{expected} bytes of pages", f"{size}")
    return PagePacket(
        number, block, places[:normal], places[normal:], size, compression, bool(flags & SYNC)
    )


class FullPackets:
    """Knows a packet of neighbouring pages, as many as it has room for, and nothing else.

    Most packets of a first pass are such, and this takes a third of what :func:`read_packet` does.
    """

    def __init__(self, packet: Buffer, page_size: int, block: str, length: int) -> None:
        """:param packet: a buffer of :func:`page_packet_size` bytes, filled again and again.
        :param block: name of the block of RAM.
        :param length: its bytes.
        """
        room = PACKET_SIZE // page_size
        self.size = room * page_size
        like = PAGES.pack(MAGIC, VERSION, 0, room, room, self.size, 0, 0, to_bytes(block))
        # All but the number.
        self._before, self._after = like[:24], like[32:]
        self._head = memoryview(packet)[: PAGES.size]
        self._places = np.frombuffer(packet, ">u8", room, PAGES.size)
        self._steps = np.arange(room, dtype=np.uint64) * np.uint64(page_size)
        self._last = length - self.size
        self._mask = page_size - 1

    def first(self) -> int | None:
        """Return the first page's offset, if the buffer holds such a packet."""
        if self._head[:24] != self._before or self._head[32:] != self._after:
            return None
        firsts = self._places - self._steps
        first = int(firsts[0])
        if first > self._last or first & self._mask or np.count_nonzero(firsts != firsts[0]):
            return None
        return first


class Unpacker(Decoder[Initial | PageData | DeviceState]):
    """Takes what comes through one channel, in pieces of any size."""

    def __init__(
        self, *, page_size: int = DEFAULT_PAGE_SIZE, blocks: Mapping[str, int] | None = None
    ) -> None:
        """Expect the initial packet.

        :param page_size: the target's, in bytes.
        :param blocks: bytes of each block of RAM, where they are known.  They may still be
            put in later: they are looked at with each packet.
        """
        self._page_size = page_size
        self._blocks = blocks
        self._decompressors: dict[str, Decompressor] = {}
        super().__init__("a channel with packets")

    def _format(self) -> Format:
        self._between = False
        beginning = yield INITIAL_SIZE
        self._events.append(read_initial(beginning, self.position))
        while True:
            self._between = True
            head = yield HEAD_SIZE
            self._between = False
            begin = self.position
            rest = yield packet_size(head, self._page_size, begin) - HEAD_SIZE
            packet = read_packet(b"".join((head, rest)), self._page_size, begin, self._blocks)
            if isinstance(packet, PagePacket):
                data = b"" if not packet.payload else (yield packet.payload)
                self._events.append(PageData(begin, packet, self._rows(packet, data)))
            else:
                left = packet.payload
                while True:
                    data = (yield min(left, _PART)) if left else memoryview(b"")
                    left -= len(data)
                    self._events.append(DeviceState(begin, packet, data, left))
                    if not left:
                        break

    def _rows(self, packet: PagePacket, data: Buffer) -> NDArray[np.uint8]:
        size = len(packet.normal) * self._page_size
        if packet.compression != "none" and size:
            unpack = self._decompressors.get(packet.compression)
            if unpack is None:
                unpack = self._decompressors[packet.compression] = Decompressor(packet.compression)
            data = unpack(data, size, self.position)
        return np.frombuffer(data, np.uint8).reshape(-1, self._page_size)
