"""Files with ``mapped-ram``: each page of RAM has a place of its own, both ways.

The file is a stream whose setup of RAM has gaps, and whose other sections of RAM are empty::

    block's part of the setup    name length:u64 [page size:u64] [address:u64]
    header, behind it            version:u32  page size:u64  bitmap's place:u64  pages' place:u64
    bitmap, behind that          a bit for each page; whole longs, of 8 bytes
    nothing                      up to the next MiB
    pages                        as in RAM; a hole where one is zero
    the next block's part, or what follows the setup

The version is 1.  Places are offsets in the file, whatever is in front of QEMU's part.  The header
is big-endian.  The bitmap is an array of longs as the host has them, which in practice
is little-endian: the lowest bit of its first byte is the first page.  A page whose bit is 0 is
zero, whatever is in its place: it may have been written before it became so.  A block whose RAM
is shared, with ``x-ignore-shared``, has a header with two zeros and no place (QEMU 11).

:class:`MappedWriter` says what has to be written where, in which order does not matter;
:func:`extents` says what has to be read from where.

Source: migration/ram.c of QEMU (mapped_ram_setup_ramblock(), ram_save_file_bmap()).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmigd.errors import StreamError
from qmigd.stream.format import (
    DEFAULT_PAGE_SIZE,
    MAPPED_HEADER,
    MappedHeader,
    RamBlock,
    RamFlag,
)
from qmigd.stream.pieces import Buffer
from qmigd.stream.records import view_of
from qmigd.stream.writer import ram_block

__all__ = [
    "ALIGNMENT",
    "MappedWriter",
    "Placed",
    "bitmap_size",
    "encode_bitmap",
    "extents",
    "header_at",
    "read_bitmap",
]

#: MAPPED_RAM_FILE_OFFSET_ALIGNMENT: pages begin at a multiple of it.
ALIGNMENT: Final = 1 << 20

#: Bits in a long of the bitmap.
_LONG: Final = 64

#: Where in the file, and what.
Placed: TypeAlias = tuple[int, Buffer]


def bitmap_size(length: int, page_size: int = DEFAULT_PAGE_SIZE) -> int:
    """Return the bytes of the bitmap of a block of ``length`` bytes."""
    return -(-(length // page_size) // _LONG) * (_LONG // 8)


def encode_bitmap(present: NDArray[np.bool_]) -> bytes:
    """Return the bitmap for a block's pages: True is in the file."""
    bits = np.packbits(present, bitorder="little").tobytes()
    return bits.ljust(-(-len(present) // _LONG) * (_LONG // 8), b"\0")


def read_bitmap(data: Buffer, pages: int, at: int = 0) -> NDArray[np.bool_]:
    """Return which pages are in the file.

    :param pages: of the block.
    :param at: where ``data`` is, for the error.
    :raises StreamError: it is too short.
    """
    if len(data) * 8 < pages:
        raise StreamError(at, f"a bitmap for {pages} pages", f"{len(data)} bytes")
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=pages, bitorder="little")
    return bits.view(np.bool_)


def header_at(position: int, length: int, page_size: int = DEFAULT_PAGE_SIZE) -> MappedHeader:
    """Return the header that QEMU would write.

    :param position: where in the file it is itself.
    :param length: of the block, bytes.
    """
    bitmap = position + MAPPED_HEADER.size
    pages = -(-(bitmap + bitmap_size(length, page_size)) // ALIGNMENT) * ALIGNMENT
    return MappedHeader(page_size, bitmap, pages)


def extents(
    header: MappedHeader, present: NDArray[np.bool_], most: int = 1 << 20
) -> Iterator[tuple[int, int, int]]:
    """Yield what has to be read: where in the file, where in the block, and how many bytes.

    :param present: from the bitmap.
    :param most: bytes at one time, at least a page.
    """
    edges = np.flatnonzero(np.diff(present, prepend=False, append=False)).reshape(-1, 2)
    size = header.page_size
    most = max(most - most % size, size)
    for first, last in (edges * size).tolist():
        for start in range(first, last, most):
            yield header.pages_offset + start, start, min(most, last - start)


class MappedWriter:
    """Says what a file with ``mapped-ram`` has where.

    :ivar position: where the stream goes on behind the setup.
    :ivar blocks: the blocks of RAM, with their headers.
    """

    def __init__(self, page_size: int = DEFAULT_PAGE_SIZE) -> None:
        """:param page_size: the target's, in bytes."""
        self.position = 0
        self.blocks: tuple[RamBlock, ...] = ()
        self._page_size = page_size
        self._headers: dict[str, MappedHeader] = {}
        self._present: dict[str, NDArray[np.bool_]] = {}

    def setup(
        self, position: int, blocks: Iterable[RamBlock], total: int | None = None
    ) -> list[Placed]:
        """Lay out the setup, which has no EOS yet.

        :param position: where in the file it begins.
        :param blocks: all of them.  Their headers are made anew, but for those whose pages have no
            place: with ``x-ignore-shared`` that is RAM which the other QEMU shares.
        :param total: bytes of all blocks; left out: their sum.
        """
        every = list(blocks)
        if total is None:
            total = sum(block.length for block in every)
        placed: list[Placed] = [(position, struct.pack(">Q", total | RamFlag.MEM_SIZE))]
        position += 8
        for number, block in enumerate(every):
            left_out = block.mapped is not None and not block.mapped.pages_offset
            header = MappedHeader(self._page_size, 0, 0)
            part = ram_block(replace(block, mapped=header))
            if not left_out:
                at = position + len(part) - MAPPED_HEADER.size
                header = header_at(at, block.length, self._page_size)
                part = part[: -MAPPED_HEADER.size] + header.encode()
                self._headers[block.name] = header
                self._present[block.name] = np.zeros(block.length // self._page_size, np.bool_)
            every[number] = replace(block, mapped=header)
            placed.append((position, part))
            position += len(part)
            if not left_out:
                position = header.pages_offset + block.length
        self.position = position
        self.blocks = tuple(every)
        return placed

    def pages(self, block: str, offsets: ArrayLike, data: NDArray[np.uint8]) -> list[Placed]:
        """Place pages, neighbours together, without copying them.

        :param offsets: of the pages in their block, bytes.
        :param data: a row for each page.
        """
        places = np.asarray(offsets, np.int64)
        if not len(places):
            return []
        self._present[block][places // self._page_size] = True
        start = self._headers[block].pages_offset
        breaks = np.flatnonzero(np.diff(places) != self._page_size) + 1
        edges = [0, *breaks.tolist(), len(places)]
        return [
            (start + int(places[first]), view_of(data[first:last]))
            for first, last in pairwise(edges)
        ]

    def zeros(self, block: str, offsets: ArrayLike) -> None:
        """Take in pages that are, or have become, zero: nothing is written for them."""
        self._present[block][np.asarray(offsets, np.int64) // self._page_size] = False

    def bitmaps(self) -> list[Placed]:
        """Place the bitmaps, once all pages are known."""
        return [
            (self._headers[name].bitmap_offset, encode_bitmap(present))
            for name, present in self._present.items()
        ]
