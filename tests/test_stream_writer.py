"""The stream as it is written: byte by byte, and what a reader makes of it."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import StreamError
from qmigd.stream import writer, xbzrle
from qmigd.stream.events import (
    Command,
    Compressed,
    Configuration,
    Description,
    DeviceData,
    End,
    Event,
    Header,
    Hook,
    MappedPages,
    MultifdFlush,
    Package,
    PackageEnd,
    Pages,
    RamBlocks,
    SectionEnd,
    SectionStart,
    Xbzrle,
    Zeros,
)
from qmigd.stream.format import CommandNumber, RamBlock, SectionType
from qmigd.stream.reader import Reader
from qmigd.stream.records import END_OF_SECTION, RamWriter, ram_of
from qmigd.stream.writer import Writer

PAGE = 1024
BLOCKS = (RamBlock("pc.ram", 64 * PAGE), RamBlock("vga.vram", 16 * PAGE))
OFFSETS = st.lists(st.integers(0, 15).map(lambda page: page * PAGE), min_size=1, max_size=6)
BLOCK = st.sampled_from([block.name for block in BLOCKS])


def array(offsets: Iterable[int]) -> NDArray[np.uint64]:
    return np.array(list(offsets), np.uint64)


def rows(offsets: list[int], seed: int) -> NDArray[np.uint8]:
    """Return pages that differ from each other, and are not all zeros."""
    words = np.arange(len(offsets) * PAGE // 4, dtype=np.uint32) * np.uint32(2654435761)
    return (words + np.uint32(seed)).view(np.uint8).reshape(-1, PAGE)


RECORD: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        lambda block, offsets, seed, named: Pages(
            0, block, array(offsets), rows(offsets, seed), named
        ),
        BLOCK,
        OFFSETS,
        st.integers(0, 99),
        st.booleans(),
    ),
    st.builds(
        lambda block, offsets, fill, named: Zeros(0, block, array(offsets), fill, named),
        BLOCK,
        OFFSETS,
        st.sampled_from([0, 0, 7]),
        st.booleans(),
    ),
    st.builds(Xbzrle, st.just(0), BLOCK, st.just(PAGE), st.binary(max_size=9)),
    st.builds(Compressed, st.just(0), BLOCK, st.just(0), st.binary(max_size=9)),
    st.just(MultifdFlush(0)),
    st.just(Hook(0)),
)
COMMAND: st.SearchStrategy[Event] = st.sampled_from(
    [
        Command(0, CommandNumber.OPEN_RETURN_PATH, b""),
        Command(0, CommandNumber.PING, b"\0\0\0\1"),
        Command(0, CommandNumber.SWITCHOVER_START, b""),
        Command(0, CommandNumber.RECV_BITMAP, b"\6pc.ram"),
    ]
)


@st.composite
def streams(draw: st.DrawFn) -> list[Event]:
    """Events of a whole stream, as a QEMU could write it."""
    footer = draw(st.booleans())
    capabilities = draw(st.sampled_from([None, (), ("x-colo",)]))
    uuid = draw(st.sampled_from([None, bytes(range(16))]))
    events: list[Event] = [Header(0, 3), Configuration(0, "pc-i440fx-7.2", 10, capabilities, uuid)]
    events += draw(st.lists(COMMAND, max_size=2))
    events += [
        SectionStart(0, SectionType.START, 2, "ram", 0, 4),
        RamBlocks(0, sum(block.length for block in BLOCKS), BLOCKS),
        SectionEnd(0, 2, footer),
    ]
    for kind in (SectionType.PART, SectionType.PART, SectionType.END):
        events.append(SectionStart(0, kind, 2, "ram", 0, 4))
        events += draw(st.lists(RECORD, max_size=5))
        events.append(SectionEnd(0, 2, footer))
    events += draw(st.lists(COMMAND, max_size=1))
    if footer:
        data = draw(st.binary(min_size=1, max_size=40).filter(lambda data: b"\x7e" not in data))
        device: list[Event] = [
            SectionStart(0, SectionType.FULL, 7, "timer", 1, 2),
            DeviceData(0, 7, data),
            SectionEnd(0, 7),
        ]
        if draw(st.booleans()):
            packed = [Command(0, CommandNumber.POSTCOPY_LISTEN, b""), *device]
            size = sum(len(part) for event in packed for part in Writer().write(event))
            device = [Package(0, size), *packed, PackageEnd(0)]
        events += device
    events.append(End(0))
    if draw(st.booleans()):
        events.append(Description(0, b'{"devices": []}'))
    return events


def written(events: Iterable[Event]) -> bytes:
    """Write events; what is a view of an event's data is copied at once."""
    out = Writer(PAGE)
    return b"".join(bytes(part) for event in events for part in out.write(event))


def read(data: bytes, cuts: Iterable[int] = (), **options: Any) -> Iterable[Event]:
    """Read a stream that comes in pieces; each event is to be used before the next."""
    reader = Reader(**options)
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    for start, end in pairwise(places):
        yield from reader.feed(data[start:end])
    yield from reader.close()


def meaning(events: Iterable[Event]) -> list[Any]:
    """Return what can be compared: without places, and pages one by one."""
    found: list[Any] = []
    for event in events:
        match event:
            case Pages():
                for offset, row in zip(event.offsets.tolist(), event.data, strict=True):
                    found.append((event.block, offset, row.tobytes()))
            case Zeros():
                found += [(event.block, offset, event.fill) for offset in event.offsets.tolist()]
            case Xbzrle() | Compressed():
                found.append((type(event), event.block, event.page, event.data))
            case DeviceData():
                if found and isinstance(found[-1], bytes):
                    found[-1] += event.data
                else:
                    found.append(event.data)
            case _:
                fields = {name: getattr(event, name) for name in event.__slots__ if name != "at"}
                found.append((type(event), fields))
    return found


class RoundTripTests(SynchronousTestCase):
    @settings(deadline=None)
    @given(streams(), st.lists(st.integers(0, 1 << 20), max_size=8))
    def test_read_again(self, events: list[Event], cuts: list[int]) -> None:
        """What was written is read, in whatever pieces it comes."""
        self.assertEqual(meaning(read(written(events), cuts)), meaning(events))

    @settings(deadline=None)
    @given(streams(), st.lists(st.integers(0, 1 << 20), max_size=8))
    def test_written_again(self, events: list[Event], cuts: list[int]) -> None:
        """What was read, and is written, is the same to the byte."""
        data = written(events)
        self.assertEqual(written(read(data, cuts)), data)

    @settings(deadline=None, max_examples=300)
    @given(streams(), st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)), max_size=3))
    def test_garbled(self, events: list[Event], changes: list[tuple[int, int]]) -> None:
        """Whatever a reader has taken is written so that it means the same."""
        data = bytearray(written(events))
        for place, byte in changes:
            data[place % len(data)] = byte
        try:
            found = meaning(read(bytes(data)))
        except StreamError:
            return
        self.assertEqual(meaning(read(written(read(bytes(data))))), found)

    def test_byte_by_byte(self) -> None:
        """The same holds where each byte comes alone."""
        events: list[Event] = [
            Header(0, 3),
            Configuration(0, "pc", 10),
            SectionStart(0, SectionType.START, 2, "ram", 0, 4),
            RamBlocks(0, 80 * PAGE, BLOCKS),
            Pages(0, "pc.ram", array([0, PAGE]), rows([0, PAGE], 1)),
            Zeros(0, "vga.vram", array([0, PAGE, 2 * PAGE])),
            SectionEnd(0, 2),
            End(0),
        ]
        data = written(events)
        self.assertEqual(written(read(data, range(len(data)))), data)

    def test_names_where_they_are_needed(self) -> None:
        """With events left out, a page still says which block it is in."""
        events: list[Event] = [
            Header(0, 3),
            Configuration(0, "pc", 10),
            SectionStart(0, SectionType.START, 2, "ram", 0, 4),
            RamBlocks(0, 80 * PAGE, BLOCKS),
            Pages(0, "pc.ram", array([0]), rows([0], 1), named=True),
            Zeros(0, "vga.vram", array([0]), named=True),
            Zeros(0, "vga.vram", array([PAGE])),
            SectionEnd(0, 2),
            End(0),
        ]
        del events[5]
        again = [event for event in read(written(events)) if isinstance(event, Zeros)]
        self.assertEqual([(zeros.block, zeros.named) for zeros in again], [("vga.vram", True)])

    def test_parts_of_a_file(self) -> None:
        """What is in a file with places of its own is refused in a stream."""
        with self.assertRaisesRegex(ValueError, "MappedPages is part of a file"):
            Writer().write(MappedPages(0, "pc.ram", 0, memoryview(b"")))


class FrameTests(SynchronousTestCase):
    """Each piece, written down by hand."""

    def test_beginning(self) -> None:
        """Header and configuration, with each of its subsections."""
        self.assertEqual(writer.header().hex(), "5145564d00000003")
        self.assertEqual(
            writer.configuration(
                "pc", page_bits=12, capabilities=["x-colo"], uuid=bytes(range(16))
            ),
            b"\x07\0\0\0\x02pc"
            b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x0c"
            b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x06x-colo"
            b"\x05\x12configuration/uuid\0\0\0\x01" + bytes(range(16)),
        )

    def test_sections(self) -> None:
        """A section that names its device, one that goes on, and the footer."""
        self.assertEqual(
            writer.section_start(SectionType.START, 2, "ram", 0, 4).hex(),
            "01 00000002 03 72616d 00000000 00000004".replace(" ", ""),
        )
        self.assertEqual(writer.section_start(SectionType.PART, 2).hex(), "0200000002")
        self.assertEqual(writer.section_end(2).hex(), "7e00000002")

    def test_commands(self) -> None:
        """Commands with and without data, up to what fits."""
        self.assertEqual(writer.open_return_path().hex(), "0800010000")
        self.assertEqual(writer.ping(66).hex(), "080002000400000042")
        self.assertEqual(writer.switchover_start().hex(), "08000b0000")
        self.assertEqual(len(writer.command(4000, bytes(65535))), 65540)
        with self.assertRaisesRegex(ValueError, "65536"):
            writer.command(4000, bytes(65536))

    def test_setup_of_ram(self) -> None:
        """The sum of all blocks, then each of them, with what it has beside its length."""
        self.assertEqual(
            writer.ram_setup([RamBlock("a", 0x2000), RamBlock("b", 0x200000, page_size=0x200000)]),
            struct.pack(">Q", 0x202004)
            + b"\x01a"
            + struct.pack(">Q", 0x2000)
            + b"\x01b"
            + struct.pack(">QQ", 0x200000, 0x200000),
        )
        shared = RamBlock("c", 0x1000, address=0x100000000)
        self.assertEqual(
            writer.ram_setup([shared], 0x1000).hex(),
            "0000000000001004 0163 0000000000001000 0000000100000000".replace(" ", ""),
        )

    def test_end(self) -> None:
        """The end, and the description behind it."""
        self.assertEqual(writer.end() + writer.description(b"{}"), b"\0\x06\0\0\0\x02{}")
        self.assertEqual(END_OF_SECTION.hex(), "0000000000000010")

    def test_names(self) -> None:
        """A name has to fit into its length."""
        for name in ("", "x" * 256):
            with self.assertRaisesRegex(ValueError, "1 to 255"):
                writer.section_start(SectionType.FULL, 1, name)


class RecordTests(SynchronousTestCase):
    def test_first_record_names_its_block(self) -> None:
        """All others of the same block continue it, in other calls as well."""
        ram = RamWriter(PAGE)
        page = bytes(rows([0], 3))
        parts = [*ram.pages("b", [0], rows([0], 3)), *ram.zeros("b", [PAGE, 2 * PAGE])]
        self.assertEqual(
            b"".join(parts),
            struct.pack(">Q", 0x08)
            + b"\x01b"
            + page
            + struct.pack(">QBQB", PAGE | 0x22, 0, 2 * PAGE | 0x22, 0),
        )
        self.assertEqual(ram.block, "b")
        self.assertEqual(b"".join(ram.zeros("c", [0])), struct.pack(">Q", 2) + b"\x01c\0")

    def test_other_records(self) -> None:
        """Encoded pages have their lengths in front; nothing is written for no pages."""
        ram = RamWriter(PAGE)
        self.assertEqual(
            ram.xbzrle("b", PAGE, b"xyz"),
            struct.pack(">Q", PAGE | 0x40) + b"\x01b" + b"\x01\0\x03xyz",
        )
        self.assertEqual(
            ram.compressed("b", PAGE, b"xyz"),
            struct.pack(">Q", PAGE | 0x120) + b"\0\0\0\x03xyz",
        )
        self.assertEqual(ram.pages("other", [], np.empty((0, PAGE), np.uint8)), [])
        self.assertEqual(ram.block, "b")

    @settings(deadline=None)
    @given(
        st.lists(st.integers(0, 199), max_size=200),
        st.booleans(),
        st.booleans(),
    )
    def test_out_of_ram(self, pages: list[int], ordered: bool, reused: bool) -> None:
        """Pages that are copied out of RAM are the same as pages that are given."""
        if ordered:
            pages.sort()
        content = np.random.default_rng(1).integers(0, 256, 200 * PAGE, np.uint8)
        ram = ram_of(content.tobytes(), PAGE)
        out = np.empty(200 * (PAGE + 8), np.uint8) if reused else None
        offsets = [page * PAGE for page in pages]
        given_pages, copied = RamWriter(PAGE), RamWriter(PAGE)
        expected = b"".join(given_pages.pages("b", offsets, ram[pages]))
        self.assertEqual(b"".join(copied.pages_of("b", offsets, ram, out=out)), expected)

    def test_too_small_a_place(self) -> None:
        """Where the records do not fit, they are put elsewhere."""
        ram = ram_of(bytes(4 * PAGE), PAGE)
        out = np.empty(PAGE + 8, np.uint8)
        parts = RamWriter(PAGE).pages_of("b", [0, PAGE, 2 * PAGE], ram, out=out)
        self.assertEqual(sum(map(len, parts)), 3 * (PAGE + 8) + 2)

    def test_odd_ram(self) -> None:
        """RAM that is no whole number of pages is refused."""
        self.assertRaises(ValueError, ram_of, bytes(PAGE + 1), PAGE)


class XbzrleTests(SynchronousTestCase):
    """A page as its difference to what it was before."""

    @settings(deadline=None)
    @given(
        st.lists(
            st.tuples(st.integers(0, PAGE - 1), st.binary(min_size=1, max_size=300)), max_size=9
        )
    )
    def test_applied(self, changes: list[tuple[int, bytes]]) -> None:
        """Applied to the page before it gives the page."""
        before = bytes(rows([0], 5))
        now = bytearray(before)
        for place, data in changes:
            now[place : place + len(data)] = data[: PAGE - place]
        difference = xbzrle.encode(before, bytes(now))
        if difference is None:
            changed = sum(one != other for one, other in zip(before, now, strict=True))
            self.assertGreater(3 * changed, PAGE)
            return
        self.assertLessEqual(len(difference), PAGE)
        self.assertEqual(bool(difference), bytes(now) != before)
        again = bytearray(before)
        xbzrle.apply(memoryview(again), difference, 0)
        self.assertEqual(again, now)

    def test_bytes(self) -> None:
        """The runs of equal and of other bytes, in numbers of 7 bits a piece."""
        before = bytes(PAGE)
        now = bytearray(PAGE)
        now[1:3] = b"ab"
        now[203] = 7
        now[300:500] = bytes(range(1, 201))
        self.assertEqual(
            xbzrle.encode(before, bytes(now)),
            b"\x01\x02ab" + b"\xc8\x01\x01\x07" + b"\x60\xc8\x01" + bytes(range(1, 201)),
        )
        self.assertEqual(xbzrle.encode(before, before), b"")
        self.assertIsNone(xbzrle.encode(before, b"\1" * PAGE))
        self.assertIsNone(xbzrle.encode(before, b"\1\0" * (PAGE // 2)))
