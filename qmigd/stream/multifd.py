"""multifd channels: pages and device state in packets, both ways.

::

    initial packet   magic:u32 version:u32 uuid:16 channel:u8 zeros:39                64 bytes
    page packet      magic:u32 version:u32 flags:u32 room:u32 normal:u32 size:u32
                     number:u64 zero:u32 zeros:28 block:256  offset:u64 * 524288/page size
    device packet    magic:u32 version:u32 flags:u32 device:256 instance:u32 size:u32

then ``size`` bytes: the normal pages one after the other, compressed or not, or the state
of the device.  Integers are big-endian, names end in zeros.  The array of offsets has always
the same length; the normal pages' are in front, the zero pages' follow.  What compresses goes
on from packet to packet of its channel and is only flushed at the end of each.

Up to QEMU 8.2 there are no zero pages here, and a packet with SYNC may have pages as well, after
which one with neither follows; from 9.0 on it is one without pages.  An old QEMU leaves in the
unused part of a packet what was there before, and even in ``size`` and ``block``.

:class:`Packer` makes the packets of a channel.  :class:`Unpacker` is fed with what comes
through one and gives them back; who wants the pages to go from the socket straight into RAM
reads by :func:`packet_size` and :func:`read_packet`, and unpacks with a :class:`Decompressor`.

Source: migration/multifd.h, multifd.c, multifd-nocomp.c, multifd-zlib.c, multifd-zstd.c
and multifd-device-state.c of QEMU.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias
from uuid import UUID

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmigd.errors import StreamError
from qmigd.stream.format import DEFAULT_PAGE_SIZE
from qmigd.stream.names import read_padded, to_bytes
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

#: MULTIFD_MAGIC and MULTIFD_VERSION.
MAGIC: Final = 0x11223344
_VERSION: Final = 1

#: MULTIFD_PACKET_SIZE: bytes of pages that a packet has room for.
PACKET_SIZE: Final = 512 << 10

#: MULTIFD_FLAG_SYNC and MULTIFD_FLAG_DEVICE_STATE, and how the pages are compressed.
SYNC: Final = 1 << 0
DEVICE_STATE: Final = 1 << 6
_COMPRESSION: Final = 0x1F << 1

#: QEMU reads compressed pages into a buffer of twice a packet's size.
_MOST_COMPRESSED: Final = 2 * PACKET_SIZE

#: Bytes of a device's state that are handed on at one time.
_PART: Final = 1 << 20

_INITIAL: Final = struct.Struct(">II16sB39s")
_HEAD: Final = struct.Struct(">III")
_PAGES: Final = struct.Struct(">IIIIIIQI28x256s")
_DEVICE: Final = struct.Struct(">III256sII")

#: Bytes of an initial packet, and of what says how long any other is.
INITIAL_SIZE: Final = _INITIAL.size
HEAD_SIZE: Final = _HEAD.size
#: Offsets of pages within their block, in bytes.
Offsets: TypeAlias = NDArray[np.uint64]

_NO_OFFSETS: Final[Offsets] = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Initial:
    """What a channel begins with.

    :ivar uuid: the guest's; QEMU refuses any other.
    :ivar channel: from 0.
    """

    uuid: UUID
    channel: int

    def encode(self) -> bytes:
        """Return the packet, :data:`INITIAL_SIZE` bytes."""
        return _INITIAL.pack(MAGIC, _VERSION, self.uuid.bytes, self.channel, b"")


@dataclass(frozen=True, eq=False)
class PagePacket:
    """The packet in front of pages.

    :ivar number: of the packet, counted over all channels.
    :ivar block: name of the block of RAM; empty where there are no pages.
    :ivar normal: offsets of the pages that follow.
    :ivar zero: offsets of pages that are zero.
    :ivar payload: bytes that follow.
    :ivar compression: one of :data:`COMPRESSIONS`.
    :ivar sync: all that went through the channel before belongs in RAM now.
    """

    number: int
    block: str
    normal: Offsets
    zero: Offsets
    payload: int
    compression: str
    sync: bool


@dataclass(frozen=True)
class DevicePacket:
    """The packet in front of a part of a device's state.

    :ivar device: as in the header of a section.
    :ivar payload: bytes that follow.
    """

    device: str
    instance: int
    payload: int


@dataclass(frozen=True, eq=False)
class PageData:
    """A packet with its pages.

    :ivar at: where the packet begins, in bytes from the channel's beginning.
    :ivar data: the pages at ``packet.normal``, one in a row.
    """

    at: int
    packet: PagePacket
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class DeviceState:
    """Some bytes of a device's state, up to 1 MiB.

    :ivar at: where its packet begins, in bytes from the channel's beginning.
    :ivar left: bytes of the same packet that are still to come.
    """

    at: int
    packet: DevicePacket
    data: memoryview
    left: int


# -- writing ----------------------------------------------------------------------


class Packer:
    """Makes the packets that go through one channel.

    :ivar room: pages that fit in one packet.
    """

    def __init__(
        self, *, page_size: int = DEFAULT_PAGE_SIZE, compression: str = "none", level: int = 1
    ) -> None:
        """Both ends have to have the same of these, but for the level.

        :param page_size: the target's, in bytes.
        :param compression: a key of :data:`COMPRESSIONS`.
        """
        self.room = PACKET_SIZE // page_size
        self._page_size = page_size
        self._flags = COMPRESSIONS[compression]
        self._compress = None if compression == "none" else Compressor(compression, level)

    def pages(
        self,
        number: int,
        block: str,
        normal: ArrayLike,
        data: Sequence[Buffer],
        zero: ArrayLike = (),
        *,
        sync: bool = False,
    ) -> list[Buffer]:
        """Return a packet with pages, up to :attr:`room` of both kinds.

        :param number: of the packet, counted over all channels.
        :param block: name of the block of RAM.
        :param normal: offsets of the pages in ``data``.
        :param data: these pages one after the other, in buffers of any size; without
            compression they are handed on and not copied (see :func:`runs`).
        :param zero: offsets of pages that are zero.  QEMU knows them from 9.0 on.
        :param sync: as QEMUs before 9.0 do it; for later ones see :meth:`sync`.
        :raises ValueError: these are too many pages, or not the data of these.
        """
        first, second = np.asarray(normal, ">u8"), np.asarray(zero, ">u8")
        if len(first) + len(second) > self.room:
            raise ValueError(f"{len(first) + len(second)} pages do not fit in a packet.")
        if sum(memoryview(part).nbytes for part in data) != len(first) * self._page_size:
            raise ValueError(f"The data is not that of {len(first)} pages.")
        payload: list[Buffer] = list(data)
        size = len(first) * self._page_size
        if self._compress is not None and len(first):
            payload = [packed := self._compress(data)]
            size = len(packed)
        flags = self._flags | (SYNC if sync else 0)
        head = self._head(flags, number, self.room, len(first), len(second), size, block)
        places = first.tobytes() + second.tobytes()
        head[_PAGES.size : _PAGES.size + len(places)] = places
        return [head, *payload]

    def sync(self, number: int) -> Buffer:
        """Return a packet that only says SYNC, as QEMU has them from 9.0 on."""
        return self._head(SYNC, number, 0, 0, 0, 0, "")

    def device_state(self, device: str, instance: int, data: Buffer) -> list[Buffer]:
        """Return a packet with all, or some, of a device's state (QEMU 10.0)."""
        name = to_bytes(device)
        head = _DEVICE.pack(MAGIC, _VERSION, DEVICE_STATE, name, instance, len(data))
        return [head, data] if len(data) else [head]

    def _head(
        self, flags: int, number: int, room: int, normal: int, zero: int, size: int, block: str
    ) -> bytearray:
        head = bytearray(_PAGES.size + 8 * self.room)
        _PAGES.pack_into(
            head,
            0,
            MAGIC,
            _VERSION,
            flags,
            room,
            normal,
            size,
            number,
            zero,
            to_bytes(block) if block else b"",
        )
        return head


def runs(ram: Buffer, offsets: ArrayLike, page_size: int = DEFAULT_PAGE_SIZE) -> list[memoryview]:
    """Return views of pages of RAM, one for each run of neighbours.

    :param ram: of the block.
    :param offsets: of the pages, in bytes; any order.
    """
    places = np.asarray(offsets, np.int64)
    if not len(places):
        return []
    view = memoryview(ram)
    breaks = np.flatnonzero(places[1:] != places[:-1] + page_size) + 1
    if not len(breaks):
        return [view[int(places[0]) : int(places[-1]) + page_size]]
    starts = places[np.concatenate(([0], breaks))].tolist()
    ends = places[np.concatenate((breaks - 1, [-1]))].tolist()
    return [view[start : end + page_size] for start, end in zip(starts, ends, strict=True)]


# -- reading ----------------------------------------------------------------------


def read_initial(data: Buffer, offset: int = 0) -> Initial:
    """Read an initial packet, :data:`INITIAL_SIZE` bytes.

    :param offset: where it is, for the error.
    :raises StreamError: it is none.
    """
    magic, version, uuid, channel, _ = _INITIAL.unpack(data)
    _check_magic(magic, version, offset)
    return Initial(UUID(bytes=uuid), channel)


def _check_magic(magic: int, version: int, at: int) -> None:
    if (magic, version) != (MAGIC, _VERSION):
        raise StreamError(
            at,
            f"a packet's magic {MAGIC:#x} and version {_VERSION}",
            f"{magic:#x} and {version}",
        )


def packet_size(head: Buffer, page_size: int, offset: int = 0) -> int:
    """Return the bytes of a packet, by its first :data:`HEAD_SIZE`.

    :param offset: where it is, for the error.
    :raises StreamError: no packet begins so.
    """
    magic, version, flags = _HEAD.unpack(head)
    _check_magic(magic, version, offset)
    if flags & ~(SYNC | DEVICE_STATE | _COMPRESSION):
        raise StreamError(
            offset + 8, "flags of a packet (SYNC, compression, DEVICE_STATE)", hex(flags)
        )
    if flags & DEVICE_STATE:
        return _DEVICE.size
    return page_packet_size(page_size)


def page_packet_size(page_size: int) -> int:
    """Return the bytes of a packet in front of pages of this size."""
    return _PAGES.size + 8 * (PACKET_SIZE // page_size)


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
        _, _, _, device, instance, size = _DEVICE.unpack(data)
        return DevicePacket(read_padded(device, offset + 12), instance, size)
    room = PACKET_SIZE // page_size
    _, _, _, _, normal, size, number, zero, name = _PAGES.unpack_from(data)
    if normal > room or zero > room - normal:
        raise StreamError(
            offset + 16, f"at most {room} pages", f"{normal} normal and {zero} zero pages"
        )
    if not normal:
        size = 0  # an old QEMU leaves there what it was in the packet before
    block = read_padded(name, offset + 64) if normal + zero else ""
    places = np.frombuffer(data, ">u8", normal + zero, _PAGES.size).astype(np.uint64)
    if blocks is not None and normal + zero and block not in blocks:
        raise StreamError(offset + 64, "a block of RAM that there is", repr(block))
    most = (1 << 63) if blocks is None or not block else blocks[block]
    # In this order nothing wraps round.
    wrong = (places % page_size != 0) | (places >= most) | (most - places < page_size)
    if wrong.any():
        at = int(wrong.argmax())
        raise StreamError(
            offset + _PAGES.size + 8 * at,
            f"the offset of a page of {page_size} bytes in a block of {most}",
            hex(int(places[at])),
        )
    compression = FLAGS.get(flags & _COMPRESSION)
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
