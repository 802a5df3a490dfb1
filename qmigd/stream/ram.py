"""Rebuilds a guest's RAM out of a stream's events.

Offers :class:`RamImage`, which takes events and keeps the RAM as it is at that point (for those of
several channels see ``joining``).  Where the RAM goes is the caller's: for each block it is asked
for something that can be written to, an array of bytes, or a map of a file or of a memfd.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qmigd.errors import StreamError
from qmigd.stream import xbzrle
from qmigd.stream.events import (
    Bitmap,
    Compressed,
    Event,
    MappedBlock,
    MappedPages,
    Pages,
    RamBlocks,
    Xbzrle,
    Zeros,
)
from qmigd.stream.format import DEFAULT_PAGE_SIZE, RamBlock
from qmigd.stream.pages import zero_pages

__all__ = ["Allocate", "RamImage"]

#: Makes the place for a block: as long as that, and all zeros.  It may refuse, by a StreamError or
#: any error of its own, a length that it does not believe.
Allocate: TypeAlias = Callable[[RamBlock], "bytearray | memoryview"]

#: Pages that are looked at together for whether they are zero already.
_AT_ONCE = 256


class RamImage:
    """The RAM of a guest, as far as a stream has come.

    :ivar blocks: the blocks' contents by their names.
    """

    def __init__(self, allocate: Allocate, page_size: int = DEFAULT_PAGE_SIZE) -> None:
        """:param page_size: the target's, :attr:`Reader.page_size` once RamBlocks has come."""
        self.blocks: dict[str, memoryview] = {}
        self._allocate = allocate
        self._page_size = page_size
        self._pages: dict[str, NDArray[np.uint8]] = {}
        self._bitmaps: dict[str, bytearray] = {}

    def take(self, event: Event) -> None:
        """Take an event in; those that are not about RAM do nothing.

        :raises StreamError: it refers to RAM that there is not, or makes no sense.
        """
        match event:
            case Pages():
                self._set(event, event.offsets, event.data)
            case Zeros():
                self._fill(event)
            case Xbzrle():
                xbzrle.apply(self._page(event), event.data, event.at)
            case Compressed():
                self._inflate(event)
            case RamBlocks():
                for block in event.blocks:
                    if block.mapped is None or block.name not in self.blocks:
                        self._add(block)
            case MappedBlock():
                self._add(event.block)
                self._bitmaps[event.block.name] = bytearray()
            case Bitmap():
                self._bitmaps[event.block] += event.data
            case MappedPages():
                self._mapped(event)
            case _:
                pass

    def _add(self, block: RamBlock) -> None:
        view = memoryview(self._allocate(block)).cast("B")
        whole = block.length // self._page_size * self._page_size
        self.blocks[block.name] = view
        array = np.frombuffer(view, np.uint8, whole)
        self._pages[block.name] = array.reshape(-1, self._page_size)

    def _rows(self, event: Pages | Zeros | Xbzrle | Compressed) -> NDArray[np.uint8]:
        rows = self._pages.get(event.block)
        if rows is None:
            raise StreamError(event.at, "a block of RAM that the setup has", repr(event.block))
        return rows

    def _numbers(self, event: Pages | Zeros, rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
        """Return which rows an event is about."""
        numbers = event.offsets // np.uint64(self._page_size)
        if (numbers >= len(rows)).any():
            raise StreamError(event.at, f"pages within {event.block!r}", "one beyond its end")
        return numbers

    def _set(self, event: Pages, offsets: NDArray[np.uint64], data: NDArray[np.uint8]) -> None:
        rows = self._rows(event)
        numbers = self._numbers(event, rows)
        first, count = int(numbers[0]), len(numbers)
        if int(numbers[-1]) - first == count - 1 and (np.diff(numbers) == 1).all():
            rows[first : first + count] = data
        else:
            # one at a time where a page comes twice: the last one counts
            unique = len(np.unique(numbers)) == count
            if unique:
                rows[numbers] = data
            else:
                for number, page in zip(numbers, data, strict=True):
                    rows[number] = page

    def _fill(self, event: Zeros) -> None:
        rows = self._rows(event)
        numbers = self._numbers(event, rows)
        for start in range(0, len(numbers), _AT_ONCE):
            some = numbers[start : start + _AT_ONCE]
            if not event.fill:
                # what is zero is not written to: it may not have any memory yet
                some = some[~zero_pages(rows[some])]
            rows[some] = event.fill

    def _page(self, event: Xbzrle | Compressed) -> memoryview:
        rows = self._rows(event)
        number = event.page // self._page_size
        if number >= len(rows):
            raise StreamError(event.at, f"a page within {event.block!r}", f"{event.page:#x}")
        return memoryview(rows[number])

    def _inflate(self, event: Compressed) -> None:
        page = self._page(event)
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(event.data, len(page) + 1)
        except zlib.error as error:
            raise StreamError(event.at, "a page compressed with zlib", str(error)) from None
        if len(data) != len(page) or not inflate.eof:
            raise StreamError(event.at, f"{len(page)} compressed bytes", f"{len(data)}")
        page[:] = data

    def _mapped(self, event: MappedPages) -> None:
        rows = self._pages[event.block]
        flat = rows.reshape(-1)
        data = np.frombuffer(event.data, np.uint8)
        size = self._page_size
        bitmap = np.frombuffer(self._bitmaps[event.block], np.uint8)
        start, end = event.start, min(event.start + len(data), len(flat))
        while start < end:
            number, within = divmod(start, size)
            if within or end - start < size:
                count = min(size - within, end - start)
                if bitmap[number >> 3] >> (number & 7) & 1:
                    flat[start : start + count] = data[:count]
            else:
                pages = (end - start) // size
                count = pages * size
                some = bitmap[number >> 3 : (number + pages + 7 >> 3)]
                bits = np.unpackbits(some, bitorder="little")[number & 7 :][:pages] != 0
                there = data[:count].reshape(-1, size)
                if bits.all():
                    rows[number : number + pages] = there
                else:
                    rows[number : number + pages][bits] = there[bits]
            start += count
            data = data[count:]
