"""RAM is rebuilt out of events, and a stream is counted."""

from __future__ import annotations

import random
import zlib
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import StreamError
from qmigd.stream import xbzrle
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
from qmigd.stream.format import CommandNumber, MappedHeader, RamBlock, SectionType
from qmigd.stream.ram import RamImage
from qmigd.stream.reader import Reader
from qmigd.stream.strip import Strip
from qmigd.stream.summary import Summary
from qmigd.stream.writer import Writer

PAGE = 1024
PAGES = 16
BLOCK = RamBlock("a", PAGES * PAGE)


def array(numbers: list[int]) -> NDArray[np.uint64]:
    return np.array([number * PAGE for number in numbers], np.uint64)


def image_of(*blocks: RamBlock) -> RamImage:
    image = RamImage(lambda block: bytearray(block.length), PAGE)
    image.take(RamBlocks(0, sum(block.length for block in blocks), blocks))
    return image


class ImageTests(SynchronousTestCase):
    @given(
        st.lists(
            st.tuples(
                st.sampled_from([None, 0, 0, 7]),
                st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=6)
                | st.integers(0, PAGES - 4).map(lambda first: [first, first + 1, first + 2]),
            ),
            max_size=12,
        )
    )
    def test_last_wins(self, writes: list[tuple[int | None, list[int]]]) -> None:
        """The RAM is what came last for each page, in one event as well."""
        image, expected = image_of(BLOCK), bytearray(BLOCK.length)
        for count, (fill, numbers) in enumerate(writes, 1):
            if fill is None:
                data = np.arange(len(numbers), dtype=np.uint8)[:, None] * np.full(PAGE, 9, np.uint8)
                data += np.uint8(count)
                image.take(Pages(0, "a", array(numbers), data))
                rows = [row.tobytes() for row in data]
            else:
                image.take(Zeros(0, "a", array(numbers), fill))
                rows = [bytes([fill]) * PAGE for _ in numbers]
            for number, row in zip(numbers, rows, strict=True):
                expected[number * PAGE : (number + 1) * PAGE] = row
        self.assertEqual(expected, image.blocks["a"])

    def test_elsewhere(self) -> None:
        """What there is no RAM for is refused."""
        image = image_of(BLOCK)
        one = np.zeros((1, PAGE), np.uint8)
        for event in (
            Pages(5, "b", array([0]), one),
            Pages(5, "a", array([PAGES]), one),
            Zeros(5, "a", array([PAGES])),
            Xbzrle(5, "a", PAGES * PAGE, b""),
            Compressed(5, "b", 0, b""),
        ):
            with self.assertRaises(StreamError) as caught:
                image.take(event)
            self.assertEqual(5, caught.exception.offset)

    def test_compressed(self) -> None:
        """A compressed page is what it was, or refused; however large it would become."""
        image = image_of(BLOCK)
        page = bytes(range(256)) * (PAGE // 256)
        image.take(Compressed(0, "a", PAGE, zlib.compress(page)))
        self.assertEqual(page, image.blocks["a"][PAGE : 2 * PAGE])
        for bad in (b"nonsense", zlib.compress(page)[:-6], zlib.compress(bytes(1 << 20)), b""):
            self.assertRaises(StreamError, image.take, Compressed(0, "a", 0, bad))

    @settings(deadline=None)
    @given(
        st.lists(st.booleans(), min_size=PAGES, max_size=PAGES),
        st.lists(st.integers(0, PAGES * PAGE), max_size=5),
    )
    def test_mapped(self, present: list[bool], cuts: list[int]) -> None:
        """Of mapped-ram, what the bitmap has is taken, and nothing else, in whatever pieces."""
        image = RamImage(lambda block: bytearray(block.length), PAGE)
        image.take(MappedBlock(0, RamBlock("a", BLOCK.length, mapped=MappedHeader(PAGE, 0, 8)), 9))
        image.take(Bitmap(0, "a", 0, memoryview(np.packbits(present, bitorder="little").data)))
        data = random.Random(3).randbytes(BLOCK.length)
        places = [0, *sorted(cuts), BLOCK.length]
        for start, end in pairwise(places):
            image.take(MappedPages(0, "a", start, memoryview(data)[start:end]))
        for number, there in enumerate(present):
            page = slice(number * PAGE, (number + 1) * PAGE)
            self.assertEqual(data[page] if there else bytes(PAGE), image.blocks["a"][page])


class XbzrleTests(SynchronousTestCase):
    @given(st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=9)), max_size=4))
    def test_applied(self, runs: list[tuple[int, bytes]]) -> None:
        """What is the same stays, and what is other comes, with numbers of one and two bytes."""
        before = random.Random(1).randbytes(2048)
        data, expected, at = b"", bytearray(before), 0
        for same, other in runs:
            data += bytes([same & 127 | 128, same >> 7] if same > 127 else [same])
            data += bytes([len(other)]) + other
            expected[at + same : at + same + len(other)] = other
            at += same + len(other)
        page = bytearray(before)
        xbzrle.apply(memoryview(page), data, 0)
        self.assertEqual(expected, page)

    @given(st.binary(max_size=20))
    def test_garbage(self, data: bytes) -> None:
        """Anything else is refused, and changes nothing beyond the page."""
        page = bytearray(64)
        try:
            xbzrle.apply(memoryview(page), data, 7)
        except StreamError as error:
            self.assertGreaterEqual(error.offset, 7)
        self.assertEqual(64, len(page))

    def test_refused(self) -> None:
        """Each way to be wrong."""
        for data in (
            b"\0",
            b"\0\0",
            b"\0\5ab",
            b"\x40\1a",
            b"\x80",
            b"\x80\x80\1",
            b"\0\x41" + b"a" * 65,
        ):
            with self.assertRaises(StreamError, msg=data.hex()):
                xbzrle.apply(memoryview(bytearray(64)), data, 0)


class SummaryTests(SynchronousTestCase):
    def summed(self, *events: Event) -> Summary:
        """Write events, read them, and count what was read."""
        write = Writer(PAGE).write
        data = b"".join(bytes(part) for event in events for part in write(event))
        reader, summary = Reader(), Summary()
        for at in range(0, len(data), 700):
            for event in reader.feed(data[at : at + 700]):
                summary.page_size = reader.page_size
                summary.take(event)
        for event in reader.close():
            summary.take(event)
        summary.finish(reader.position)
        self.assertEqual(len(data), summary.position)
        self.assertEqual(len(data), sum(summary.kinds.values()))
        self.assertEqual(len(data), sum(sum(bucket.values()) for bucket in summary.strip.buckets))
        return summary

    def ram(self, kind: SectionType, *events: Event) -> list[Event]:
        return [SectionStart(0, kind, 2, "ram", 0, 4), *events, SectionEnd(0, 2)]

    def test_all(self) -> None:
        """Pages, passes, sections and commands are counted, and every byte has its kind."""
        one = np.ones((3, PAGE), np.uint8)
        one[1] = 0
        package: list[Event] = [
            Command(0, CommandNumber.POSTCOPY_LISTEN, b""),
            SectionStart(0, SectionType.FULL, 7, "dev", 1, 3),
            DeviceData(0, 7, b"hello"),
            SectionEnd(0, 7),
        ]
        write = Writer(PAGE).write
        size = sum(len(part) for event in package for part in write(event))
        summary = self.summed(
            Header(0, 3),
            Configuration(0, "pc", 10),
            Command(0, CommandNumber.OPEN_RETURN_PATH, b""),
            *self.ram(
                SectionType.START,
                RamBlocks(0, 2 * BLOCK.length, (BLOCK, RamBlock("b", BLOCK.length))),
            ),
            *self.ram(
                SectionType.PART,
                Pages(0, "a", array([0, 1, 2]), one),
                Zeros(0, "a", array([5, 6])),
                Zeros(0, "b", array([0, 1])),
                Pages(0, "a", array([1]), one[:1]),
                Xbzrle(0, "a", 2 * PAGE, b"abc"),
                Pages(0, "b", array([3, 2]), one[:2]),
                MultifdFlush(0),
            ),
            Package(0, size),
            *package,
            PackageEnd(0),
            *self.ram(SectionType.END, Zeros(0, "a", array([9, 8, 7]))),
            End(0),
        )
        self.assertEqual({"normal": 4, "zero": 5, "xbzrle": 1}, summary.blocks["a"].pages)
        self.assertEqual({"normal": 2, "zero": 2}, summary.blocks["b"].pages)
        self.assertEqual((1, 1), (summary.blocks["a"].blank, summary.blocks["b"].blank))
        self.assertEqual(
            [{"normal": 3, "zero": 4}, {"normal": 2, "xbzrle": 1}, {"normal": 1}],
            [dict(one.pages) for one in summary.passes],
        )
        self.assertEqual({"zero": 3}, summary.postcopy)
        self.assertEqual(size, summary.package)
        self.assertEqual([("ram", 0), ("dev", 1)], list(summary.sections))
        device = summary.sections["dev", 1]
        self.assertEqual((b"hello", 1, 3, True), (
            device.data, device.parts, device.version, device.full
        ))  # fmt: skip
        self.assertEqual(5 + 4 + 8 + 5 + 5, device.size)
        self.assertEqual(3, summary.sections["ram", 0].parts)
        self.assertEqual(["return-path", "xbzrle", "multifd"], summary.capabilities())
        self.assertEqual(6 * (PAGE + 8), summary.kinds["normal"])
        self.assertEqual(7 * 9, summary.kinds["zero"])
        self.assertEqual(device.size, summary.kinds["device"])
        self.assertTrue(summary.ended)

    def test_description(self) -> None:
        """The description is kept, and counted by itself."""
        summary = self.summed(Header(0, 3), Configuration(0, "pc"), End(0), Description(0, b"{}"))
        self.assertEqual((b"{}", 7), (summary.description, summary.kinds["description"]))

    def test_bounded(self) -> None:
        """Whatever there is many of, the summary does not become large."""
        summary = Summary()
        summary.take(RamBlocks(0, BLOCK.length, (BLOCK,)))
        at = 0
        for number in range(3000):
            summary.take(SectionStart(at, SectionType.FULL, number, f"d{number}", 0, 1))
            summary.take(DeviceData(at + 10, number, bytes(5000)))
            summary.take(SectionEnd(at + 5010, number))
            summary.take(Zeros(at + 5015, "a", array([3])))
            at += 5030
        self.assertEqual((1000, 2000), (len(summary.sections), summary.more_sections))
        self.assertEqual((1000, 2000), (len(summary.passes), summary.more_passes))
        kept = sum(len(section.data or b"") for section in summary.sections.values())
        self.assertLessEqual(kept, 3 << 20)
        self.assertLessEqual(len(summary.strip.buckets), 512)
        self.assertEqual(at - 6, sum(sum(one.values()) for one in summary.strip))

    def test_large_device(self) -> None:
        """A section that is too large is counted, and its contents are not kept."""
        summary = Summary()
        summary.take(SectionStart(0, SectionType.FULL, 1, "big", 0, 1))
        for piece in range(20):
            summary.take(DeviceData(20 + piece * 65536, 1, bytes(65536)))
        summary.take(SectionEnd(20 + 20 * 65536, 1))
        self.assertIsNone(summary.sections["big", 0].data)
        self.assertEqual(25 + 20 * 65536, summary.sections["big", 0].size)


class StripTests(SynchronousTestCase):
    @given(st.lists(st.tuples(st.integers(1, 1 << 24), st.sampled_from("xyz")), max_size=30))
    def test_everything_is_there(self, parts: list[tuple[int, str]]) -> None:
        """However long it becomes, no byte is lost, and each bucket has no more than its width."""
        strip, at = Strip(50), 50
        for size, kind in parts:
            strip.add(at, size, kind)
            at += size
        for kind in "xyz":
            self.assertEqual(
                sum(size for size, one in parts if one == kind),
                sum(bucket.get(kind, 0) for bucket in strip),
            )
        self.assertLessEqual(len(strip.buckets), 512)
        for bucket in strip.buckets[:-1]:
            self.assertEqual(strip.width, sum(bucket.values()))
