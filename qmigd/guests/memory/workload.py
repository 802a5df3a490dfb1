"""What the guest does while it runs: it counts, and writes its RAM.

A thread stands for the virtual CPU.  :data:`TICKS` times a second it goes on with its
writes and counts a tick; what it has counted moves with the devices.  A clock that is not
taken back or set forward by a move: it stands still where the guest does not run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qmigd.guests.memory.contents import Pattern, fill, first_wrong
from qmigd.guests.memory.ram import PAGE, Ram

__all__ = ["TICKS", "Workload"]

#: Ticks in a second.
TICKS = 100
#: Pages that are made and written at once at the most.
_BATCH = 64
#: Pages that are looked at together.
_LOOK = 1024
#: Pages that the virtual CPU may fall behind before it lets go of what it has missed.
_BEHIND = 1 << 14


class Workload:
    """The virtual CPU.

    :ivar ticks: how far it has counted.
    :ivar written: the number of its last write.
    :ivar throttle: per cent of its time that are taken from it.
    """

    def __init__(
        self,
        ram: Ram,
        pattern: Pattern,
        rate: int,
        *,
        filled: bool = False,
    ) -> None:
        """:param rate: bytes a second that it writes.
        :param filled: all of the RAM is filled before its first write.
        """
        self._ram = ram
        self._pattern = pattern
        self._rate = rate
        self._filled = filled
        self.ticks = 0
        self.written = 0
        self.throttle = 0
        self._lock = threading.Condition()
        self._wanted = False  # to run
        self._idle = True  # whether it stands still
        self._over = False
        self._thread = threading.Thread(target=self._run, name="memory-cpu", daemon=True)
        self._thread.start()

    def fill_all(self) -> None:
        """Fill the RAM, where it is to be."""
        if self._filled:
            for first in range(0, self._ram.pages, _LOOK):
                pages = np.arange(first, min(first + _LOOK, self._ram.pages), dtype=np.int64)
                self._ram.write(first, fill(np.zeros(len(pages), np.int64), pages))

    # -- run and stop

    @property
    def running(self) -> bool:
        """Whether it is to run; it may still be on its last write when it is not."""
        return self._wanted

    def run(self) -> None:
        with self._lock:
            self._wanted = True
            self._lock.notify_all()

    def stop(self, seconds: float) -> bool:
        """Have it stand still; returns whether it does.

        :param seconds: how long to wait for that; it may itself wait for a page.
        """
        with self._lock:
            self._wanted = False
            self._lock.notify_all()
            return self._lock.wait_for(lambda: self._idle, seconds)

    def end(self) -> None:
        """End the thread, if it does not wait for a page."""
        with self._lock:
            self._over, self._wanted = True, False
            self._lock.notify_all()
        self._thread.join(1.0)

    @property
    def alive(self) -> bool:
        """Whether the thread is still there."""
        return self._thread.is_alive()

    # -- the proof

    def wrong(self) -> str | None:
        """Return what is wrong with the RAM, or ``None``; it has to stand still."""
        return first_wrong(self._pattern, self.written, self._read(), self._filled)

    def _read(self) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        for first in range(0, self._ram.pages, _LOOK):
            yield first, self._ram.read(first, min(_LOOK, self._ram.pages - first))

    # -- the thread

    def _run(self) -> None:
        due = 0.0  # pages
        then = time.monotonic()
        while True:
            with self._lock:
                if not self._wanted:
                    self._idle = True
                    self._lock.notify_all()
                    self._lock.wait_for(lambda: self._wanted or self._over)
                    due, then = 0.0, time.monotonic()
                if self._over:
                    return
                self._idle = False
            now = time.monotonic()
            due += (now - then) * self._rate * (100 - self.throttle) / 100 / PAGE
            then = now
            due = min(due, _BEHIND)
            while due >= 1 and self._wanted:
                count = min(int(due), _BATCH)
                self._write(count)
                due -= count
            if self._wanted:
                self.ticks += 1
                with self._lock:
                    self._lock.wait_for(
                        lambda: not self._wanted, max(0.0, then + 1 / TICKS - time.monotonic())
                    )

    def _write(self, count: int) -> None:
        first = self.written + 1
        pages = self._pattern.pages(first, first + count)
        data = fill(np.arange(first, first + count, dtype=np.int64), pages)
        for index, page in enumerate(pages.tolist()):
            self._ram.write(page, data[index])
            self.written = first + index
            if not self._wanted:
                return
