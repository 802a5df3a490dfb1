"""Which mover is the cheapest on this host, by measurement.

For each direction of the stream, from QEMU to the network and from the network to QEMU,
each mover that this kernel has is put between a unix socket and a TCP connection over
loopback, with somebody who writes at the one end and somebody who reads at the other::

    writer --unix--> mover --TCP--> reader        "send"
    writer --TCP--> mover --unix--> reader        "receive"

What counts is the CPU time of all three together, since a mover can also make it dearer
for those on both sides.  It is taken from the threads' own clocks, so that neither the
speed nor what else the host does is in it.  What does get in, caches that others have
emptied or a CPU's other half that is busy, changes slowly: the movers take turns, each is
compared with ``copy`` in the same round, and the median of those ratios counts.  A mover
is taken only if that is below :data:`MARGIN`, and if three quarters of the rounds say that
it is cheaper at all.

The one who writes to TCP in "receive" does so with MSG_ZEROCOPY where the kernel has it:
over loopback its bytes then come in whole pages, the way a network card with header
split delivers them, which is what TCP_ZEROCOPY_RECEIVE needs.  MSG_ZEROCOPY in "send"
cannot show here what it is worth: to a receiver on the same host the kernel copies.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from qmigd.channels.movers import BUFFER_SIZE, mover_for
from qmigd.channels.movers.probing import Direction, obstacle
from qmigd.channels.movers.sending import Sending
from qmigd.channels.pump import SEND_BUFFER
from qmigd.interfaces import COPY, MOVERS
from qmigd.transports.sockets import set_send_buffer, tcp_pair
from qmigd.transports.zero_copy import enable

__all__ = ["DIRECTIONS", "MARGIN", "Calibration", "Cancelled", "Cost", "Measuring"]

DIRECTIONS: Final[tuple[Direction, ...]] = ("send", "receive")

#: What a mover may take of the CPU time of copying at the most.
MARGIN: Final = 0.9

GIB: Final = 1 << 30

# A run moves as much as takes some 10 ms, a hundred times of what starting the threads
# takes.  It matters which threads share a CPU, and that is another thing in each run, so
# that it takes some rounds for the median to hold.
_AMOUNT: Final = 16 << 20
_ROUNDS: Final = 13
_WRITE: Final = 512 << 10


class Cancelled(Exception):
    """The measurement was cancelled."""


@dataclass(frozen=True)
class Cost:
    """What a mover costs in one direction.

    :ivar cpu: CPU seconds for each GiB, of the mover and of those at both ends: those of
        copying times ``ratio``.
    :ivar ratio: in relation to copying, the median of the rounds.
    :ivar quartile: three quarters of the rounds were below this ratio.
    """

    cpu: float
    ratio: float
    quartile: float


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    :ivar costs: of each mover that the kernel has, by direction.
    :ivar obstacles: why it lacks the others.
    """

    costs: Mapping[str, Mapping[str, Cost]]
    obstacles: Mapping[str, Mapping[str, str]]

    def best(self, direction: Direction) -> str:
        """The mover to take: the cheapest of those that are clearly cheaper than copying."""
        costs = self.costs[direction]
        clearly = [
            name for name, cost in costs.items() if cost.ratio < MARGIN and cost.quartile < 1
        ]
        return min(clearly, key=lambda name: costs[name].ratio, default=COPY)

    def says(self, direction: Direction) -> str:
        """The numbers behind :meth:`best`, for people."""
        costs, obstacles = self.costs[direction], self.obstacles[direction]
        others = [f"{cost.cpu:.2f} by {name}" for name, cost in costs.items() if name != COPY]
        said = f"{costs[COPY].cpu:.2f} CPU s for each GiB"
        if others:
            said += f" against {' and '.join(others)}"
        for name, reason in obstacles.items():
            said += f"; {name}: {reason}"
        return said


class Measuring:
    """One measurement, which takes less than a second of CPU time; made to be cancelled.

    :ivar begun: set once bytes are being moved.
    """

    def __init__(self) -> None:
        self.begun = threading.Event()
        self._lock = threading.Lock()
        self._cancelled = False
        # In pages of its own, and not all of them the kernel's page of zeros.
        area = mmap.mmap(-1, _WRITE)
        area.write(os.urandom(_WRITE))
        self._data = memoryview(area)
        self._sockets: list[socket.socket] = []

    def cancel(self) -> None:
        """End it within milliseconds.  Harmless when it has ended."""
        with self._lock:
            self._cancelled = True
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def measure(self) -> Calibration:
        """Measure everything; to be called in a thread of its own.

        :raises Cancelled: see :meth:`cancel`.
        :raises OSError: there is no loopback interface, or no descriptor left.
        """
        costs: dict[str, dict[str, Cost]] = {}
        obstacles: dict[str, dict[str, str]] = {}
        for direction in DIRECTIONS:
            reasons = {name: obstacle(name, direction) for name in MOVERS if name != COPY}
            obstacles[direction] = {name: why for name, why in reasons.items() if why is not None}
            names = [name for name in MOVERS if name not in obstacles[direction]]
            runs: dict[str, list[float]] = {name: [] for name in names}
            for number in range(_ROUNDS):
                # Nobody is always the first.
                turn = number % len(names)
                for name in names[turn:] + names[:turn]:
                    runs[name].append(self._run(name, direction) / _AMOUNT * GIB)
            costs[direction] = {name: _cost(runs[name], runs[COPY]) for name in names}
        return Calibration(costs, obstacles)

    def _run(self, mover: str, direction: Direction) -> float:
        """Move once; returns the CPU seconds of all."""
        with contextlib.ExitStack() as stack:
            near, far = map(stack.enter_context, socket.socketpair())
            wire, peer = map(stack.enter_context, tcp_pair())
            with self._lock:
                if self._cancelled:
                    raise Cancelled
                self._sockets = [near, far, wire, peer]
            set_send_buffer(far, SEND_BUFFER)
            writer, source, sink, reader = near, far, wire, peer
            if direction == "receive":
                writer, source, sink, reader = peer, wire, far, near
            parts = [
                _Part(lambda: _write(writer, self._data)),
                _Part(lambda: _move(mover, source, sink)),
                _Part(lambda: _read(reader)),
            ]
            for part in parts:
                part.start()
            self.begun.set()
            for part in parts:
                part.join()
            with self._lock:
                self._sockets = []
                if self._cancelled:
                    raise Cancelled
        for part in parts:
            if part.error is not None:
                raise part.error
        return sum(part.cpu for part in parts)


def _cost(runs: list[float], copied: list[float]) -> Cost:
    ratios = [run / copy for run, copy in zip(runs, copied, strict=True)]
    ratio, quartile = statistics.quantiles(ratios, n=4, method="inclusive")[1:]
    return Cost(statistics.median(copied) * ratio, ratio, quartile)


class _Part(threading.Thread):
    """A thread that takes the time.

    :ivar cpu: its CPU seconds.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(name="calibration", daemon=True)
        self.cpu = 0.0
        self.error: OSError | None = None
        self._work = work

    def run(self) -> None:
        begun = time.thread_time()
        try:
            self._work()
        except OSError as error:
            self.error = error
        self.cpu = time.thread_time() - begun


def _write(sock: socket.socket, data: memoryview) -> None:
    send: Callable[[memoryview], object] = sock.sendall
    if sock.family != socket.AF_UNIX:
        with contextlib.suppress(OSError):
            enable(sock)
            sender = Sending(sock)
            send = sender.send_when_free
    for _ in range(_AMOUNT // len(data)):
        send(data)
    sock.shutdown(socket.SHUT_WR)


def _move(mover: str, source: socket.socket, sink: socket.socket) -> None:
    mover_for(mover, source, sink)(source, sink, lambda size: None)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _read(sock: socket.socket) -> None:
    area = mmap.mmap(-1, BUFFER_SIZE)
    size = 0
    while taken := sock.recv_into(area):
        size += taken
    if size != _AMOUNT:
        raise OSError(0, f"only {size} of {_AMOUNT} bytes have come through")
