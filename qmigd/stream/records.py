"""The records of RAM, many at a time, for the writer.

::

    page        offset | PAGE                 u64  [name]  the page
    zero page   offset | ZERO                 u64  [name]  one byte, which fills it
    xbzrle      offset | XBZRLE               u64  [name]  1:u8 length:u16 the difference
    compressed  offset | COMPRESS_PAGE        u64  [name]  length:u32 zlib
    flush       MULTIFD_FLUSH                 u64
    hook        HOOK                          u64
    end         EOS                           u64

A record with CONTINUE in its flags has no name: its block is that of the record before, be that in
another section; :class:`RamWriter` sees to it.  Each channel that has such records (the main one,
that of ``postcopy-preempt``) counts for itself.

Source: migration/ram.c and ram.h of QEMU.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmigd.stream.format import DEFAULT_PAGE_SIZE, ENCODING_FLAG_XBZRLE, RamFlag
from qmigd.stream.names import counted
from qmigd.stream.pieces import Buffer

__all__ = ["END_OF_SECTION", "HOOK", "MULTIFD_FLUSH", "RamWriter", "ram_of", "view_of"]

_U64: Final = struct.Struct(">Q")

#: What each section of RAM ends with.
END_OF_SECTION: Final = _U64.pack(RamFlag.EOS)

#: What tells the destination to wait for all multifd channels.
MULTIFD_FLUSH: Final = _U64.pack(RamFlag.MULTIFD_FLUSH)

#: A mark for RDMA.
HOOK: Final = _U64.pack(RamFlag.HOOK)

#: Bytes of a record before its page, without a name.
_HEAD: Final = 8

#: Pages that are gathered at one time, so that they are in the CPU's cache between two copies.
_GATHERED: Final = 64

#: With so many pages in a row, copying row by row is faster than gathering.
_LONG: Final = 8


def ram_of(ram: Buffer, page_size: int = DEFAULT_PAGE_SIZE) -> NDArray[np.uint8]:
    """Return a block's RAM with a row for each page; nothing is copied.

    :raises ValueError: it is no whole number of pages.
    """
    return np.frombuffer(ram, np.uint8).reshape(-1, page_size)


class RamWriter:
    """Makes the records that go through one channel, one after the other.

    :ivar block: what a record without a name refers to; empty at the beginning.
    """

    def __init__(self, page_size: int = DEFAULT_PAGE_SIZE) -> None:
        """:param page_size: the target's, in bytes."""
        self.block = ""
        self._page_size = page_size
        self._record = np.dtype([("head", ">u8"), ("page", f"V{page_size}")])

    def pages(
        self,
        block: str,
        offsets: ArrayLike,
        data: NDArray[np.uint8],
        *,
        named: bool | None = None,
        out: NDArray[np.uint8] | None = None,
    ) -> list[Buffer]:
        """Return the records of pages.

        :param offsets: of the pages in their block, bytes.
        :param data: a row for each page.
        :param named: whether the first one names the block; left out: if it has to.
        :param out: see :meth:`pages_of`.
        """
        places, parts, rest = self._begin(block, offsets, RamFlag.PAGE, named)
        if rest:
            parts.append(view_of(data[0]))
        if len(places) > rest:
            records, view = self._records(places[rest:], out)
            records["page"] = self._whole(data[rest:])
            parts.append(view)
        return parts

    def pages_of(
        self,
        block: str,
        offsets: ArrayLike,
        ram: NDArray[np.uint8],
        *,
        out: NDArray[np.uint8] | None = None,
    ) -> list[Buffer]:
        """Return the records of pages, which are copied out of RAM.

        :param offsets: of the pages in the block, bytes; fastest in ascending order.
        :param ram: all of the block (:func:`ram_of`).
        :param out: where the records are put if they fit: ``page size + 8`` bytes for each.
            What is returned is good until the next use of it.  New memory is not free of charge.
        """
        places, parts, rest = self._begin(block, offsets, RamFlag.PAGE, None)
        numbers = np.asarray(offsets, np.int64) // self._page_size
        if rest:
            parts.append(bytes(ram[numbers[0]]))
        if len(places) > rest:
            records, view = self._records(places[rest:], out)
            _gather(self._whole(ram), numbers[rest:], records["page"])
            parts.append(view)
        return parts

    def heads(self, block: str, offsets: ArrayLike) -> tuple[list[Buffer], NDArray[np.uint64]]:
        """Return what goes in front of each page, for who sends the pages from where they are.

        :param offsets: of the pages in the block, bytes.
        :returns: the first head where it names the block, and the others, ``>u8``.
        """
        places, first, rest = self._begin(block, offsets, RamFlag.PAGE, None)
        return first, places[rest:]

    def zeros(
        self, block: str, offsets: ArrayLike, fill: int = 0, *, named: bool | None = None
    ) -> list[Buffer]:
        """Return the records of pages that consist of one byte.

        :param fill: that byte.  QEMU today has 0 here and nothing else.
        :param named: see :meth:`pages`.
        """
        places, parts, rest = self._begin(block, offsets, RamFlag.ZERO, named)
        if rest:
            parts.append(bytes([fill]))
        if len(places) > rest:
            records = np.empty((len(places) - rest, _HEAD + 1), np.uint8)
            records[:, :_HEAD] = places[rest:].view(np.uint8).reshape(-1, _HEAD)
            records[:, _HEAD] = fill
            parts.append(view_of(records))
        return parts

    def xbzrle(self, block: str, page: int, data: Buffer, *, named: bool | None = None) -> bytes:
        """Return the record of a page as its difference to what it was before.

        :param page: its offset in the block, bytes.
        """
        _, parts, _ = self._begin(block, [page], RamFlag.XBZRLE, named)
        if not parts:
            parts = [_U64.pack(page | RamFlag.XBZRLE | RamFlag.CONTINUE)]
        return b"".join((*parts, struct.pack(">BH", ENCODING_FLAG_XBZRLE, len(data)), data))

    def compressed(
        self, block: str, page: int, data: Buffer, *, named: bool | None = None
    ) -> bytes:
        """Return the record of a page as QEMU up to 9.0 compresses it.

        :param page: its offset in the block, bytes.
        """
        _, parts, _ = self._begin(block, [page], RamFlag.COMPRESS_PAGE, named)
        if not parts:
            parts = [_U64.pack(page | RamFlag.COMPRESS_PAGE | RamFlag.CONTINUE)]
        return b"".join((*parts, struct.pack(">I", len(data)), data))

    def _begin(
        self, block: str, offsets: ArrayLike, flag: RamFlag, named: bool | None
    ) -> tuple[NDArray[np.uint64], list[Buffer], int]:
        """Return what stands at the front of each record, and the first one's if it has a name.

        :returns: big-endian; the first one's head, if it is apart; how many are apart, 0 or 1.
        """
        places = np.asarray(offsets, np.uint64) | np.uint64(flag)
        if not len(places):
            return places, [], 0
        if named is None:
            named = block != self.block
        self.block = block
        first: list[Buffer] = [_U64.pack(int(places[0])) + counted(block)] if named else []
        places |= np.uint64(RamFlag.CONTINUE)
        return places.astype(">u8"), first, len(first)

    def _records(
        self, places: NDArray[np.uint64], out: NDArray[np.uint8] | None
    ) -> tuple[NDArray[np.void], memoryview]:
        """Return records whose pages are missing, and a view of all of their bytes."""
        size = self._record.itemsize * len(places)
        if out is None or out.size < size:
            out = np.empty(size, np.uint8)
        out = out[:size]
        records = out.view(self._record)
        records["head"] = places
        return records, view_of(out)

    def _whole(self, rows: NDArray[np.uint8]) -> NDArray[np.void]:
        """Return pages as one item each, which are copied twice as fast as rows of bytes."""
        return rows.view(self._record["page"])[:, 0]


def _gather(ram: NDArray[np.void], numbers: NDArray[np.int64], records: NDArray[np.void]) -> None:
    """Copy pages out of RAM, neighbours together where there are many."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    if len(numbers) < _LONG * (len(breaks) + 1):
        for start in range(0, len(numbers), _GATHERED):
            part = numbers[start : start + _GATHERED]
            records[start : start + len(part)] = ram[part]
        return
    edges = [0, *breaks.tolist(), len(numbers)]
    for start, end in pairwise(edges):
        first = int(numbers[start])
        records[start:end] = ram[first : first + end - start]


def view_of(data: NDArray[np.uint8]) -> memoryview:
    """Return an array's bytes; they are copied only where they are apart."""
    # An array is a buffer, which the types of some versions of numpy do not say.
    flat = np.ascontiguousarray(data).reshape(-1)
    return memoryview(flat)  # type: ignore[arg-type, unused-ignore]
