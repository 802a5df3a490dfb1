"""Postcopy at the source: the guest goes first, and its pages follow.

::

    discard      what the destination has and what is not good any more
    package      LISTEN, the devices, RUN: from here on the guest is the destination's
    pages        those that it waits for, and the others one after another
    end          all have been sent

Without postcopy-preempt a page that the guest waits for comes next in the main channel, behind
what is in the sockets already.  With it, it overtakes that on a channel of its own, which the
thread of the return path feeds: a page that was sent, and is waited for all the same, is still
in the sockets of the main channel, and goes once more.  Which comes second changes nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qmigd.guests.memory.channels import Channel
from qmigd.guests.memory.progress import Progress
from qmigd.guests.memory.ram import PAGE, Pages, Ram, runs
from qmigd.guests.memory.sending import MainSender, split_zeros
from qmigd.stream.postcopy import discard
from qmigd.stream.records import END_OF_SECTION, RamWriter
from qmigd.stream.return_path import PageRequest

__all__ = ["Following", "discards"]

#: Pages that are sent at once in the background: a page that is waited for does not wait for
#: more than these.
_BACKGROUND = 32


def discards(ram: Ram, left: NDArray[np.bool_]) -> list[bytes]:
    """Return the commands that take back what is not good at the destination."""
    ranges = [(first * PAGE, (end - first) * PAGE) for first, end in runs(np.flatnonzero(left))]
    return list(discard(ram.name, ranges))


class Following:
    """The pages that follow the guest.

    :ivar left: which have not been sent yet.
    """

    def __init__(
        self,
        ram: Ram,
        sender: MainSender,
        preempt: Channel | None,
        left: NDArray[np.bool_],
        progress: Progress,
    ) -> None:
        self._ram = ram
        self._sender = sender
        self._preempt = preempt
        self.left = left
        self._progress = progress
        self._asked: deque[int] = deque()
        self._state = threading.Lock()
        # Of the channel for pages that are waited for.
        self._overtaking = threading.Lock()
        self._records = RamWriter(PAGE)
        self._over = False

    @property
    def urgent(self) -> bool:
        """Whether the main channel has to bring a page that the guest waits for."""
        return bool(self._asked)

    def request(self, request: PageRequest) -> None:
        """The guest waits for pages: called by the thread of the return path.

        :raises Lost: the channel for them broke.
        """
        first = request.start // PAGE
        pages = np.arange(first, first + request.length // PAGE, dtype=np.int64)
        if self._preempt is None:
            self._asked.extend(pages.tolist())
        else:
            self._overtake(self._preempt, pages)

    def _overtake(self, channel: Channel, pages: Pages) -> None:
        with self._overtaking:
            if self._over:
                return  # the main channel has brought all of them on their way
            with self._state:
                fresh = int(np.count_nonzero(self.left[pages]))
                self.left[pages] = False
            normal, zeros = split_zeros(self._ram, pages)
            parts: list[Any] = []
            if len(normal):
                parts += self._records.pages_of(self._ram.name, normal * PAGE, self._ram.host)
            if len(zeros):
                parts += self._records.zeros(self._ram.name, zeros * PAGE)
            count = channel.send(parts)
        progress = self._progress
        progress.normal += len(normal)
        progress.duplicate += len(zeros)
        progress.transferred += count
        progress.remaining = max(0, progress.remaining - fresh * PAGE)

    def send_all(self, check: Callable[[], None]) -> None:
        """Send what is left; the pages asked for come first.

        :param check: raises where it is over.
        :raises Lost: a channel broke.
        """
        at = 0
        while True:
            check()
            pages, at = self._next(at)
            if not len(pages):
                break
            self._sender.send(pages, None)
            self._progress.remaining = max(0, self._progress.remaining - len(pages) * PAGE)
        if self._preempt is not None:
            with self._overtaking:
                self._over = True
                self._preempt.send([END_OF_SECTION])

    def _next(self, at: int) -> tuple[Pages, int]:
        """Take the next pages; none if all are sent.

        :param at: from where on to look, where none is asked for.
        """
        with self._state:
            while self._asked:
                page = self._asked.popleft()
                if self.left[page]:
                    self.left[page] = False
                    # Its neighbours come after it: they are likely to be wanted next.
                    return np.array([page], np.int64), page + 1
            for start in (at, 0):
                window = self.left[start:]
                first = int(window.argmax()) if len(window) else 0
                if len(window) and window[first]:
                    first += start
                    pages = first + np.flatnonzero(self.left[first : first + _BACKGROUND])
                    self.left[pages] = False
                    return pages, first + _BACKGROUND
        return np.empty(0, np.int64), at
