"""Precopy at the source: all pages, then those that were written since, and again.

It goes on until what is left would be sent within the downtime limit, at the bandwidth that
was measured, or until somebody asks for postcopy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qmigd.guests.memory.channels import Rate
from qmigd.guests.memory.dirty import Tracker
from qmigd.guests.memory.progress import Progress
from qmigd.guests.memory.ram import PAGE, Pages
from qmigd.guests.memory.sending import Sender
from qmigd.guests.memory.throttle import Throttle

if TYPE_CHECKING:
    from qmigd.guests.memory.machine import Machine

__all__ = ["Passes"]

#: Seconds of the downtime that are not for pages: stopping, one more look for dirty pages,
#: the devices, and the destination's own part.
_OVERHEAD = 0.02
#: Bytes that are enough to measure a bandwidth by.
_MUCH = 4 << 20


class Passes:
    """The passes of one migration."""

    def __init__(
        self,
        machine: Machine,
        progress: Progress,
        sender: Sender,
        rate: Rate,
        postcopy: threading.Event,
        check: Callable[[], None],
    ) -> None:
        """:param rate: how fast pages go when they are not held back.
        :param postcopy: set when the guest is to go first.
        :param check: raises where it is over.
        """
        self._machine = machine
        self._progress = progress
        self._sender = sender
        self._rate = rate
        self._postcopy = postcopy
        self._check = check

    def run(self, tracker: Tracker) -> NDArray[np.bool_]:
        """Send the RAM until little enough is dirty; returns which pages are left to be sent.

        :raises Lost: a channel broke.
        """
        machine, progress = self._machine, self._progress
        throttle = Throttle(machine)
        left = np.ones(machine.ram.pages, np.bool_)
        ram = machine.ram
        present: NDArray[np.bool_] | None = None if ram.allocated else ram.present()
        while True:
            progress.syncs += 1
            machine.event("MIGRATION_PASS", {"pass": progress.syncs})
            begun, before = time.monotonic(), progress.transferred
            self._pass(left, present)
            if self._postcopy.is_set():
                return left
            self._sender.sync()
            present = None
            seconds = max(time.monotonic() - begun, 1e-6)
            sent = progress.transferred - before
            left |= tracker.take()
            dirty = int(np.count_nonzero(left))
            progress.remaining = dirty * PAGE
            progress.dirty_rate = int(dirty / seconds)
            progress.bandwidth = self._bandwidth(sent, seconds)
            throttle.passed(dirty * PAGE, sent)
            progress.throttle = throttle.per_cent
            progress.expected_downtime = dirty * PAGE / max(progress.bandwidth, 1.0) + _OVERHEAD
            if progress.expected_downtime * 1000 <= max(
                machine.settings["downtime-limit"], _OVERHEAD * 1000
            ):
                return left

    def _bandwidth(self, sent: int, seconds: float) -> float:
        """Bytes a second that the last pages can be sent with."""
        told = int(self._machine.settings["avail-switchover-bandwidth"])
        if told:
            return float(told)
        limit = int(self._machine.settings["max-bandwidth"])
        rate = self._rate.value or sent / seconds
        if sent >= _MUCH:
            # What the kernel takes is one thing; to find the pages and to see them arrive is part
            # of it in the downtime as well.
            rate = min(rate, sent / seconds)
        return min(rate, limit) if limit else rate

    def _pass(self, left: NDArray[np.bool_], present: NDArray[np.bool_] | None) -> None:
        """Send all pages that are in ``left``, and take them out of it."""
        pages: Pages = np.flatnonzero(left)
        at = 0
        while at < len(pages):
            self._check()
            if self._postcopy.is_set():
                return
            limit = int(self._machine.settings["max-bandwidth"])
            # Of a low bandwidth no more than for a moment, so that it can be changed.
            count = self._sender.batch(len(pages) - at)
            if limit:
                count = max(1, min(count, limit // 50 // PAGE))
            batch = pages[at : at + count]
            self._sender.send(batch, present)
            left[batch] = False
            at += len(batch)
            self._progress.precopy_bytes = self._progress.transferred
            self._progress.remaining = (len(pages) - at) * PAGE
