"""The guest's RAM: a memfd, mapped twice.

The workload writes through one mapping, whose faults the kernel may hand to the migration
engine; the engine reads and writes through the other one, so that what it does is no fault
and makes no page dirty.

A page that nobody has written is a hole in the file.  The engine must not read holes where
it does not have to: even that would fill them, and a filled page is no longer missing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

import numpy as np
from numpy.typing import NDArray

from qmigd.guests.memory.kernel import map_shared, populate, punch, unmap
from qmigd.stream.records import view_of

__all__ = ["PAGE", "Pages", "Ram", "runs"]

#: Bytes of a page, of the guest's and of the host's.
PAGE = mmap.PAGESIZE

#: Pages that are put into one piece, which stays in the CPU's cache, to be written.
_PIECE = 64
#: Runs that are received each by itself at the most.
_PLACES = 8
#: What a page that nobody has written holds.
_ZEROS = np.zeros((1, PAGE), np.uint8)

#: Numbers of pages.
Pages = NDArray[np.int64]


class Ram:
    """RAM of a fixed size.

    :ivar name: of its block in the stream.
    :ivar pages: how many it has.
    :ivar host: its pages as the engine sees them, ``uint8``, a page each row.
    :ivar bytes: the same as one buffer.
    :ivar address: where it is as the workload sees it.
    :ivar allocated: all of it got its memory beforehand.
    :ivar log: which pages were written, as the workload notes it down; ``None``: it does not.
    """

    name = "ram"

    def __init__(self, size: int, *, allocated: bool = False) -> None:
        """:param size: bytes, a whole number of pages.
        :param allocated: all of it gets its memory now.
        :raises OSError: the kernel has no room for it.
        """
        self.size = size
        self.pages = size // PAGE
        self.descriptor = os.memfd_create("qmigd-memory", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, size)
        self._mapping = mmap.mmap(self.descriptor, size)
        self.host = np.frombuffer(self._mapping, np.uint8).reshape(self.pages, PAGE)
        self.bytes = memoryview(self._mapping)
        self.address = map_shared(self.descriptor, size)
        self.allocated = allocated
        if allocated:
            for address in (self.host.ctypes.data, self.address):
                populate(address, size)
        self.log: NDArray[np.bool_] | None = None
        self._log_lock = threading.Lock()
        self._pinned: NDArray[np.bool_] | None = None
        self._pinning = threading.Lock()

    # -- for the workload

    def write(self, page: int, data: NDArray[np.uint64]) -> None:
        """Write whole pages from ``page`` on, as a guest does: this may wait for a page."""
        size = data.nbytes
        ctypes.memmove(self.address + page * PAGE, data.ctypes.data, size)
        if self.log is not None:
            # After the write: what the engine takes before, it will find marked again.
            with self._log_lock:
                if self.log is not None:
                    self.log[page : page + size // PAGE] = True

    def read(self, page: int, count: int) -> NDArray[np.uint64]:
        """Read pages, as a guest does: this may wait for them."""
        data = np.empty((count, PAGE // 8), np.uint64)
        ctypes.memmove(data.ctypes.data, self.address + page * PAGE, data.nbytes)
        return data

    # -- for the engine

    def keep_log(self, keep: bool) -> None:
        """Have the workload note down what it writes, from now on."""
        with self._log_lock:
            self.log = np.zeros(self.pages, np.bool_) if keep else None

    def take_log(self) -> NDArray[np.bool_]:
        """Return what it noted down since the last time."""
        with self._log_lock:
            taken = self.log
            self.log = np.zeros(self.pages, np.bool_)
        return taken if taken is not None else self.log

    def present(self) -> NDArray[np.bool_]:
        """Return which pages are in the file; the others are holes, and read as zero bytes."""
        found = np.zeros(self.pages, np.bool_)
        end = 0
        while end < self.size:
            try:
                start = os.lseek(self.descriptor, end, os.SEEK_DATA)
            except OSError:  # ENXIO: there is no more
                break
            end = os.lseek(self.descriptor, start, os.SEEK_HOLE)
            found[start // PAGE : -(-end // PAGE)] = True
        return found

    def put(self, first: int, data: NDArray[np.uint8]) -> None:
        """Fill whole pages from ``first`` on.

        :param data: a row for each.
        :raises OSError: there is no memory left.
        """
        if self.allocated:
            whole = np.dtype(("V", PAGE))  # one item each: twice as fast as rows of bytes
            self.host[first : first + len(data)].view(whole)[:] = data.view(whole)
            return
        # By write(): a hole costs half of what a fault would.
        for at in range(0, len(data), _PIECE):
            piece = np.ascontiguousarray(data[at : at + _PIECE])
            left, offset = view_of(piece), (first + at) * PAGE
            while left:
                count = os.pwrite(self.descriptor, left, offset)
                left, offset = left[count:], offset + count

    def places(self, runs: list[tuple[int, int]]) -> list[memoryview] | None:
        """Return where in memory these runs are, to be filled without a copy.

        ``None`` where :meth:`put` takes less time: the memory would come by faults, or there are
        many short runs.
        """
        if not self.allocated or len(runs) > _PLACES:
            return None
        return [self.bytes[first * PAGE : end * PAGE] for first, end in runs]

    def discard(self, first: int, end: int) -> None:
        """Make holes of pages; of those that are pinned, zero bytes."""
        with self._pinning:
            if self._pinned is None or not self._pinned[first:end].any():
                punch(self.descriptor, first * PAGE, (end - first) * PAGE)
                return
            pinned = self._pinned[first:end]
            for start, stop in runs(first + np.flatnonzero(~pinned)):
                punch(self.descriptor, start * PAGE, (stop - start) * PAGE)
            for page in (first + np.flatnonzero(pinned)).tolist():
                self.put(page, _ZEROS)

    def pin(self, first: int, end: int) -> None:
        """A device writes to these pages from now on: it would go on with those that were there
        where others had come into holes.
        """
        with self._pinning:
            if self._pinned is None:
                self._pinned = np.zeros(self.pages, np.bool_)
            self._pinned[first:end] = True

    def unpin(self) -> None:
        """No device does any more."""
        with self._pinning:
            self._pinned = None

    def close(self) -> None:
        """Give it back; no thread may be in it any more."""
        unmap(self.address, self.size)
        # The mapping goes with the last view of it.
        del self.host, self.bytes, self._mapping
        os.close(self.descriptor)


def runs(pages: Pages) -> list[tuple[int, int]]:
    """Return sorted numbers of pages as runs: first, and end."""
    if not len(pages):
        return []
    broken = (pages[1:] - pages[:-1]) != 1
    if not np.count_nonzero(broken):
        return [(int(pages[0]), int(pages[-1]) + 1)]
    breaks = np.flatnonzero(broken)
    firsts = pages[np.concatenate(([0], breaks + 1))]
    lasts = pages[np.concatenate((breaks, [len(pages) - 1]))]
    return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))
