"""Reads the records of RAM: pages in bulk, by numpy, without a step of Python for each page.

::

    u64 offset of the page | flags   [u8 size, block's name: unless CONTINUE]
        PAGE      the page
        ZERO      u8: the byte that the page consists of
        XBZRLE    u8 ENCODING_FLAG_XBZRLE, u16 size, that many bytes
        COMPRESS  u32 size, that many bytes
    u64 MULTIFD_FLUSH, HOOK, EOS: no page
    u64 total | MEM_SIZE, then the blocks

A run is a row of records of one kind and one block, all with CONTINUE.  They have one size, so
that their heads are looked at as one array with a stride, and the pages as another.  How far a run
goes is found by trying: with few records after a short run, with ever more in a long one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qmigd.errors import StreamError
from qmigd.stream.events import (
    Bitmap,
    Compressed,
    Hook,
    MappedBlock,
    MappedPages,
    MultifdFlush,
    Pages,
    RamBlocks,
    Xbzrle,
    Zeros,
)
from qmigd.stream.format import (
    DEFAULT_PAGE_SIZE,
    ENCODING_FLAG_XBZRLE,
    MAPPED_HEADER,
    MAPPED_VERSION,
    MAX_RAM_BLOCKS,
    MappedHeader,
    RamBlock,
    RamFlag,
)
from qmigd.stream.window import Steps, Window

__all__ = ["Ram", "ram_records", "zero_pages"]

_PAGE: Final = int(RamFlag.PAGE)
_ZERO: Final = int(RamFlag.ZERO)
_CONTINUE: Final = int(RamFlag.CONTINUE)
_KINDS: Final = _PAGE | _ZERO | int(RamFlag.XBZRLE | RamFlag.COMPRESS_PAGE)
_HEAD: Final = 8

#: Records that are looked at together, at first and at most.
_FEW: Final = 8
_MANY: Final = 1 << 15

#: Words of a page that are looked at first to see whether it is zero.
_SAMPLES: Final = 4


@dataclass
class Ram:
    """What a reader knows of the RAM.

    :ivar blocks: the lengths by the names; empty: not known, and then not checked.
    :ivar block: what CONTINUE refers to.
    :ivar page_sizes: those of the memory behind the blocks, a sum of powers of two, as
        POSTCOPY_ADVISE has it; 0: no postcopy.
    """

    page_size: int = DEFAULT_PAGE_SIZE
    blocks: dict[str, int] = field(default_factory=dict)
    block: str = ""
    page_sizes: int = 0
    ignore_shared: bool = False
    mapped: bool = False
    guess: int = _FEW


def zero_pages(pages: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Say which rows are all zeros.

    Most pages that are not have a byte that is not zero in their first word, or in one of a few
    places, so that only what looks like zeros there is looked at as a whole.
    """
    count, size = pages.shape
    result = np.zeros(count, np.bool_)
    step = max(size // _SAMPLES, 1)
    firsts = pages[:, :8].view(np.uint64)[:, 0] if size % 8 == 0 else pages[:, 0]
    candidates = np.flatnonzero(firsts == 0)
    if len(candidates):
        candidates = candidates[~pages[candidates, ::step].any(axis=1)]
    # not many at once: they are copied, to be in one piece
    for start in range(0, len(candidates), 64):
        some = candidates[start : start + 64]
        rows = pages[some]
        words = rows.view(np.uint64) if size % 8 == 0 else rows
        result[some] = np.bitwise_or.reduce(words, axis=1) == 0
    return result


def ram_records(window: Window, ram: Ram) -> Steps[None]:
    """Read records up to and with EOS."""
    mask = ram.page_size - 1
    while True:
        at = window.position
        yield from window.need(_HEAD, "a record of RAM")
        head = int.from_bytes(window.look(_HEAD), "big")
        flags = head & mask
        kind = flags & _KINDS
        if kind and flags & ~_CONTINUE == kind and not kind & (kind - 1):
            if not flags & _CONTINUE:
                window.take(_HEAD)
                ram.block = yield from _name(window, ram)
                yield from _one(window, ram, at, head - flags, kind, named=True)
            elif not ram.block:
                raise StreamError(
                    at, "the name of a block of RAM", "a page that continues one, and none before"
                )
            elif kind == _PAGE:
                yield from _pages(window, ram)
            elif kind == _ZERO:
                yield from _zeros(window, ram)
            else:
                window.take(_HEAD)
                yield from _one(window, ram, at, head - flags, kind, named=False)
            continue
        window.take(_HEAD)
        if flags == RamFlag.EOS:
            return
        if flags == RamFlag.MULTIFD_FLUSH:
            yield MultifdFlush(at)
        elif flags == RamFlag.HOOK:
            yield Hook(at)
        elif flags == RamFlag.MEM_SIZE:
            yield from _setup(window, ram, at, head - flags)
        else:
            raise StreamError(at, "a record of RAM", f"{head:#x}, whose flags are {_flags(flags)}")


def _pages(window: Window, ram: Ram) -> Steps[None]:
    """Read a run of pages, at least one."""
    size = _HEAD + ram.page_size
    yield from window.need(size, "a page of RAM")
    at = window.position
    offsets = _run(window, ram, size, _PAGE | _CONTINUE)
    data = np.ndarray(
        (len(offsets), ram.page_size), np.uint8, window.view, window.index + _HEAD, (size, 1)
    )
    window.index += size * len(offsets)
    yield Pages(at, ram.block, offsets, data)


def _zeros(window: Window, ram: Ram) -> Steps[None]:
    """Read a run of pages that consist of the same byte, at least one."""
    size = _HEAD + 1
    yield from window.need(size, "a page of zeros")
    at = window.position
    offsets = _run(window, ram, size, _ZERO | _CONTINUE)
    fill = window.view[window.index + _HEAD]
    if len(offsets) > 1:
        fills = np.ndarray((len(offsets),), np.uint8, window.view, window.index + _HEAD, (size,))
        other = fills != fill
        if other.any():
            offsets = offsets[: int(other.argmax())]
    window.index += size * len(offsets)
    yield Zeros(at, ram.block, offsets, fill)


def _run(window: Window, ram: Ram, size: int, wanted: int) -> NDArray[np.uint64]:
    """Look how many of the records at hand, the first one being, are of the same kind.

    :param size: of a record, bytes.
    :returns: the offsets of their pages.
    """
    mask = ram.page_size - 1
    count = min(window.available // size, ram.guess)
    if count == 1 or window.flags(size, mask) != wanted:
        # alone: what arrays cost is worth it for more than one
        head = int.from_bytes(window.look(_HEAD), "big")
        if count > 1:
            ram.guess = _FEW
        _check_place(ram, window.position, head - wanted)
        return np.array([head - wanted], np.uint64)
    heads = np.ndarray((count,), ">u8", window.view, window.index, (size,)).astype(np.uint64)
    other = (heads & np.uint64(mask)) != wanted
    if other.any():
        heads = heads[: int(other.argmax())]
        ram.guess = max(_FEW, len(heads))
    elif count == ram.guess:
        ram.guess = min(2 * count, _MANY)
    offsets = heads - np.uint64(wanted)
    length = ram.blocks.get(ram.block)
    if length is not None and int(offsets.max()) + ram.page_size > length:
        last = length - ram.page_size
        first = int((offsets > np.uint64(last)).argmax()) if last >= 0 else 0
        if not first:
            _check_place(ram, window.position, int(offsets[0]))
        offsets = offsets[:first]  # what is in front of it is good
    return offsets


def _check_place(ram: Ram, at: int, page: int) -> None:
    """Refuse a page that is not in its block."""
    length = ram.blocks.get(ram.block)
    if length is not None and page + ram.page_size > length:
        raise StreamError(
            at, f"a page within the {length:#x} bytes of {ram.block!r}", f"one at {page:#x}"
        )


def _one(window: Window, ram: Ram, at: int, page: int, kind: int, *, named: bool) -> Steps[None]:
    """Read what is behind the head, and the name, of a single record."""
    _check_place(ram, at, page)
    if kind == _PAGE:
        yield from window.need(ram.page_size, "a page of RAM")
        data = np.ndarray((1, ram.page_size), np.uint8, window.view, window.index)
        window.index += ram.page_size
        yield Pages(at, ram.block, np.array([page], np.uint64), data, named)
    elif kind == _ZERO:
        fill = yield from window.integer(1, "the byte that a page consists of")
        yield Zeros(at, ram.block, np.array([page], np.uint64), fill, named)
    elif kind == RamFlag.XBZRLE:
        where = window.position
        encoding = yield from window.integer(1, "the encoding of a page")
        if encoding != ENCODING_FLAG_XBZRLE:
            raise StreamError(where, "the encoding XBZRLE, 1", str(encoding))
        size = yield from window.integer(2, "the size of an encoded page")
        if size > ram.page_size:
            raise StreamError(
                where + 1, f"at most {ram.page_size} bytes for an encoded page", f"{size}"
            )
        encoded = yield from window.bytes(size, "an encoded page")
        yield Xbzrle(at, ram.block, page, encoded, named)
    else:
        where = window.position
        size = yield from window.integer(4, "the size of a compressed page")
        # zlib's compressBound() of a page, and a little
        if size > ram.page_size + (ram.page_size >> 3) + 64:
            raise StreamError(where, "the size of a compressed page", f"{size}")
        encoded = yield from window.bytes(size, "a compressed page")
        yield Compressed(at, ram.block, page, encoded, named)


def _name(window: Window, ram: Ram) -> Steps[str]:
    at = window.position
    name = yield from window.string("the name of a block of RAM")
    if ram.blocks and name not in ram.blocks:
        raise StreamError(at, "a block of RAM that the setup has", repr(name))
    return name


def _setup(window: Window, ram: Ram, at: int, total: int) -> Steps[None]:
    """Read the blocks; with ``mapped-ram`` their bitmaps and pages as well."""
    blocks: list[RamBlock] = []
    lengths: dict[str, int] = {}
    left = total
    while left:
        where = window.position
        if len(blocks) == MAX_RAM_BLOCKS:
            raise StreamError(where, f"at most {MAX_RAM_BLOCKS} blocks of RAM", "another one")
        name = yield from window.string("the name of a block of RAM")
        length = yield from window.integer(8, f"the length of {name!r}")
        if name in lengths:
            raise StreamError(where, "another block of RAM", f"{name!r} for a second time")
        if length > left:
            raise StreamError(
                where, f"a block of at most the {left:#x} bytes that are left", f"{length:#x}"
            )
        page_size = yield from _page_size(window, ram)
        address = None
        if ram.ignore_shared:
            address = yield from window.integer(8, f"the address of {name!r}")
        mapped = None
        if ram.mapped:
            mapped = yield from _mapped_header(window, ram, name)
        block = RamBlock(name, length, page_size, address, mapped)
        blocks.append(block)
        lengths[name] = length
        left -= length
        if mapped is not None and not (ram.ignore_shared and not mapped.pages_offset):
            yield from _mapped(window, ram, where, block, mapped)
    ram.blocks = lengths
    yield RamBlocks(at, total, tuple(blocks))


def _page_size(window: Window, ram: Ram) -> Steps[int | None]:
    """Read the page size of a block's memory, which is there with postcopy and large pages.

    The stream does not say of which block it is there.  Where it is not, the next block's name or
    the next record follows, and none of those can be mistaken for one of the sizes advised:
    a name begins with a length and a record without flags is none.
    """
    if not ram.page_sizes or not ram.page_sizes & (ram.page_sizes - 1):
        return None
    yield from window.need(_HEAD, "a block of RAM, or a record")
    value = int.from_bytes(window.look(_HEAD), "big")
    if not value & ram.page_sizes or value & (value - 1):
        return None
    window.take(_HEAD)
    return value


def _mapped_header(window: Window, ram: Ram, name: str) -> Steps[MappedHeader]:
    at = window.position
    data = yield from window.bytes(MAPPED_HEADER.size, f"where the pages of {name!r} are")
    version, page_size, bitmap, pages = MAPPED_HEADER.unpack(data)
    if version != MAPPED_VERSION:
        raise StreamError(at, f"a mapped-ram header of version {MAPPED_VERSION}", str(version))
    if page_size != ram.page_size:
        raise StreamError(at + 4, f"the page size {ram.page_size}", str(page_size))
    return MappedHeader(page_size, bitmap, pages)


def _mapped(
    window: Window, ram: Ram, at: int, block: RamBlock, header: MappedHeader
) -> Steps[None]:
    """Read a block's bitmap, and the place of its pages."""
    here = window.position
    bits = -(-block.length // ram.page_size)
    size = -(-bits // 8)
    if not here <= header.bitmap_offset or header.bitmap_offset + size > header.pages_offset:
        raise StreamError(
            here - MAPPED_HEADER.size,
            "a bitmap behind this header, and pages behind the bitmap",
            f"the bitmap at {header.bitmap_offset:#x} and the pages at {header.pages_offset:#x}",
        )
    end = header.pages_offset + block.length
    yield MappedBlock(at, block, end)
    yield from _pass(window, header.bitmap_offset, f"the place of the bitmap of {block.name!r}")
    bitmap_end = header.bitmap_offset + size
    while count := (yield from _within(window, bitmap_end, f"the bitmap of {block.name!r}")):
        at = window.position
        yield Bitmap(at, block.name, at - header.bitmap_offset, _view(window, count))
    yield from _pass(window, header.pages_offset, f"the place of the pages of {block.name!r}")
    while count := (yield from _within(window, end, f"the pages of {block.name!r}")):
        at = window.position
        yield MappedPages(at, block.name, at - header.pages_offset, _view(window, count))


def _within(window: Window, end: int, expected: str) -> Steps[int]:
    """Wait for something in front of an offset; returns how many bytes, 0 if that is reached.

    While it waits, some may be skipped.
    """
    if window.position >= end:
        return 0
    count = yield from window.some(f"{expected}, up to {end:#x}")
    return max(min(count, end - window.position), 0)


def _pass(window: Window, end: int, expected: str) -> Steps[None]:
    """Pass over what is not used."""
    while count := (yield from _within(window, end, expected)):
        window.index += count


def _view(window: Window, count: int) -> memoryview:
    window.index += count
    return window.view[window.index - count : window.index]


def _flags(flags: int) -> str:
    known = [str(flag.name) for flag in RamFlag if flag & flags]
    rest = flags & ~int(sum(RamFlag))
    return " | ".join([*known, *([f"{rest:#x}"] if rest else [])]) or "none"
