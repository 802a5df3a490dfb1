"""Postcopy at the destination: the guest's faults on pages that have not come yet.

From the beginning on every hole in the RAM is a fault of the thread that touches it.  It is
asked for at the source, once; when it comes, over whichever channel, the kernel puts it
in and wakes who waits.  A page that has come as zero bytes is a hole as well, and is filled
in here.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from qmigd.guests.memory.kernel import MISSING, Userfaultfd
from qmigd.guests.memory.ram import PAGE, Pages, Ram, runs

__all__ = ["Faults", "can_serve"]


#: Pages that are put in at once at the most.
_PLACED = 32


def can_serve() -> bool:
    """Whether this kernel gives us what postcopy takes at the destination."""
    try:
        Userfaultfd().close()
    except OSError:
        return False
    return True


class Faults:
    """Serves the faults of one guest, in a thread.

    :ivar latencies: seconds that the guest waited for each page that it asked for.
    """

    def __init__(self, ram: Ram, received: NDArray[np.bool_], ask: Callable[[int], None]) -> None:
        """:param received: which pages have come; kept up to date here from now on.
        :param ask: asks the source for a page.
        :raises OSError: this kernel gives us no userfaultfd.
        """
        self._ram = ram
        self._received = received
        self._ask = ask
        self._lock = threading.Lock()
        self._placing = threading.Lock()
        self._space = np.empty((_PLACED, PAGE), np.uint8)
        self._asked: dict[int, float] = {}
        self.latencies: list[float] = []
        self._userfaultfd = Userfaultfd()
        self._userfaultfd.register(ram.address, ram.size, MISSING)
        self._waker = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="memory-faults", daemon=True)
        self._thread.start()

    def place(self, pages: Pages, data: NDArray[np.uint8] | None) -> None:
        """Put in pages that have come.

        :param data: a row for each; ``None``: they are zero bytes.
        """
        at = 0
        for first, end in runs(pages):
            to = self._ram.address + first * PAGE
            if data is None:
                self._userfaultfd.zero(to, (end - first) * PAGE)
            else:
                self._copy(to, data[at : at + end - first])
            at += end - first
        now = time.monotonic()
        with self._lock:
            self._received[pages] = True
            if self._asked:
                for page in pages.tolist():
                    if (since := self._asked.pop(page, None)) is not None:
                        self.latencies.append(now - since)

    def _copy(self, to: int, rows: NDArray[np.uint8]) -> None:
        """Put in neighbours, whose bytes are not in one piece yet unless there is only one."""
        if len(rows) == 1:
            self._userfaultfd.copy(to, rows.ctypes.data, PAGE)
            return
        with self._placing:
            for start in range(0, len(rows), _PLACED):
                some = rows[start : start + _PLACED]
                self._space[: len(some)] = some
                self._userfaultfd.copy(to + start * PAGE, self._space.ctypes.data, len(some) * PAGE)

    def finish(self) -> None:
        """All pages have come: holes are zero pages from here on."""
        os.eventfd_write(self._waker, 1)
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._userfaultfd.close()
        os.close(self._waker)
        self._waker = -1

    def close(self) -> None:
        """End the thread; who waits for a page goes on waiting, since it would find another."""
        if self._waker >= 0:
            os.eventfd_write(self._waker, 1)

    def give_up(self) -> None:
        """Let go of who waits for a page: the guest has ended, and what it finds is no matter."""
        self.close()
        self._userfaultfd.close()

    def _run(self) -> None:
        descriptor = self._userfaultfd.fileno()
        while True:
            ready, _, _ = select.select([descriptor, self._waker], [], [])
            if self._waker in ready:
                return
            now = time.monotonic()
            for address in self._userfaultfd.faults():
                self._fault((address - self._ram.address) // PAGE, now)

    def _fault(self, page: int, now: float) -> None:
        with self._lock:
            here = bool(self._received[page])
            if not here:
                if page in self._asked:
                    return
                self._asked[page] = now
        if here:
            self._userfaultfd.zero(self._ram.address + page * PAGE, PAGE)
        else:
            self._ask(page)
