"""XBZRLE: a page as its difference to what it was before (migration/xbzrle.c in QEMU).

::

    (uleb128: bytes that are as before   uleb128: bytes that are others   these bytes)*

What is not mentioned at the end is as before.  Offers :func:`apply`, which changes a page.
"""

from __future__ import annotations

from qmigd.errors import StreamError

__all__ = ["apply"]

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
