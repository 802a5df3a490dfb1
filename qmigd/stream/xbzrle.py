"""XBZRLE: a page as its difference to what it was before (migration/xbzrle.c in QEMU).

::

    (uleb128: bytes that are as before   uleb128: bytes that are others   these bytes)*

What is not mentioned at the end is as before.  Offers :func:`apply`, which changes a page, and
:func:`encode`, which says how it was changed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qmigd.errors import StreamError

__all__ = ["apply", "encode"]

#: Bytes of a number: QEMU's go up to 14 bits.
_MAX_NUMBER = 2


def apply(page: memoryview, data: bytes, at: int) -> None:
    """Change a page, which is as it was before, to what it is by ``data``.

    :param at: where the data is in the stream, for errors.
    :raises StreamError: it is no such difference; the page may be changed in part.
    """
    index = where = 0
    while index < len(data):
        start = index
        same, index = _number(data, index, at)
        other, index = _number(data, index, at)
        where += same
        if not other or where + other > len(page) or index + other > len(data):
            raise StreamError(
                at + start,
                f"other bytes within the {len(page)} of the page and the {len(data)} of the record",
                f"{other} of them at {where:#x}",
            )
        page[where : where + other] = data[index : index + other]
        where += other
        index += other


def _number(data: bytes, index: int, at: int) -> tuple[int, int]:
    """Return a number, and where it ends."""
    value = 0
    for shift in range(_MAX_NUMBER):
        if index == len(data):
            raise StreamError(at + index, "a number in 7-bit pieces", "the end of the record")
        byte = data[index]
        index += 1
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, index
    raise StreamError(at + index, f"a number of at most {_MAX_NUMBER} bytes", "a longer one")


def encode(before: bytes | memoryview, now: bytes | memoryview) -> bytes | None:
    """Return the difference of a page to what it was before.

    :returns: empty if there is none; None if it would be larger than the page, or cannot be told
        in numbers of 14 bits: then the page is sent as it is.
    """
    other = np.frombuffer(before, np.uint8) != np.frombuffer(now, np.uint8)
    starts, ends = np.flatnonzero(np.diff(other, prepend=False, append=False)).reshape(-1, 2).T
    same = starts - np.concatenate(([0], ends[:-1]))[: len(starts)]
    count = ends - starts
    heads = 2 + (same >= 0x80) + (count >= 0x80)
    after = np.cumsum(heads + count)
    size = int(after[-1]) if len(after) else 0
    too_long = max(same.max(initial=0), count.max(initial=0)) >> 7 * _MAX_NUMBER
    if size > len(now) or too_long:
        return None
    data = np.empty(size, np.uint8)
    where = after - heads - count
    where = _put_numbers(data, where, same)
    where = _put_numbers(data, where, count)
    # Where each of the other bytes goes: its number, moved by what stands before its run.
    places = np.arange(int(count.sum())) + np.repeat(where - np.cumsum(count) + count, count)
    data[places] = np.frombuffer(now, np.uint8)[other]
    return data.tobytes()


def _put_numbers(
    data: NDArray[np.uint8], where: NDArray[np.int64], values: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Put numbers in; returns where each of them ends."""
    large = values >= 0x80
    data[where] = values & 0x7F | large * 0x80
    data[where[large] + 1] = values[large] >> 7
    return where + 1 + large
