"""Postcopy at the source: the guest goes first, and its pages follow.

::

    discard      what the destination has and what is not good any more
    package      LISTEN, the devices, RUN: from here on the guest is the destination's
    pages        those that it waits for, and the others one after another
    end          all have been sent

Without postcopy-preempt a page that the guest waits for comes next in the main channel, behind
what is in the sockets already.  With it, it overtakes that on a channel of its own, which
a thread of its own feeds.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qmigd.guests.memory.channels import Channel, Lost
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
        self._state = threading.Condition()
        self._over = False
        self._failure: Lost | None = None
        self._thread: threading.Thread | None = None
        if preempt is not None:
            self._thread = threading.Thread(
                target=self._overtake, args=(preempt,), name="memory-preempt", daemon=True
            )
            self._thread.start()

    @property
    def urgent(self) -> bool:
        """Whether the main channel has to bring a page that the guest waits for."""
        return self._preempt is None and bool(self._asked)

    def request(self, request: PageRequest) -> None:
        """The guest waits for pages: called by the thread of the return path."""
        first = request.start // PAGE
        with self._state:
            self._asked.extend(range(first, first + request.length // PAGE))
            self._state.notify_all()

    def send_all(self, check: Callable[[], None]) -> None:
        """Send what is left; the pages asked for come first.

        :param check: raises where it is over.
        :raises Lost: a channel broke.
        """
        at = 0
        while True:
            check()
            if self._failure is not None:
                raise self._failure
            pages, at = self._next(at)
            if not len(pages):
                break
            self._sender.send(pages, None)
            self._progress.remaining = max(0, self._progress.remaining - len(pages) * PAGE)
        with self._state:
            self._over = True
            self._state.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _next(self, at: int) -> tuple[Pages, int]:
        """Take the next pages; none if all are sent.

        :param at: from where on to look, where none is asked for.
        """
        with self._state:
            if self._preempt is None:
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

    # -- the channel for pages that are waited for

    def _overtake(self, channel: Channel) -> None:
        records = RamWriter(PAGE)
        try:
            while (page := self._take()) is not None:
                normal, zeros = split_zeros(self._ram, np.array([page], np.int64))
                if len(normal):
                    parts = records.pages_of(self._ram.name, normal * PAGE, self._ram.host)
                else:
                    parts = records.zeros(self._ram.name, zeros * PAGE)
                count = channel.send(parts)
                progress = self._progress
                progress.normal += len(normal)
                progress.duplicate += len(zeros)
                progress.transferred += count
                progress.remaining = max(0, progress.remaining - PAGE)
            channel.send([END_OF_SECTION])
        except Lost as error:
            self._failure = error

    def _take(self) -> int | None:
        """Wait for a page that is asked for; ``None``: all have been sent."""
        with self._state:
            while True:
                while self._asked:
                    page = self._asked.popleft()
                    if self.left[page]:
                        self.left[page] = False
                        return page
                if self._over:
                    return None
                self._state.wait(1.0)
