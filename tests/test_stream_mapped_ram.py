"""Files with a place for each page: where everything is, both ways."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import StreamError
from qmigd.stream import writer
from qmigd.stream.events import Bitmap, MappedPages, RamBlocks
from qmigd.stream.format import MAPPED_RAM, MappedHeader, RamBlock, SectionType
from qmigd.stream.mapped_ram import (
    ALIGNMENT,
    MappedWriter,
    Placed,
    bitmap_size,
    encode_bitmap,
    extents,
    header_at,
    read_bitmap,
)
from qmigd.stream.reader import Reader
from qmigd.stream.records import END_OF_SECTION

PAGE = 4096
BLOCKS = (RamBlock("pc.ram", 100 * PAGE), RamBlock("rom", 3 * PAGE))


class Image:
    """A file in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    def put(self, placed: Iterable[Placed]) -> None:
        for position, data in placed:
            self.data.extend(bytes(max(0, position + len(data) - len(self.data))))
            self.data[position : position + len(data)] = data


def rows(pages: list[int]) -> NDArray[np.uint8]:
    """Return pages that are full of their numbers, counted from 1."""
    return np.repeat(np.array([page + 1 for page in pages], np.uint8), PAGE).reshape(-1, PAGE)


class LayoutTests(SynchronousTestCase):
    def test_header(self) -> None:
        """The bitmap is behind the header, the pages at the next MiB behind that."""
        self.assertEqual(header_at(113, 64 << 20), MappedHeader(PAGE, 141, 1 << 20))
        self.assertEqual(
            header_at(113, 64 << 20).encode().hex(),
            "00000001 0000000000001000 000000000000008d 0000000000100000".replace(" ", ""),
        )
        # A bitmap of exactly up to the MiB, and one that is a long larger.
        bits = (ALIGNMENT - 28) // 8 * 64
        self.assertEqual(header_at(4, bits * PAGE).pages_offset, ALIGNMENT)
        self.assertEqual(header_at(4, (bits + 1) * PAGE).pages_offset, 2 * ALIGNMENT)

    def test_bitmap(self) -> None:
        """The lowest bit of the first byte is the first page; it is as long as whole longs."""
        present = np.zeros(66, bool)
        present[[0, 9, 65]] = True
        data = encode_bitmap(present)
        self.assertEqual(data.hex(), "01020000000000000200000000000000")
        self.assertEqual(bitmap_size(66 * PAGE), len(data))
        self.assertEqual(read_bitmap(data, 66).tolist(), present.tolist())
        with self.assertRaisesRegex(StreamError, "a bitmap for 66 pages, found 8 bytes") as caught:
            read_bitmap(data[:8], 66, 500)
        self.assertEqual(caught.exception.offset, 500)

    @given(st.lists(st.booleans(), max_size=200), st.integers(1, 9))
    def test_extents(self, present: list[bool], most: int) -> None:
        """They are the pages in the file, neighbours together up to the size asked for."""
        header = MappedHeader(PAGE, 0, 1 << 20)
        found: list[int] = []
        for place, start, length in extents(header, np.array(present, bool), most * PAGE):
            self.assertEqual(place, (1 << 20) + start)
            self.assertLessEqual(length, most * PAGE)
            found += range(start // PAGE, (start + length) // PAGE)
        self.assertEqual(found, [page for page, there in enumerate(present) if there])


class WriterTests(SynchronousTestCase):
    @settings(deadline=None, max_examples=25)
    @given(
        st.lists(st.lists(st.integers(0, 99), max_size=20, unique=True), max_size=3),
        st.lists(st.integers(0, 99), max_size=10),
        st.integers(0, 2 << 20),
        st.lists(st.integers(0, 4 << 20), max_size=6),
    )
    def test_read_again(
        self, passes: list[list[int]], zeros: list[int], start: int, cuts: list[int]
    ) -> None:
        """A reader finds the pages that were written, wherever QEMU's part begins."""
        file, mapped = Image(), MappedWriter()
        head = [
            writer.header(),
            writer.configuration("pc", capabilities=[MAPPED_RAM]),
            writer.section_start(SectionType.START, 2, "ram", 0, 4),
        ]
        file.put([(start, b"".join(head))])
        file.put(mapped.setup(start + len(b"".join(head)), BLOCKS))
        rest = END_OF_SECTION + writer.section_end(2) + writer.end()
        file.put([(mapped.position, rest)])
        for pages in passes:
            file.put(mapped.pages("pc.ram", [page * PAGE for page in pages], rows(pages)))
        mapped.zeros("pc.ram", [page * PAGE for page in zeros])
        file.put(mapped.bitmaps())

        reader = Reader(start=start)
        bits = {block.name: bytearray(bitmap_size(block.length)) for block in BLOCKS}
        ram = {block.name: bytearray(block.length) for block in BLOCKS}
        data = bytes(file.data[start:])
        places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
        for first, last in pairwise(places):
            for event in reader.feed(data[first:last]):
                if isinstance(event, Bitmap):
                    bits[event.block][event.start : event.start + len(event.data)] = event.data
                elif isinstance(event, MappedPages):
                    ram[event.block][event.start : event.start + len(event.data)] = event.data
                elif isinstance(event, RamBlocks):
                    self.assertEqual(event.blocks, mapped.blocks)
        list(reader.close())
        there = sorted({page for pages in passes for page in pages} - set(zeros))
        present = read_bitmap(bits["pc.ram"], 100)
        self.assertEqual(np.flatnonzero(present).tolist(), there)
        self.assertFalse(read_bitmap(bits["rom"], 3).any())
        for page in there:
            self.assertEqual(bytes(ram["pc.ram"][page * PAGE :][:PAGE]), bytes([page + 1]) * PAGE)

    def test_neighbours_together(self) -> None:
        """Pages one behind the other are one piece, and nothing is copied."""
        mapped = MappedWriter()
        mapped.setup(0, BLOCKS)
        pages = rows([4, 5, 6, 9])
        placed = mapped.pages("pc.ram", [4 * PAGE, 5 * PAGE, 6 * PAGE, 9 * PAGE], pages)
        start = ALIGNMENT
        self.assertEqual(
            [(place, len(data)) for place, data in placed],
            [(start + 4 * PAGE, 3 * PAGE), (start + 9 * PAGE, PAGE)],
        )
        pages[0, 0] = 99
        self.assertEqual(placed[0][1][0], 99)
        self.assertEqual(mapped.pages("pc.ram", [], rows([])), [])
