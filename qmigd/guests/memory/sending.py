"""The source's RAM on its way: which pages are zero, and records over the main channel.

Pages are sent as they are at that moment.  One that the workload writes meanwhile is
dirty, and is sent again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qmigd.guests.memory.channels import Channel, Pace, Rate
from qmigd.guests.memory.progress import Progress
from qmigd.guests.memory.ram import PAGE, Pages, Ram
from qmigd.guests.memory.vector import Records
from qmigd.stream.format import SectionType
from qmigd.stream.pages import zero_pages
from qmigd.stream.records import END_OF_SECTION, RamWriter
from qmigd.stream.writer import section_end, section_start

__all__ = ["RAM_SECTION", "MainSender", "Sender", "split_zeros"]

#: Pages in one section of RAM; between two of them a command can stand.
_SECTION = 4096
#: The section's id.
RAM_SECTION = 1


def split_zeros(
    ram: Ram, pages: Pages, present: NDArray[np.bool_] | None = None
) -> tuple[Pages, Pages]:
    """Return which of the pages have to be sent, and which are zero.

    :param present: which are not holes in the file, if that is known: a hole is not read,
        which would fill it.
    """
    if present is not None:
        there = present[pages]
        holes, pages = pages[~there], pages[there]
    else:
        holes = pages[:0]
    if not len(pages):
        return pages, holes
    first, last = int(pages[0]), int(pages[-1])
    # A slice is a view, and a list of numbers a copy.
    rows = ram.host[first : last + 1] if last - first + 1 == len(pages) else ram.host[pages]
    zero = zero_pages(rows)
    if not zero.any():
        return pages, holes
    zeros = pages[zero]
    return pages[~zero], zeros if not len(holes) else np.sort(np.concatenate((holes, zeros)))


class Sender(Protocol):
    """What sends pages in precopy."""

    def batch(self, left: int) -> int:
        """Return how many pages :meth:`send` is best given, where so many are left in this pass:
        what Python does for a batch is to take little time beside the sending of its pages.
        """

    def send(self, pages: Pages, present: NDArray[np.bool_] | None) -> None:
        """Send a batch; they may still be on their way when this returns."""

    def sync(self) -> None:
        """The pass is over: what comes later must arrive later."""

    def close(self) -> None:
        """Nothing more is sent."""


class MainSender:
    """Over the main channel, in the sections of RAM.

    :ivar rate: how fast it goes when it is not held back.
    """

    def __init__(
        self,
        ram: Ram,
        channel: Channel,
        progress: Progress,
        pace: Pace,
        interrupted: Callable[[], bool],
    ) -> None:
        self._ram = ram
        self._channel = channel
        self._progress = progress
        self._pace = pace
        self._interrupted = interrupted
        self._records = RamWriter(PAGE)
        self._vector = Records()
        self._kind = SectionType.PART
        self._open = 0  # pages in the section that is open
        self._inside = False
        self.rate = Rate()

    def last(self) -> None:
        """What comes from here on is the END of the section."""
        self.leave()
        self._kind = SectionType.END

    def batch(self, left: int) -> int:
        return Records.MOST

    def send(self, pages: Pages, present: NDArray[np.bool_] | None) -> None:
        self._pace.wait(self._interrupted)
        self._put(*split_zeros(self._ram, pages, present))

    def send_zeros(self, pages: Pages) -> None:
        """Send pages of zero bytes, where the others go elsewhere."""
        self._put(pages[:0], pages)

    def _put(self, normal: Pages, zeros: Pages) -> None:
        parts: list[Any] = self.enter()
        if len(zeros):
            parts += self._records.zeros(self._ram.name, zeros * PAGE)
        places = normal * PAGE
        if len(normal):
            first, heads = self._records.heads(self._ram.name, places)
            if first:
                parts += [*first, self._ram.host[normal[0]].tobytes()]
                places = places[1:]
        then, count = time.monotonic(), 0
        if parts:
            count += self._channel.send(parts)
        if len(places):
            ram = self._ram.host.ctypes.data
            count += self._channel.send_vector(self._vector.vector(heads, ram, places))
        self.rate.sent(count, time.monotonic() - then)
        self._pace.spend(count)
        progress = self._progress
        progress.normal += len(normal)
        progress.duplicate += len(zeros)
        progress.transferred += count
        self._open += len(normal) + len(zeros)
        if self._open >= _SECTION:
            self.leave()

    def enter(self) -> list[Any]:
        """Return what opens a section of RAM, if none is open."""
        if self._inside:
            return []
        self._inside = True
        self._open = 0
        return [section_start(self._kind, RAM_SECTION)]

    def leave(self) -> None:
        """Close the section of RAM, if one is open."""
        if self._inside:
            self._inside = False
            self._channel.send([END_OF_SECTION, section_end(RAM_SECTION)])

    def sync(self) -> None:
        self.leave()

    def close(self) -> None:
        """Nothing is kept."""
