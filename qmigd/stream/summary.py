"""What a stream consists of, counted: a :class:`Summary` takes a reader's events.

It is of the same small size for a stream of any length, and whatever is in it: where there are more
sections or passes than a guest can be thought to have, the rest are counted together.

**Passes** over RAM are not marked in a stream.  They are seen by the order of the pages: a pass
goes through the blocks in the order of the setup, and through each from its beginning, so that a
page that does not come behind the one before begins another pass.  A pass without any page is not
seen.  In postcopy pages are asked for in any order, and no passes are counted any more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qmigd.stream.events import (
    Bitmap,
    Command,
    Compressed,
    Configuration,
    Description,
    DeviceData,
    End,
    Event,
    Header,
    MappedBlock,
    MultifdFlush,
    Package,
    Pages,
    RamBlocks,
    SectionEnd,
    SectionStart,
    Xbzrle,
    Zeros,
)
from qmigd.stream.format import RAM_NAME, CommandNumber, RamBlock, SectionType
from qmigd.stream.multifd import DeviceState, Initial, PageData
from qmigd.stream.pages import zero_pages
from qmigd.stream.strip import Strip

__all__ = ["KINDS", "Block", "Channel", "Pass", "Section", "Summary"]

#: What bytes are counted as, and what that is for people.
KINDS: Final[Mapping[str, str]] = {
    "normal": "pages as they are",
    "zero": "pages of zeros",
    "xbzrle": "pages as differences",
    "compressed": "compressed pages",
    "bitmap": "bitmaps of mapped-ram",
    "hole": "places without a page",
    "device": "devices",
    "description": "the description of the devices",
    "framing": "headers and all else",
}

#: Passes, sections and commands that are counted one by one.
_MOST: Final = 1000

#: Bytes of devices' sections that are kept to be decoded: all together, and one.
_KEPT: Final = 3 << 20
_KEPT_ONE: Final = 256 << 10

_FOOTER: Final = 5

#: Bytes of a bitmap that are counted together: they stand for 16 MiB.
_BITMAP: Final = 512

#: How many bits are set in a byte.
_ONES: Final = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@dataclass
class Block:
    """A block of RAM, and the pages of it in the stream.

    :ivar pages: by their kind.
    :ivar blank: of the normal ones, those that are all zeros.
    """

    block: RamBlock
    number: int
    pages: Counter[str] = field(default_factory=Counter)
    blank: int = 0


@dataclass
class Pass:
    """A pass over RAM.

    :ivar at: where its first page is in the stream.
    :ivar size: bytes of its records.
    """

    at: int
    pages: Counter[str] = field(default_factory=Counter)
    size: int = 0


@dataclass
class Section:
    """A section, with all its parts.

    :ivar at: where it begins in the stream.
    :ivar parts: how many there are.
    :ivar size: bytes of all of them, with their headers and footers.
    :ivar start: where its contents begin, and ``data`` what they are; None where they are not
        kept, since there are too many.
    """

    name: str
    instance: int
    version: int
    at: int
    full: bool
    parts: int = 0
    size: int = 0
    start: int = 0
    data: bytes | None = None


@dataclass
class Channel:
    """A multifd channel."""

    number: int
    pages: Counter[str] = field(default_factory=Counter)
    packets: int = 0
    syncs: int = 0
    compressions: set[str] = field(default_factory=set)
    device_state: int = 0


@dataclass
class _Mapped:
    """The block of mapped-ram that is being read."""

    block: Block
    count: int
    size: int
    pages: int
    end: int


class Summary:
    """Counts what is in a stream.

    :ivar page_size: the target's; to be set by whoever reads, with what the reader knows.
    :ivar kinds: bytes by their kind (:data:`KINDS`).
    :ivar sections: by name and instance, in the order of their beginning.
    :ivar postcopy: pages after the package that begins it, by kind; None: there is none.
    """

    def __init__(self, start: int = 0) -> None:
        """:param start: the offset of the stream's first byte."""
        self.page_size = 4096
        self.start = start
        self.position = start
        self.version: int | None = None
        self.configuration: Configuration | None = None
        self.blocks: dict[str, Block] = {}
        self.total = 0
        self.passes: list[Pass] = []
        self.sections: dict[tuple[str, int], Section] = {}
        self.more_sections = 0
        self.commands: Counter[str] = Counter()
        self.flushes = 0
        self.postcopy: Counter[str] | None = None
        self.package: int | None = None
        self.description: bytes | bytearray | None = None
        self.description_at = 0
        self.ended = False
        self.kinds: Counter[str] = Counter()
        self.strip = Strip(start)
        self.channels: list[Channel] = []
        self.more_passes = 0
        self._open: Section | None = None
        self._ram: Section | None = None
        self._opened = start
        self._kept = 0
        self._pieces: list[bytes] | None = None
        self._last = (-1, -1)
        self._mapped: _Mapped | None = None

    def take(self, event: Event) -> None:
        """Count an event."""
        self._until(event.at)
        match event:
            case Pages():
                size = self.page_size + 8
                self._pages(event.block, "normal", event.offsets, size, event.at)
                blank = int(zero_pages(event.data).sum())
                if blank and (block := self.blocks.get(event.block)):
                    block.blank += blank
            case Zeros():
                self._pages(event.block, "zero", event.offsets, 9, event.at)
            case Xbzrle():
                self._page(event, "xbzrle", 11)
            case Compressed():
                self._page(event, "compressed", 12)
            case SectionStart():
                self._section(event)
            case DeviceData():
                self._device(event)
            case SectionEnd():
                self._section_end(event)
            case Command() | Package():
                self._command(event)
            case RamBlocks():
                self.total = event.total
                for ram in event.blocks:
                    self._block(ram)
            case MappedBlock():
                self._mapped_block(event)
            case Bitmap():
                self._bitmap(event)
            case Description():
                self.description, self.description_at = event.data, event.at
                self._add(event.at, 5 + len(event.data), "description")
            case MultifdFlush():
                self.flushes += 1
            case Header():
                self.version = event.version
            case Configuration():
                self.configuration = event
            case End():
                self.ended = True
            case _:
                pass

    def finish(self, position: int) -> None:
        """Say where the stream has ended."""
        self._until(position)

    def capabilities(self) -> list[str]:
        """Return QEMU's capabilities that the stream names, and those that it shows."""
        named = self.configuration.capabilities if self.configuration else None
        kinds = {kind for block in self.blocks.values() for kind in block.pages}
        shown = {
            "return-path": self.commands["open-return-path"],
            "postcopy-ram": self.commands["postcopy-advise"],
            "xbzrle": "xbzrle" in kinds,
            "compress": "compressed" in kinds,
            "multifd": self.flushes or self.channels,
            "x-colo": self.commands["enable-colo"],
        }
        return [*(named or ()), *(name for name, seen in shown.items() if seen)]

    def take_packet(self, channel: int, packet: Initial | PageData | DeviceState) -> None:
        """Count what came through a multifd channel.

        :param channel: the number of the file or connection, from 0.
        """
        while len(self.channels) <= channel:
            self.channels.append(Channel(len(self.channels)))
        one = self.channels[channel]
        if isinstance(packet, Initial):
            one.number = packet.channel
            return
        one.packets += 1
        if isinstance(packet, DeviceState):
            one.device_state += len(packet.data)
            return
        pages = packet.packet
        one.syncs += pages.sync
        counts = {"normal": len(pages.normal), "zero": len(pages.zero)}
        if counts["normal"]:
            one.compressions.add(pages.compression)
        one.pages.update(counts)
        if block := self.blocks.get(pages.block):
            block.pages.update({f"multifd-{kind}": count for kind, count in counts.items()})
            block.blank += int(zero_pages(packet.data).sum())

    # -- where the bytes go -------------------------------------------------------

    def _add(self, at: int, size: int, kind: str) -> None:
        self.kinds[kind] += size
        self.strip.add(at, size, kind)
        self.position = at + size

    def _until(self, at: int) -> None:
        """Count what is in front of an offset and not counted yet."""
        if self._mapped is not None and at > self._mapped.pages:
            # counted by the bitmap
            if (gap := self._mapped.pages - self.position) > 0:
                self._add(self.position, gap, "hole")
            self.position = max(self.position, min(at, self._mapped.end))
        if at > self.position:
            kind = "framing" if self._open is None else "device"
            self._add(self.position, at - self.position, kind)

    # -- RAM ----------------------------------------------------------------------

    def _block(self, block: RamBlock) -> Block:
        known = self.blocks.get(block.name)
        if known is None:
            known = self.blocks[block.name] = Block(block, len(self.blocks))
        return known

    def _pages(self, name: str, kind: str, offsets: NDArray[np.uint64], size: int, at: int) -> None:
        """Count records of ``size`` bytes each."""
        count = len(offsets)
        self._add(at, count * size, kind)
        block = self.blocks.get(name)
        if block is not None:
            block.pages[kind] += count
        if self.postcopy is not None:
            self.postcopy[kind] += count
            return
        number = -1 if block is None else block.number
        again = []
        if count > 1:
            again = (np.flatnonzero(offsets[1:] <= offsets[:-1]) + 1).tolist()
        another = not self.passes or (number, int(offsets[0])) <= self._last
        self._last = (number, int(offsets[-1]))
        for start, end in pairwise([0, *again, count]):
            if start or another:
                self._pass(at + start * size)
            self.passes[-1].pages[kind] += end - start
            self.passes[-1].size += (end - start) * size

    def _pass(self, at: int) -> None:
        if len(self.passes) < _MOST:
            self.passes.append(Pass(at))
        else:
            self.more_passes += 1

    def _page(self, event: Xbzrle | Compressed, kind: str, head: int) -> None:
        offsets = np.array([event.page], np.uint64)
        self._pages(event.block, kind, offsets, head + len(event.data), event.at)

    def _mapped_block(self, event: MappedBlock) -> None:
        header = event.block.mapped
        if header is not None:
            block = self._block(event.block)
            pages = event.block.length // header.page_size
            self._mapped = _Mapped(block, pages, header.page_size, header.pages_offset, event.end)

    def _bitmap(self, event: Bitmap) -> None:
        self._add(event.at, len(event.data), "bitmap")
        mapped = self._mapped
        if mapped is None:
            return
        bits = np.frombuffer(event.data, np.uint8)
        for start in range(0, len(bits), _BITMAP):
            some = bits[start : start + _BITMAP]
            first = 8 * (event.start + start)
            pages = min(8 * len(some), mapped.count - first)
            present = int(_ONES[some].sum(dtype=np.int64))
            if pages < 8 * len(some):
                # what is behind the last page means nothing
                present = int(np.unpackbits(some, count=pages, bitorder="little").sum())
            mapped.block.pages["normal"] += present
            at = mapped.pages + first * mapped.size
            for kind, size in (("normal", present), ("hole", pages - present)):
                self.kinds[kind] += size * mapped.size
                self.strip.add(at, size * mapped.size, kind)
                at += size * mapped.size

    # -- sections and commands ----------------------------------------------------

    def _section(self, event: SectionStart) -> None:
        key = event.name, event.instance
        section = self.sections.get(key)
        if section is None:
            full = event.kind == SectionType.FULL
            section = Section(event.name, event.instance, event.version, event.at, full)
            if len(self.sections) < _MOST:
                self.sections[key] = section
            else:
                self.more_sections += 1
        section.parts += 1
        self._opened = event.at
        self._ram = section if event.name == RAM_NAME else None
        if self._ram is None:
            self._open = section
            self._pieces = [] if section.full and section.data is None else None
            section.start = 0

    def _device(self, event: DeviceData) -> None:
        if self._open is None or self._pieces is None:
            return
        self._open.start = self._open.start or event.at
        self._pieces.append(event.data)
        self._kept += len(event.data)
        size = event.at + len(event.data) - self._open.start
        if size > _KEPT_ONE or self._kept > _KEPT:
            self._kept -= size
            self._pieces = None

    def _section_end(self, event: SectionEnd) -> None:
        end = event.at + (_FOOTER if event.footer else 0)
        section = self._open or self._ram
        if section is not None:
            section.size += end - self._opened
            if self._open is not None and self._pieces is not None:
                section.start = section.start or event.at
                section.data = b"".join(self._pieces)
        self._until(end)
        self._open = self._ram = self._pieces = None

    def _command(self, event: Command | Package) -> None:
        number = CommandNumber.PACKAGED
        if isinstance(event, Package):
            self.package = event.length
            self.postcopy = Counter()
        else:
            number = CommandNumber(event.number)
        self.commands[number.name.replace("_", "-").lower()] += 1
