"""What the workload writes into its pages, and how to prove that nothing of it was lost.

Writes are numbered from 1 on.  Which page write *n* goes to follows from *n* alone, and so
does what is written there:

- the first word of a page is the number of the write, and the second the page's own number;
- the others are noise, multiplied with an odd number made of both: nothing that compresses.

So the number of the last write, which moves with the devices, tells what each page has to
hold.  A page that was lost on the way, arrived too early, too late or in another's place,
holds something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qmigd.guests.memory.ram import PAGE, Pages

__all__ = ["PATTERNS", "Inconsistent", "Pattern", "fill", "first_wrong"]

#: In which order pages are written: one after another, or all over the place.
PATTERNS = ("sequential", "random")

_WORDS = PAGE // 8
_NOISE = np.random.Generator(np.random.PCG64(0x514D4947)).integers(
    0, 1 << 64, _WORDS, np.uint64, endpoint=False
) | np.uint64(1)
#: Odd constants that spread bits (those of splitmix64's and of Knuth's).
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_SPREAD_PAGE = np.uint64(6364136223846793005)


class Inconsistent(Exception):
    """A page does not hold what was written to it; the text has its number."""


def fill(writes: NDArray[np.int64], pages: Pages) -> NDArray[np.uint64]:
    """Return what write ``writes[i]`` puts into page ``pages[i]``, a page each row."""
    numbers = writes.astype(np.uint64)
    own = pages.astype(np.uint64)
    factors = (numbers * _SPREAD ^ own * _SPREAD_PAGE) << np.uint64(1) | np.uint64(1)
    data = _NOISE[None, :] * factors[:, None]
    data[:, 0] = numbers
    data[:, 1] = own
    return data


@dataclass(frozen=True)
class Pattern:
    """In which order the pages from ``start`` on, ``count`` of them, are written.

    :ivar kind: one of :data:`PATTERNS`.
    """

    kind: str
    start: int
    count: int

    def pages(self, first: int, end: int) -> Pages:
        """Return the pages that the writes from ``first`` up to ``end``, without it, go to."""
        places = np.arange(first - 1, end - 1, dtype=np.int64) % self.count
        if self.kind == "random":
            places = self._scattered(places)
        return places + self.start

    def last(self, written: int) -> NDArray[np.int64]:
        """Return for each of the pages the last write to it, after so many; 0 for none."""
        order = np.arange(self.count, dtype=np.int64)
        # The write whose number is congruent to the place, and not above the last one.
        numbers = written - (written - 1 - order) % self.count
        numbers[numbers < 1] = 0
        if self.kind == "random":
            placed = np.empty_like(numbers)
            placed[self._scattered(order)] = numbers
            return placed
        return numbers

    def _scattered(self, places: Pages) -> Pages:
        """A permutation of 0 to ``count`` - 1: steps that have no divisor with it in common."""
        step = int(self.count * 0.6180339887) | 1
        while np.gcd(step, self.count) != 1:
            step += 2
        return places * step % self.count


def first_wrong(
    pattern: Pattern, written: int, read: Iterator[tuple[int, NDArray[np.uint64]]], filled: bool
) -> str | None:
    """Return what is wrong with the first page that is, or ``None``.

    :param written: the number of the last write.
    :param read: yields pages, with the number of the first.
    :param filled: the RAM was filled by write 0 at the beginning, else by zero bytes.
    """
    last = pattern.last(written)
    for first, data in read:
        numbers = np.zeros(len(data), np.int64)
        begin, end = max(first, pattern.start), min(first + len(data), pattern.start + len(last))
        if begin < end:
            numbers[begin - first : end - first] = last[begin - pattern.start : end - pattern.start]
        pages = np.arange(first, first + len(data), dtype=np.int64)
        wanted = fill(numbers, pages)
        if not filled:
            wanted[numbers == 0] = 0
        wrong = np.flatnonzero((wanted != data).any(axis=1))
        if len(wrong):
            at = int(wrong[0])
            return (
                f"page {first + at} has write {int(data[at, 0])} of page {int(data[at, 1])}, and "
                f"not write {int(numbers[at])}; the last one was {written}"
            )
    return None
