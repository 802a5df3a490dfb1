"""The source's multifd channels: pages over several connections, a thread each.

With ``zero-copy-send`` the kernel sends the pages from where they are (MSG_ZEROCOPY) and says
later that it is done with them.  A pass ends only when it is: what a page holds goes out as
it is then, and if that was written after it was looked for, it is dirty and goes again.
"""

from __future__ import annotations

import errno
import queue
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qmigd.guests.memory.channels import Channel, Lost, Pace, Rate
from qmigd.guests.memory.progress import Progress
from qmigd.guests.memory.ram import PAGE, Pages, Ram
from qmigd.guests.memory.sending import MainSender, split_zeros
from qmigd.stream.multifd import Packer, runs
from qmigd.stream.records import MULTIFD_FLUSH
from qmigd.transports.zero_copy import MSG_ZEROCOPY, completions, enable

__all__ = ["MultifdSender", "ZeroCopy"]

#: Batches that may wait for each channel, so that none has to wait for the next.
_AHEAD = 1
#: Milliseconds after which one looks whether the channel is still wanted.
_LOOK = 1000


class ZeroCopy:
    """Sends on one channel without a copy, as far as the kernel goes along.

    :ivar missed: sends that it copied all the same.
    """

    def __init__(self, channel: Channel) -> None:
        """:raises OSError: this socket cannot do it."""
        self._channel = channel
        enable(channel.sock)
        self._errors = select.poll()
        self._errors.register(channel.sock, 0)
        self._begun = 0
        self._done = 0
        self.missed = 0

    def send(self, buffers: Sequence[Any]) -> None:
        """Send them; they are in use until :meth:`settle`.

        :raises Lost: the connection broke.
        """
        left = [memoryview(buffer).cast("B") for buffer in buffers]
        sock = self._channel.sock
        while left:
            try:
                count = sock.sendmsg(left, [], MSG_ZEROCOPY)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise Lost(error.strerror or str(error)) from None
                # So much is locked already that the limit is reached: wait, or copy.
                if self._done < self._begun:
                    self._reap()
                    continue
                self._channel.send(left)
                self.missed += 1
                return
            self._channel.sent += count
            self._begun += 1
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]
        self._reap(wait=False)

    def settle(self) -> None:
        """Return when the kernel is done with all of it.

        :raises Lost: the connection broke.
        """
        while self._done < self._begun:
            self._reap()

    def _reap(self, *, wait: bool = True) -> None:
        """Take what the kernel has completed off the socket's error queue."""
        try:
            found = completions(self._channel.sock)
        except OSError as error:
            raise Lost(error.strerror or str(error)) from None
        if found is None and wait:
            if self._channel.closed:
                raise Lost("it was closed")
            # Nothing but an error is waited for, and a completion is told as one.
            if any(events & select.POLLHUP for _, events in self._errors.poll(_LOOK)):
                raise Lost("it was shut down")
        for low, high, copied in found or ():
            self._done += ((high - low) & 0xFFFFFFFF) + 1
            self.missed += copied


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
        self._queue: queue.Queue[tuple[Pages, NDArray[np.bool_] | None]] = queue.Queue(
            _AHEAD * len(channels)
        )
        self._counting = threading.Lock()
        self._state = threading.Condition()
        self._waiting = 0  # batches that are not sent yet
        self._numbers = 0
        self._failure: Lost | None = None
        self._begun = time.monotonic()
        self._sent = 0
        self.rate: Rate = main.rate
        self._ends: list[queue.SimpleQueue[bool]] = []
        self._channels = list(channels)
        self._unsettled: list[ZeroCopy] = []
        self._over = False
        compression = settings["multifd-compression"]
        level = settings["multifd-zlib-level"]
        if compression == "zstd":
            level = settings["multifd-zstd-level"]
        for index, channel in enumerate(channels):
            packer = Packer(page_size=PAGE, compression=compression, level=level)
            zero_copy = ZeroCopy(channel) if settings.on("zero-copy-send") else None
            if zero_copy is not None:
                self._unsettled.append(zero_copy)
            threading.Thread(
                target=self._run,
                args=(channel, packer, zero_copy),
                name=f"memory-multifd-{index}",
                daemon=True,
            ).start()

    def send(self, pages: Pages, present: NDArray[np.bool_] | None) -> None:
        self._pace.wait(self._interrupted)
        self._raise()
        if not self._waiting:
            self._begun, self._sent = time.monotonic(), 0
        with self._state:
            self._waiting += 1
        self._queue.put((pages, present))

    def sync(self) -> None:
        """Wait for what is on its way, and tell the destination where this pass ends."""
        with self._state:
            self._state.wait_for(lambda: not self._waiting or self._failure)
        self._raise()
        for zero_copy in self._unsettled:
            zero_copy.settle()
        self.rate.sent(self._sent, time.monotonic() - self._begun)
        for channel in self._channels:
            with self._counting:
                self._numbers += 1
                number = self._numbers
            count = channel.send([Packer(page_size=PAGE).sync(number)])
            self._progress.transferred += count
        self._main_channel.send([*self._main.enter(), MULTIFD_FLUSH])
        self._main.leave()

    def close(self) -> None:
        """End the threads; what is still on its way is of no use any more."""
        self._over = True
        for _ in self._channels:
            self._queue.put((np.empty(0, np.int64), None))

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self, channel: Channel, packer: Packer, zero_copy: ZeroCopy | None) -> None:
        while True:
            pages, present = self._queue.get()
            if self._over:
                return
            try:
                if self._failure is None:
                    self._packets(channel, packer, zero_copy, pages, present)
            except (Lost, OSError, ValueError) as error:
                self._failure = error if isinstance(error, Lost) else Lost(str(error))
            with self._state:
                self._waiting -= 1
                self._state.notify_all()

    def _packets(
        self,
        channel: Channel,
        packer: Packer,
        zero_copy: ZeroCopy | None,
        pages: Pages,
        present: NDArray[np.bool_] | None,
    ) -> None:
        """Send a batch."""
        normal, zeros = split_zeros(self._ram, pages, present)
        before = channel.sent
        parts: list[Any] = []
        for some, empty in _split(normal * PAGE, zeros * PAGE, packer.room):
            with self._counting:
                self._numbers += 1
                number = self._numbers
            data = runs(self._ram.bytes, some, PAGE)
            packet = packer.pages(number, self._ram.name, some, data, empty)
            if zero_copy is None:
                parts += packet
                continue
            channel.send(packet[:1])
            if len(packet) > 1:
                zero_copy.send(packet[1:])
        if parts:
            channel.send(parts)
        count = channel.sent - before
        self._pace.spend(count)
        with self._counting:
            self._sent += count
            progress = self._progress
            progress.normal += len(normal)
            progress.duplicate += len(zeros)
            progress.transferred += count
            progress.multifd_bytes += count
            if zero_copy is not None:
                progress.copied += zero_copy.missed
                zero_copy.missed = 0


def _split(normal: Pages, zeros: Pages, room: int) -> Iterator[tuple[Pages, Pages]]:
    """Yield what goes into each packet of a batch: some of the one and some of the other."""
    while len(normal) or len(zeros):
        some, normal = normal[:room], normal[room:]
        left = room - len(some)
        empty, zeros = zeros[:left], zeros[left:]
        yield some, empty
