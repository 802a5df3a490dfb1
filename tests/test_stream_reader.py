"""The reader: where events are, where devices end, and what becomes of what is no stream."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import StreamError
from qmigd.stream import writer
from qmigd.stream.events import (
    Bitmap,
    Configuration,
    Description,
    DeviceData,
    End,
    Event,
    Header,
    MappedBlock,
    MappedPages,
    Pages,
    RamBlocks,
    SectionEnd,
    SectionStart,
    Zeros,
)
from qmigd.stream.format import MAX_DESCRIPTION, CommandNumber, RamBlock, RamFlag, SectionType
from qmigd.stream.mapped_ram import MappedWriter
from qmigd.stream.pages import zero_pages
from qmigd.stream.reader import Reader
from tests.test_stream_writer import read, streams, written

PAGE = 4096
HEADER = writer.header()
RAM = writer.section_start(SectionType.START, 2, "ram", 0, 4)
EOS = struct.pack(">Q", RamFlag.EOS)
END = b"\0"


def setup(*blocks: RamBlock) -> bytes:
    """Return the first section of RAM."""
    return RAM + writer.ram_setup(blocks) + EOS + writer.section_end(2)


def device(name: str, data: bytes, number: int = 7) -> bytes:
    """Return a device's section, without its footer."""
    return writer.section_start(SectionType.FULL, number, name, 0, 1) + data


def packaged(contents: bytes) -> bytes:
    return writer.command(CommandNumber.PACKAGED, struct.pack(">I", len(contents))) + contents


def kinds(events: Iterable[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


class ReaderCase(SynchronousTestCase):
    def refused(self, data: bytes, offset: int, expected: str, found: str) -> None:
        """Check what is said of a stream that is wrong, however it is cut."""
        for cuts in ((), range(len(data))):
            with self.assertRaises(StreamError) as caught:
                list(read(data, cuts))
            error = caught.exception
            self.assertEqual(offset, error.offset, error.text)
            self.assertRegex(error.expected, expected)
            self.assertRegex(error.found, found)
            self.assertEqual("stream", error.code)


class OffsetTests(ReaderCase):
    @settings(deadline=None)
    @given(streams())
    def test_at(self, events: list[Event]) -> None:
        """Each event says where it begins: the first where it was said to, the others in order."""
        data = written(events)
        places = [event.at - 100 for event in read(data, start=100)]
        self.assertEqual(0, places[0])
        self.assertEqual(sorted(places), places)
        for event in read(data):
            if isinstance(event, SectionStart):
                self.assertEqual(event.kind, data[event.at])
                self.assertEqual(event.id.to_bytes(4, "big"), data[event.at + 1 : event.at + 5])
            elif isinstance(event, DeviceData):
                self.assertEqual(event.data, data[event.at : event.at + len(event.data)])
            elif isinstance(event, End):
                self.assertEqual(0, data[event.at])
            elif isinstance(event, Pages):
                head = int.from_bytes(data[event.at : event.at + 8], "big")
                self.assertEqual(int(event.offsets[0]), head & -1024)

    def test_position(self) -> None:
        """The reader knows how far it is, also with half a record."""
        reader = Reader(start=10)
        self.assertEqual(["Header"], kinds(reader.feed(HEADER + b"\1\0")))
        self.assertEqual(19, reader.position)
        self.assertFalse(reader.ended)


class DeviceTests(ReaderCase):
    @settings(deadline=None)
    @given(
        st.lists(
            st.one_of(
                st.binary(max_size=6),
                st.sampled_from([b"\x7e\0\0\0\x07", b"\x7e\0\0\0", b"\x7e", b"\x04\0\0\0\x08\x7e"]),
            ),
            max_size=6,
        ).map(b"".join),
        st.lists(st.integers(0, 300), max_size=6),
        st.booleans(),
    )
    def test_with_size(self, contents: bytes, cuts: list[int], footers: bool) -> None:
        """A section whose size is known ends there, whatever its contents look like."""
        footer = writer.section_end(7) * footers
        other = device("other", b"abc", 8) + writer.section_end(8) * footers
        data = HEADER + device("it", contents) + footer + other + END
        events = list(read(data, cuts, sizes={("it", 0): len(contents), ("other", 0): 3}))
        found = [event.data for event in events if isinstance(event, DeviceData) and event.id == 7]
        self.assertEqual(contents, b"".join(found))

    def test_looks_like_a_footer(self) -> None:
        """Its own footer in a device is no end, unless something follows that can follow."""
        ram = setup(RamBlock("pc.ram", PAGE))
        for number in (0, 7):
            footer = writer.section_end(number)
            later = device("next", b"x", 8) + writer.section_end(8)
            run = writer.command(CommandNumber.POSTCOPY_RUN)
            for inside in (
                footer + b"\xff",
                footer + bytes(9),
                footer + b"\0\x06" + bytes(9),
                footer + b"\x04\0\0\0\x08\x02\1\2\0\0\0\0\0\0\0\1",
                footer + b"\x04" + bytes(30),
                footer + b"\x08\0\x02\0\x05",
                footer + b"\x02\0\0\0\x63",
                footer + b"\x02\0\0\0\x02" + bytes(9),
                footer[:3],
                footer[:3] + footer + b"\xff",
                footer + footer + footer + b"\xff",
            ):
                section = device("it", b"a" + inside + b"z", number) + footer
                for data in (
                    section + later + END,
                    section + writer.command(CommandNumber.PING, bytes(4)) + END,
                    section + writer.section_start(SectionType.PART, 2) + EOS
                    + writer.section_end(2) + END,
                    section + END,
                    section + END + writer.description(b"{}"),
                    packaged(section) + END,
                    packaged(section + run) + END,
                ):  # fmt: skip
                    self.found(HEADER + ram + data, number, b"a" + inside + b"z")

    def found(self, data: bytes, number: int, contents: bytes) -> None:
        """Check what is found in a device's section, however the stream is cut."""
        for cuts in ((), range(len(data)), range(0, len(data), 7)):
            reader = Reader()
            places = [0, *cuts, len(data)]
            found = b""
            for start, end in pairwise(places):
                for event in reader.feed(data[start:end]):
                    if isinstance(event, DeviceData) and event.id == number:
                        found += event.data
            found += b"".join(
                event.data for event in reader.close() if isinstance(event, DeviceData)
            )
            self.assertEqual(contents, found)

    def test_no_footers(self) -> None:
        """Where sections have no footers, only the description can tell where one ends."""
        ram = RAM + writer.ram_setup([RamBlock("pc.ram", PAGE)]) + EOS
        data = HEADER + ram + device("it", b"abc") + END
        at = len(HEADER + ram + device("it", b""))
        self.refused(data, at, "the description before 'it'", "none")
        self.assertEqual("End", kinds(read(data, sizes={("it", 0): 3}))[-1])

    def test_wrong_size(self) -> None:
        """A size that does not fit is an error, and not a wrong decoding."""
        data = HEADER + setup() + device("it", b"abcd") + writer.section_end(7) + END
        with self.assertRaisesRegex(StreamError, "the footer of section 7, 'it', found 647e000000"):
            list(read(data, sizes={("it", 0): 3}))


class RamTests(ReaderCase):
    def test_large_pages(self) -> None:
        """With postcopy, a block says the size of its pages where that is not the usual one."""
        blocks = (
            RamBlock("a", 4 << 20, 2 << 20),
            RamBlock("b", PAGE),
            RamBlock("c", 2 << 20, 2 << 20),
        )
        advise = struct.pack(">QQ", (2 << 20) | PAGE, PAGE)
        data = HEADER + writer.command(CommandNumber.POSTCOPY_ADVISE, advise) + setup(*blocks) + END
        for cuts in ((), range(len(data))):
            found = [event for event in read(data, cuts) if isinstance(event, RamBlocks)]
            self.assertEqual(blocks, found[0].blocks)

    def test_ignore_shared(self) -> None:
        """With x-ignore-shared, a block says its address."""
        blocks = (RamBlock("a", PAGE, address=1 << 32), RamBlock("b", PAGE, address=0))
        data = (
            HEADER + writer.configuration("pc", capabilities=["x-ignore-shared"]) + setup(*blocks)
        )
        found = [event for event in read(data + END) if isinstance(event, RamBlocks)]
        self.assertEqual(blocks, found[0].blocks)

    def test_other_page_size(self) -> None:
        """A target says its page size in the configuration, or whoever reads does."""
        data = HEADER + writer.configuration("virt", page_bits=14)
        reader = Reader()
        self.assertEqual(["Header"], kinds(reader.feed(data)))
        list(reader.feed(setup(RamBlock("a", 1 << 14))))
        self.assertEqual(1 << 14, reader.page_size)
        self.assertEqual(1 << 16, Reader(page_size=1 << 16).page_size)

    def test_preempt(self) -> None:
        """The channel of postcopy-preempt has records alone, up to the end of the section."""
        page = bytes(range(256)) * 16
        data = struct.pack(">Q", 0x3008) + b"\6pc.ram" + page + struct.pack(">QB", 0x4022, 0) + EOS
        reader = Reader(records_only=True, blocks=(RamBlock("pc.ram", 1 << 20),))
        events = [*reader.feed(data), *reader.close()]
        self.assertEqual(["Pages", "Zeros", "End"], kinds(events))
        self.assertTrue(reader.ended)

    def test_resumed(self) -> None:
        """The stream by which a postcopy is resumed has no header, and goes on with sections."""
        ram = SectionStart(0, SectionType.START, 2, "ram", 0, 4)
        data = (
            writer.command(CommandNumber.RECV_BITMAP, b"\6pc.ram")
            + writer.command(CommandNumber.POSTCOPY_RESUME)
            + writer.section_start(SectionType.PART, 2)
            + struct.pack(">Q", 0x1002) + b"\6pc.ram\0" + EOS
            + writer.section_end(2)
            + END
        )  # fmt: skip
        reader = Reader(header=False, sections=(ram,), blocks=(RamBlock("pc.ram", 1 << 20),))
        self.assertEqual(
            ["Command", "Command", "SectionStart", "Zeros", "SectionEnd", "End"],
            kinds([*reader.feed(data), *reader.close()]),
        )

    @settings(deadline=None)
    @given(st.lists(st.booleans(), max_size=20), st.lists(st.integers(0, 1 << 20), max_size=6))
    def test_mapped(self, present: list[bool], cuts: list[int]) -> None:
        """In a file with mapped-ram, bitmap and pages come where the header says, in order."""
        place = MappedWriter(PAGE)
        start = HEADER + writer.configuration("pc", capabilities=["mapped-ram"]) + RAM
        image = bytearray(start)
        placed = place.setup(len(start), [RamBlock("a", len(present) * PAGE), RamBlock("b", PAGE)])
        offsets = [number * PAGE for number, there in enumerate(present) if there]
        data = np.full((len(offsets), PAGE), 5, np.uint8)
        placed += place.pages("a", offsets, data)
        placed += [*place.bitmaps(), (place.position, EOS + writer.section_end(2) + END)]
        image.extend(bytes(max(at + len(part) for at, part in placed) - len(image)))
        for at, part in placed:
            image[at : at + len(part)] = part
        bits, pages = bytearray(), bytearray()
        for event in read(bytes(image), cuts):
            if isinstance(event, Bitmap) and event.block == "a":
                self.assertEqual(len(bits), event.start)
                bits += event.data
            elif isinstance(event, MappedPages) and event.block == "a":
                self.assertEqual(len(pages), event.start)
                pages += event.data
            elif isinstance(event, RamBlocks):
                self.assertEqual(place.blocks, event.blocks)
        seen = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        self.assertEqual(present, seen.astype(bool).tolist()[: len(present)])
        rows = np.frombuffer(pages, np.uint8).reshape(-1, PAGE)
        self.assertEqual(present, (rows[:, 0] == 5).tolist())

    def test_skipped(self) -> None:
        """Whoever can, passes over the places of pages; the stream goes on behind them."""
        place = MappedWriter(PAGE)
        start = HEADER + writer.configuration("pc", capabilities=["mapped-ram"]) + RAM
        placed = place.setup(len(start), [RamBlock("a", 1 << 40)])
        reader = Reader()
        events = [*reader.feed(start + b"".join(bytes(part) for _, part in placed))]
        (mapped,) = (event for event in events if isinstance(event, MappedBlock))
        left = mapped.end - reader.position
        self.assertEqual([], list(reader.feed(b"")))
        reader.skip(left)
        self.assertEqual(
            ["RamBlocks", "SectionEnd", "End"],
            kinds([*reader.feed(EOS + writer.section_end(2) + END), *reader.close()]),
        )

    @given(st.lists(st.integers(-1, PAGE - 1), max_size=20))
    def test_zero_pages(self, places: list[int]) -> None:
        """A page with a byte anywhere is not zero, and every other is; they need not be aligned."""
        whole = np.zeros(len(places) * (PAGE + 8) + 3, np.uint8)
        pages = np.ndarray((len(places), PAGE), np.uint8, whole, 3, (PAGE + 8, 1))
        for number, place in enumerate(places):
            if place >= 0:
                pages[number, place] = 1
        self.assertEqual([place < 0 for place in places], zero_pages(pages).tolist())


class WrongTests(ReaderCase):
    def test_each_kind(self) -> None:
        """What is wrong is said with its place, what should be there, and what is."""
        ram = setup(RamBlock("pc.ram", 4 * PAGE))
        part = writer.section_start(SectionType.PART, 2)
        body = HEADER + ram + part
        base = len(body)
        for data, offset, expected, found in (
            (b"QEMU" + HEADER, 0, "magic b'QEVM'", "b'QEMU'"),
            (b"QEVM\0\0\0\2", 4, "version 3", "2"),
            (b"QE", 0, "magic", "the end after 2 bytes"),
            (HEADER + b"\x05", 8, "a section, a command or the end", "05"),
            (HEADER + b"\x07\xff\xff\xff\xff", 9, "machine type of 1 to 255", "4294967295"),
            (HEADER + b"\x07\0\0\0\2\xff\0", 13, "the machine type", "xff"),
            (HEADER + writer.configuration("pc", page_bits=40), 51, "a page size", "40"),
            (HEADER + b"\x01\0\0\0\1\0", 13, "a section's name", "an empty one"),
            (HEADER + b"\x02\0\0\0\1", 8, "has been started", "section 1"),
            (HEADER + b"\x08\0\x63\0\0", 8, "a known command", "number 99"),
            (HEADER + b"\x08\0\1\0\1", 8, "a known command with its size", "size 1"),
            (HEADER + RAM[:-1] + b"\3", 8, "RAM of version 4", "3"),
            (body + struct.pack(">Q", 0x28), base, "the name of a block", "continues"),
            (body + struct.pack(">Q", 0x1001), base, "a record of RAM", "0x1"),
            (body + struct.pack(">Q", 0x18), base, "a record of RAM", "PAGE | EOS"),
            (body + struct.pack(">Q", 8) + b"\1x", base + 8, "that the setup", "'x'"),
            (
                body + struct.pack(">Q", 0x4002) + b"\6pc.ram\0",
                base, "a page within the 0x4000 bytes of 'pc.ram'", "one at 0x4000",
            ),
            (
                body + struct.pack(">Q", 2) + b"\6pc.ram\0"
                + struct.pack(">QB", 0x22, 0) + struct.pack(">QB", (1 << 63) | 0x22, 0),
                base + 25, "a page within", "one at 0x8",
            ),
            (
                body + struct.pack(">Q", 0x40) + b"\6pc.ram\2",
                base + 15, "the encoding XBZRLE", "2",
            ),
            (
                body + struct.pack(">Q", 0x40) + b"\6pc.ram\1\xff\xff",
                base + 16, "at most 4096 bytes", "65535",
            ),
            (
                body + struct.pack(">Q", 0x100) + b"\6pc.ram\xff\0\0\0",
                base + 15, "the size of a compressed page", "4278190080",
            ),
            (body + EOS + b"\x7e\0\0\0\3", base + 8, "the footer of section 2", "7e"),
            (
                HEADER + RAM + struct.pack(">Q", 0x1004) + b"\1a" + struct.pack(">Q", 0x2000),
                len(HEADER + RAM) + 8, "at most the 0x1000 bytes", "0x2000",
            ),
            (HEADER + END + b"\x05", 9, "the description, 06, or the end", "05"),
            (HEADER + END + b"\x06\xff\xff\xff\xff", 10, "a description of 2 to", "4294967295"),
            (HEADER + END + writer.description(b"{}") + b"!", 16, "the end of the stream", "21"),
            (
                HEADER + writer.command(CommandNumber.PACKAGED, b"\0\0\0\3") + b"\x08\0\1\0\0",
                20, "the size of a command's data", "the end of the package after 0 bytes",
            ),
            (
                HEADER + writer.command(CommandNumber.PACKAGED, b"\0\0\0\5") + END,
                17, "a package that goes on", "its end",
            ),
            (
                HEADER + writer.command(CommandNumber.PACKAGED, b"\0\0\0\x63")
                + writer.command(CommandNumber.PACKAGED, b"\0\0\0\1"),
                17, "no package within a package", "one",
            ),
        ):  # fmt: skip
            self.refused(data, offset, expected, found)

    @settings(deadline=None)
    @given(streams(), st.integers(0, 1 << 20))
    def test_cut(self, events: list[Event], cut: int) -> None:
        """A stream that is cut is refused with the place, or was complete without the rest."""
        data = written(events)
        cut %= len(data)
        reader = Reader()
        events = [*reader.feed(data[:cut])]
        if reader.ended and not any(isinstance(event, Description) for event in events):
            where = next(event.at for event in events if isinstance(event, End))
            if cut == where + 1:
                self.assertEqual([], list(reader.close()))
                return
        with self.assertRaises(StreamError) as caught:
            list(reader.close())
        self.assertLessEqual(caught.exception.offset, cut)
        self.assertIn("the end", caught.exception.found)

    @settings(deadline=None, max_examples=150)
    @given(
        streams(),
        st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=9)), max_size=5),
        st.lists(st.integers(0, 1 << 20), max_size=4),
    )
    def test_garbled(
        self, events: list[Event], changes: list[tuple[int, bytes]], cuts: list[int]
    ) -> None:
        """Whatever has become of a stream, it is read, or refused: the same in any pieces."""
        data = bytearray(written(events))
        for at, change in changes:
            at %= len(data)
            data[at : at + len(change)] = change
        self.assertEqual(self.outcome(bytes(data), ()), self.outcome(bytes(data), cuts))

    def outcome(self, data: bytes, cuts: Iterable[int]) -> tuple[bytes, str]:
        out, told = b"", "read"
        try:
            for event in read(data, cuts):
                if isinstance(event, Pages | Zeros):
                    out += b"".join(f"{event.block} {at}".encode() for at in event.offsets)
                elif isinstance(event, DeviceData):
                    out += event.data
                else:
                    out += repr(event).encode()
        except StreamError as error:
            told = error.text
        return out, told

    @given(st.binary(max_size=400), st.booleans())
    def test_garbage(self, data: bytes, begins: bool) -> None:
        """Anything else is read or refused as well."""
        self.outcome(HEADER * begins + data, ())

    def test_after_an_error(self) -> None:
        """A reader that has refused something goes on refusing."""
        reader = Reader()
        self.assertRaises(StreamError, list, reader.feed(b"nonsense"))
        self.assertRaises(StreamError, list, reader.feed(HEADER))
        self.assertRaises(StreamError, list, reader.close())


class MemoryTests(ReaderCase):
    def peak(self, head: bytes, more: bytes, times: int) -> int:
        """Return how much memory it took at most to read something, in bytes."""
        reader = Reader()
        tracemalloc.start()
        try:
            for _ in reader.feed(head):
                pass
            for _ in range(times):
                for _ in reader.feed(more):
                    pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def test_lengths_lie(self) -> None:
        """No length makes the reader ask for memory: only what has come does."""
        everything = (
            struct.pack(">Q", (1 << 63) | RamFlag.MEM_SIZE) + b"\1a" + struct.pack(">Q", 1 << 63)
        )
        for head, more in (
            (HEADER + writer.command(CommandNumber.PACKAGED, b"\xff\xff\xff\xff"), b"\x08\0\1\0\0"),
            (HEADER + END + b"\x06" + struct.pack(">I", MAX_DESCRIPTION), b"{"),
            (HEADER + RAM + everything, EOS + writer.section_end(2) + RAM),
            (HEADER + device("it", b"\x7e"), bytes(1 << 16)),
            (HEADER + device("it", b""), b"\x7e\0\0\0\x07\x04\0\0\0\0\xff" * 500),
        ):
            self.assertLess(self.peak(head, more, 10), 1 << 20)

    def test_many_sections(self) -> None:
        """There are more sections that come in parts than any guest has: that is refused."""
        data = HEADER + b"".join(
            writer.section_start(SectionType.START, number, "it") + writer.section_end(number)
            for number in range(5000)
        )
        with self.assertRaisesRegex(StreamError, "at most 4096 sections in parts"):
            list(read(data + END))

    def test_many_pages(self) -> None:
        """A long stream takes no more memory than a short one."""
        ram = setup(RamBlock("pc.ram", 1 << 30)) + writer.section_start(SectionType.PART, 2)
        first = struct.pack(">Q", 8) + b"\6pc.ram" + bytes(PAGE)
        run = b"".join(struct.pack(">Q", n * PAGE | 0x28) + bytes(PAGE) for n in range(255))
        few, many = (self.peak(HEADER + ram + first, run, times) for times in (2, 100))
        self.assertLess(many, few + (1 << 16))


class HeaderTests(ReaderCase):
    def test_configuration(self) -> None:
        """The configuration is told with all its subsections."""
        data = (
            HEADER
            + writer.configuration("pc", page_bits=12, capabilities=["mapped-ram"], uuid=bytes(16))
            + END
        )
        self.assertEqual(
            [Header(0, 3), Configuration(8, "pc", 12, ("mapped-ram",), bytes(16))],
            list(read(data))[:2],
        )

    def test_ends(self) -> None:
        """A footer, or none, is told with the section's end."""
        for footer in (True, False):
            data = HEADER + RAM + writer.ram_setup([RamBlock("a", PAGE)]) + EOS
            events = list(read(data + writer.section_end(2) * footer + END))
            self.assertIn(SectionEnd(len(data), 2, footer), events)
