"""Where in a stream which kind of bytes are: a strip of buckets, however long the stream becomes.

Offers :class:`Strip`.  A bucket stands for a power of two of bytes.  When all are in use, every
two are made one, so that a strip is of the same size for a stream of any length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

__all__ = ["Strip"]

#: Buckets at most.  Half as many are in use at least, once a stream has a few MiB.
_BUCKETS: Final = 512

#: Bytes that a bucket stands for at first.
_SMALLEST: Final = 1 << 12


class Strip:
    """The bytes of each kind, along the stream.

    :ivar width: bytes that a bucket stands for.
    :ivar buckets: how many bytes of which kind are in each.
    """

    def __init__(self, start: int = 0) -> None:
        """:param start: the offset of the stream's first byte."""
        self.width = _SMALLEST
        self.buckets: list[dict[str, int]] = []
        self._start = start

    def add(self, at: int, size: int, kind: str) -> None:
        """Take in ``size`` bytes at an offset."""
        at -= self._start
        if size <= 0 or at < 0:
            return
        while (at + size - 1) // self.width >= _BUCKETS:
            self._halve()
        first, last = at // self.width, (at + size - 1) // self.width
        while len(self.buckets) <= last:
            self.buckets.append({})
        for number in range(first, last + 1):
            start = max(at, number * self.width)
            count = min(at + size, (number + 1) * self.width) - start
            bucket = self.buckets[number]
            bucket[kind] = bucket.get(kind, 0) + count

    def _halve(self) -> None:
        self.width *= 2
        halved = []
        for number in range(0, len(self.buckets), 2):
            whole = dict(self.buckets[number])
            for other in self.buckets[number + 1 : number + 2]:
                for kind, count in other.items():
                    whole[kind] = whole.get(kind, 0) + count
            halved.append(whole)
        self.buckets = halved

    def __iter__(self) -> Iterator[dict[str, int]]:
        return iter(self.buckets)
