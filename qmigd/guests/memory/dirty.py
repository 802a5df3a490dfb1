"""Which pages of the RAM the workload wrote since one last looked.

Two ways: the kernel write-protects the pages and remembers those that were written all the
same (userfaultfd with PAGEMAP_SCAN, Linux 6.7), or the workload notes down what it writes.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qmigd.guests.memory.kernel import WRITE_PROTECT, PagemapScan, Userfaultfd
from qmigd.guests.memory.ram import Ram

__all__ = ["LogTracker", "PagemapTracker", "Tracker", "track"]


class Tracker(Protocol):
    """Watches from when it is made."""

    name: str

    def take(self) -> NDArray[np.bool_]:
        """Return which pages were written since the last time, or since the beginning."""

    def close(self) -> None:
        """Watch no more."""


class PagemapTracker:
    """By the kernel."""

    name = "pagemap-scan"

    def __init__(self, ram: Ram) -> None:
        """:raises OSError: this kernel cannot do it."""
        self._ram = ram
        self._userfaultfd = Userfaultfd.asynchronous()
        self._scan: PagemapScan | None = None
        try:
            self._userfaultfd.register(ram.address, ram.size, WRITE_PROTECT)
            self._scan = PagemapScan(ram.address, ram.size)
            self.take()
        except OSError:
            self.close()
            raise

    def take(self) -> NDArray[np.bool_]:
        assert self._scan is not None
        written = np.zeros(self._ram.pages, np.bool_)
        for first, end in self._scan.take():
            written[first:end] = True
        return written

    def close(self) -> None:
        if self._scan is not None:
            self._scan.close()
            self._scan = None
        self._userfaultfd.close()


class LogTracker:
    """By the workload's own notes."""

    name = "log"

    def __init__(self, ram: Ram) -> None:
        self._ram = ram
        ram.keep_log(True)

    def take(self) -> NDArray[np.bool_]:
        return self._ram.take_log()

    def close(self) -> None:
        self._ram.keep_log(False)


def track(ram: Ram) -> Tracker:
    """Watch the RAM in the best way that this kernel has."""
    try:
        return PagemapTracker(ram)
    except OSError:
        return LogTracker(ram)
