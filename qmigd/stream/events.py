"""What a stream consists of: what a reader yields, in order, and a writer takes.

Each event says where in the stream it begins: ``at``, in bytes from the stream's first.
Arrays and views in an event are good until the reader is given more: who keeps them copies them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qmigd.stream.format import RamBlock, SectionType

__all__ = [
    "Bitmap",
    "Command",
    "Compressed",
    "Configuration",
    "Description",
    "DeviceData",
    "End",
    "Event",
    "Header",
    "Hook",
    "MappedBlock",
    "MappedPages",
    "MultifdFlush",
    "Package",
    "PackageEnd",
    "Pages",
    "RamBlocks",
    "SectionEnd",
    "SectionStart",
    "Xbzrle",
    "Zeros",
]


@dataclass(frozen=True, slots=True)
class Header:
    """The magic and the version of the format."""

    at: int
    version: int


@dataclass(frozen=True, slots=True)
class Configuration:
    """What both ends have to have in common.

    :ivar machine: the machine type, with its version.
    :ivar page_bits: binary logarithm of the target's page size; None where it cannot vary.
    :ivar capabilities: those that change the stream; None where none of them was on.
    :ivar uuid: the guest's, 16 bytes, with ``validate-uuid`` only.
    """

    at: int
    machine: str
    page_bits: int | None = None
    capabilities: tuple[str, ...] | None = None
    uuid: bytes | None = None


@dataclass(frozen=True, slots=True)
class SectionStart:
    """A section begins: START, PART, END or FULL.

    :ivar id: what PART and END refer to.
    :ivar name: whose it is, QEMU's ``idstr``; a PART and an END have that of their START.
    """

    at: int
    kind: SectionType
    id: int
    name: str
    instance: int
    version: int


@dataclass(frozen=True, slots=True)
class SectionEnd:
    """A section is over.

    :ivar footer: whether its id stands behind it; old machine types do without.
    """

    at: int
    id: int
    footer: bool = True


@dataclass(frozen=True, slots=True)
class RamBlocks:
    """The setup of RAM: all its blocks.

    :ivar total: bytes, of all blocks together.
    """

    at: int
    total: int
    blocks: tuple[RamBlock, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Pages of a block, as they are.

    :ivar offsets: of each page in the block, bytes.
    :ivar data: a row for each page.
    :ivar named: the first record names the block; else all refer to the one before.
    """

    at: int
    block: str
    offsets: NDArray[np.uint64]
    data: NDArray[np.uint8]
    named: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Zeros:
    """Pages of a block that consist of one byte, which is 0 with every QEMU of today."""

    at: int
    block: str
    offsets: NDArray[np.uint64]
    fill: int = 0
    named: bool = False


@dataclass(frozen=True, slots=True)
class Xbzrle:
    """A page as its difference to what it was before (``qmigd.stream.xbzrle``)."""

    at: int
    block: str
    page: int
    data: bytes
    named: bool = False


@dataclass(frozen=True, slots=True)
class Compressed:
    """A page compressed with zlib, as QEMU did up to 9.0 with the capability ``compress``."""

    at: int
    block: str
    page: int
    data: bytes
    named: bool = False


@dataclass(frozen=True, slots=True)
class MultifdFlush:
    """All multifd channels have to come to this point, before any more of RAM is taken."""

    at: int


@dataclass(frozen=True, slots=True)
class Hook:
    """A mark for RDMA, which moves RAM beside the stream."""

    at: int


@dataclass(frozen=True, slots=True)
class MappedBlock:
    """With ``mapped-ram``: a block whose bitmap and pages follow in the file.

    :ivar end: where the stream goes on behind its pages.
    """

    at: int
    block: RamBlock
    end: int


@dataclass(frozen=True, slots=True)
class Bitmap:
    """With ``mapped-ram``: a piece of a block's bitmap.

    :ivar start: number of the byte within the bitmap that ``data`` begins with.
    :ivar data: one bit for each page, the lowest bit first; 1: it is in the file. Bits beyond the
        block's last page mean nothing.
    """

    at: int
    block: str
    start: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class MappedPages:
    """With ``mapped-ram``: a piece of the place of a block's pages.

    It may begin and end in the midst of a page. What the bitmap does not have means nothing.

    :ivar start: number of the byte within the block that ``data`` begins with.
    """

    at: int
    block: str
    start: int
    data: memoryview


@dataclass(frozen=True, slots=True)
class Command:
    """A command to the destination."""

    at: int
    number: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Package:
    """The command PACKAGED: sections and commands follow that the destination takes all at once.

    :ivar length: bytes up to its :class:`PackageEnd`.
    """

    at: int
    length: int


@dataclass(frozen=True, slots=True)
class PackageEnd:
    """The package is over."""

    at: int


@dataclass(frozen=True, slots=True)
class DeviceData:
    """A piece of the section that is open, which only the device itself understands."""

    at: int
    id: int
    data: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class End:
    """QEMU_VM_EOF: nothing follows, but for the description."""

    at: int


@dataclass(frozen=True, slots=True)
class Description:
    """What the devices' sections mean, as JSON (``qmigd.stream.devices``)."""

    at: int
    data: bytes | bytearray = field(repr=False)


Event: TypeAlias = (
    Header
    | Configuration
    | SectionStart
    | SectionEnd
    | RamBlocks
    | Pages
    | Zeros
    | Xbzrle
    | Compressed
    | MultifdFlush
    | Hook
    | MappedBlock
    | Bitmap
    | MappedPages
    | Command
    | Package
    | PackageEnd
    | DeviceData
    | End
    | Description
)
