"""What goes through multifd channels: pages and device state, in packets.

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

Source: migration/multifd.h, multifd.c, multifd-nocomp.c, multifd-zlib.c, multifd-zstd.c
and multifd-device-state.c of QEMU.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, TypeAlias
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COMPRESSION",
    "DEVICE",
    "DEVICE_STATE",
    "HEAD",
    "HEAD_SIZE",
    "INITIAL",
    "INITIAL_SIZE",
    "MAGIC",
    "PACKET_SIZE",
    "PAGES",
    "SYNC",
    "VERSION",
    "DevicePacket",
    "DeviceState",
    "Initial",
    "PageData",
    "PagePacket",
    "page_packet_size",
]

#: MULTIFD_MAGIC and MULTIFD_VERSION.
MAGIC: Final = 0x11223344
VERSION: Final = 1

#: MULTIFD_PACKET_SIZE: bytes of pages that a packet has room for.
PACKET_SIZE: Final = 512 << 10

#: MULTIFD_FLAG_SYNC and MULTIFD_FLAG_DEVICE_STATE, and how the pages are compressed.
SYNC: Final = 1 << 0
DEVICE_STATE: Final = 1 << 6
COMPRESSION: Final = 0x1F << 1

#: An initial packet; what every other begins with; a page packet in front of the offsets; and a
#: device packet.
INITIAL: Final = struct.Struct(">II16sB39s")
HEAD: Final = struct.Struct(">III")
PAGES: Final = struct.Struct(">IIIIIIQI28x256s")
DEVICE: Final = struct.Struct(">III256sII")

#: Bytes of an initial packet, and of what says how long any other is.
INITIAL_SIZE: Final = INITIAL.size
HEAD_SIZE: Final = HEAD.size
#: Offsets of pages within their block, in bytes.
Offsets: TypeAlias = NDArray[np.uint64]


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
        return INITIAL.pack(MAGIC, VERSION, self.uuid.bytes, self.channel, b"")


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


def page_packet_size(page_size: int) -> int:
    """Return the bytes of a packet in front of pages of this size."""
    return PAGES.size + 8 * (PACKET_SIZE // page_size)
