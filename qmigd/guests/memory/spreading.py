"""The source's multifd channels: pages over several connections, a thread each.

Pages that go as they are get their packets before, many at once, and the threads have nothing
to do but to hand those to the kernel.  Pages that are compressed, or sent without a copy, get
their packets in the threads.

A pass ends only when all that it sent is gone, with ``zero-copy-send`` when the kernel is done
with the pages too.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from qmigd.guests.memory.channels import Channel, Lost, Pace, Rate
from qmigd.guests.memory.progress import Progress
from qmigd.guests.memory.ram import PAGE, Pages, Ram
from qmigd.guests.memory.sending import MainSender, split_zeros
from qmigd.guests.memory.uncopied import ZeroCopy
from qmigd.guests.memory.vector import Vector, packets
from qmigd.stream.multifd import PACKET_SIZE, Packer, runs
from qmigd.stream.records import MULTIFD_FLUSH

__all__ = ["MultifdSender", "ahead"]

#: Pages that packets are made for at once at the most: what Python does for them is to take
#: little time beside the sending.
_MANY = 8192
#: The same where each channel makes its own, and as long as one does not know how fast it goes.
_SOME = 512
#: Seconds that they may take: so long it takes at the least until something else is done.
_AHEAD = 0.02
#: Packets that a channel takes at once at the most.
_TURN = 8
#: Pages in a packet.
_ROOM = PACKET_SIZE // PAGE


class _Outlet(NamedTuple):
    """A channel, and what its packets are made with."""

    channel: Channel
    packer: Packer
    zero_copy: ZeroCopy | None


#: Something to be sent through whichever channel is free; it returns the bytes.
_Job: TypeAlias = Callable[[_Outlet], int]


class MultifdSender:
    """Hands batches of pages to the channels."""

    def __init__(
        self,
        ram: Ram,
        main: MainSender,
        main_channel: Channel,
        channels: Sequence[Channel],
        progress: Progress,
        pace: Pace,
        interrupted: Callable[[], bool],
        settings: Any,
    ) -> None:
        self._ram = ram
        self._main = main
        self._main_channel = main_channel
        self._progress = progress
        self._pace = pace
        self._interrupted = interrupted
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._counting = threading.Lock()
        self._state = threading.Condition()
        self._waiting = 0  # jobs that are not done yet
        self._numbers = 0
        self._failure: Lost | None = None
        self._begun = time.monotonic()
        self._sent = 0
        self.rate: Rate = main.rate
        self._over = False
        compression = settings["multifd-compression"]
        copied = not settings.on("zero-copy-send")
        self._plain = compression == "none" and copied
        level = settings["multifd-zlib-level"]
        if compression == "zstd":
            level = settings["multifd-zstd-level"]
        self._outlets = [
            _Outlet(
                channel,
                Packer(page_size=PAGE, compression=compression, level=level),
                None if copied else ZeroCopy(channel),
            )
            for channel in channels
        ]
        for index, outlet in enumerate(self._outlets):
            if self._plain:
                outlet.channel.keep_short()
            threading.Thread(
                target=self._run, args=(outlet,), name=f"memory-multifd-{index}", daemon=True
            ).start()

    # -- what is to be sent

    def batch(self, left: int) -> int:
        if self._plain:
            return ahead(self._sent, time.monotonic() - self._begun)
        # The last ones go over all channels too.
        return min(_SOME, max(_ROOM, left // len(self._outlets)))

    def send(self, pages: Pages, present: NDArray[np.bool_] | None) -> None:
        self._pace.wait(self._interrupted)
        jobs: list[_Job] = [partial(self._pack, pages, present)]
        if self._plain:
            jobs = list(self._packets(*split_zeros(self._ram, pages, present)))
        with self._state:
            # No more ahead than it takes for no channel to wait.
            self._state.wait_for(lambda: self._waiting <= len(self._outlets) or self._failure)
            self._raise()
            if not self._waiting:
                self._begun, self._sent = time.monotonic(), 0
            self._waiting += len(jobs)
        for job in jobs:
            self._queue.put(job)

    def sync(self) -> None:
        """Wait for what is on its way, and tell the destination where this pass ends."""
        with self._state:
            self._state.wait_for(lambda: not self._waiting or self._failure)
        self._raise()
        for _, _, zero_copy in self._outlets:
            if zero_copy is not None:
                zero_copy.settle()
        self.rate.sent(self._sent, time.monotonic() - self._begun)
        for channel, packer, _ in self._outlets:
            count = channel.send([packer.sync(self._number(1))])
            self._progress.transferred += count
        self._main_channel.send([*self._main.enter(), MULTIFD_FLUSH])
        self._main.leave()

    def close(self) -> None:
        """End the threads; what is still on its way is of no use any more."""
        self._over = True
        for _ in self._outlets:
            self._queue.put(None)

    def _number(self, count: int) -> int:
        """Return the first one of so many numbers for packets."""
        with self._counting:
            first = self._numbers + 1
            self._numbers += count
        return first

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    # -- the threads

    def _run(self, outlet: _Outlet) -> None:
        while (job := self._queue.get()) is not None and not self._over:
            try:
                if self._failure is None:
                    count = job(outlet)
                    self._pace.spend(count)
                    with self._counting:
                        self._sent += count
                        self._progress.transferred += count
                        self._progress.multifd_bytes += count
            except (Lost, OSError, ValueError) as error:
                self._failure = error if isinstance(error, Lost) else Lost(str(error))
            with self._state:
                self._waiting -= 1
                if self._waiting in (0, len(self._outlets)) or self._failure:
                    self._state.notify_all()

    # -- packets of pages as they are

    def _packets(self, normal: Pages, zeros: Pages) -> Iterator[_Job]:
        if len(normal):
            places, count = normal * PAGE, -(-len(normal) // _ROOM)
            heads = self._outlets[0].packer.heads(self._number(count), self._ram.name, places)
            vector, at = packets(heads, _ROOM, self._ram.host.ctypes.data, places)
            turn = min(_TURN, -(-count // len(self._outlets)))
            ends = [*at[turn::turn].tolist(), len(vector)]
            for first, end in zip(at[::turn].tolist(), ends, strict=True):
                yield partial(self._put, vector[first:end], heads)
            with self._counting:
                self._progress.normal += len(normal)
        if len(zeros):
            yield partial(self._write, normal[:0], zeros)

    def _put(self, vector: Vector, _heads: NDArray[np.uint8], outlet: _Outlet) -> int:
        """Send packets; their heads have to live until then."""
        return outlet.channel.send_vector(vector)

    # -- packets that a channel makes for itself

    def _pack(self, pages: Pages, present: NDArray[np.bool_] | None, outlet: _Outlet) -> int:
        """Send a batch, compressed or without a copy."""
        return self._write(*split_zeros(self._ram, pages, present), outlet)

    def _write(self, normal: Pages, zeros: Pages, outlet: _Outlet) -> int:
        """Send packets of pages that have been looked at."""
        channel, packer, zero_copy = outlet
        before = channel.sent
        parts: list[Any] = []
        for some, empty in _split(normal * PAGE, zeros * PAGE):
            data = runs(self._ram.bytes, some, PAGE)
            packet = packer.pages(self._number(1), self._ram.name, some, data, empty)
            if zero_copy is None:
                parts += packet
                continue
            channel.send(packet[:1])
            if len(packet) > 1:
                zero_copy.send(packet[1:])
        if parts:
            channel.send(parts)
        with self._counting:
            progress = self._progress
            progress.normal += len(normal)
            progress.duplicate += len(zeros)
            if zero_copy is not None:
                progress.copied += zero_copy.missed
                zero_copy.missed = 0
        return channel.sent - before


def ahead(sent: int, seconds: float) -> int:
    """Return how many pages it is worth to make packets for, when so much went out so far.

    :param sent: bytes.
    """
    if not sent or seconds <= 0:
        return _SOME
    return max(_SOME, min(_MANY, int(sent / seconds * _AHEAD) // PAGE))


def _split(normal: Pages, zeros: Pages) -> Iterator[tuple[Pages, Pages]]:
    """Yield what goes into each packet of a batch: some of the one and some of the other."""
    while len(normal) or len(zeros):
        some, normal = normal[:_ROOM], normal[_ROOM:]
        left = _ROOM - len(some)
        empty, zeros = zeros[:left], zeros[left:]
        yield some, empty
