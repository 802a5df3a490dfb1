"""The source's side of a move: passes over the RAM, then stop and copy, or postcopy.

::

    setup             the channels, the stream's head, the RAM's block
    active            all pages, then those that were written since, and again
    device            the guest stands still; the last pages and its devices
    postcopy-active   instead: the guest runs at the destination, and its pages follow
    completed         the destination has said on the return path that it has it all

One thread does all of this, another reads the return path (``answers``).  The monitor's
thread asks for things, and shuts the channels down to end what they wait in.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from twisted.logger import Logger

from qmigd.errors import QmigdError, StreamError
from qmigd.guests.memory import devices
from qmigd.guests.memory.answers import Answers
from qmigd.guests.memory.channels import Channel, Lost, Pace, by_rdma, connect
from qmigd.guests.memory.devices import DEVICE, MACHINE, State
from qmigd.guests.memory.dirty import Tracker, track
from qmigd.guests.memory.passes import Passes
from qmigd.guests.memory.progress import Progress
from qmigd.guests.memory.ram import PAGE
from qmigd.guests.memory.sending import RAM_SECTION, MainSender, Sender
from qmigd.guests.memory.spreading import MultifdSender
from qmigd.guests.memory.switching import Following, discards
from qmigd.guests.memory.writing import RdmaSender
from qmigd.stream import writer
from qmigd.stream.format import RAM_NAME, RAM_VERSION, RamBlock, SectionType
from qmigd.stream.multifd import Initial
from qmigd.stream.postcopy import Advice, advise, listen, packaged, run
from qmigd.stream.records import END_OF_SECTION
from qmigd.stream.return_path import PageRequest

if TYPE_CHECKING:
    from qmigd.guests.memory.machine import Machine

__all__ = ["DEVICE_SECTION", "Outgoing"]

#: The section's id.
DEVICE_SECTION = 2

log = Logger()


class _Cancelled(Exception):
    """Somebody asked for the end."""


class Outgoing:
    """One migration.

    :ivar progress: how far it is.
    :ivar pace: its bandwidth.
    """

    def __init__(self, machine: Machine, target: str | socket.socket) -> None:
        self.machine = machine
        self.progress = Progress(outgoing=True, on_status=self._on_status)
        self.progress.total = self.progress.remaining = machine.ram.size
        self.pace = Pace(self._limit)
        self._target = target
        self._channels: list[Channel] = []
        self._lock = threading.Lock()
        self._cancelled = False
        self._postcopy = threading.Event()
        self._answers = Answers(self._requested, self._shut_all)
        self._tracker: Tracker | None = None
        self._pages: Sender | None = None
        self._finished = False
        self._away = False
        self._thread = threading.Thread(target=self._run, name="memory-out", daemon=True)
        self._following: Following | None = None

    # -- for the monitor

    def begin(self) -> None:
        self.progress.become("setup")
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def show(self) -> dict[str, Any]:
        return self.progress.show()

    def cancel(self) -> None:
        """Ask for the end; it comes soon."""
        if self.progress.over or self.progress.status == "cancelling":
            return
        if self._away:
            # It is the destination's: it must not run here again.
            self._shut_all()
            return
        self._cancelled = True
        self.progress.become("cancelling")
        self._shut_all()

    def start_postcopy(self) -> None:
        self._postcopy.set()
        self.pace.changed()

    def close(self) -> None:
        """End it at once: the process ends."""
        self._cancelled = True
        self._shut_all()
        self._thread.join(1.0)

    def _shut_all(self) -> None:
        self.pace.release()
        self._answers.release()
        with self._lock:
            for channel in self._channels:
                channel.shut()

    def _on_status(self, status: str) -> None:
        self.machine.event("MIGRATION", {"status": status})

    def _limit(self) -> int:
        settings = self.machine.settings
        if self.progress.status == "postcopy-active":
            return int(settings["max-postcopy-bandwidth"])
        return 0 if self._finished else int(settings["max-bandwidth"])

    # -- the thread

    def _run(self) -> None:
        machine, progress = self.machine, self.progress
        try:
            try:
                self._move()
            except _Cancelled:
                self._failed("cancelled", "it was cancelled")
            except (Lost, OSError) as error:
                reason = self._answers.refusal or getattr(error, "strerror", None) or str(error)
                self._failed("failed", f"the stream to the destination broke: {reason}")
            except StreamError as error:
                self._failed("failed", f"the destination said what is no return path: {error.text}")
            except QmigdError as error:
                self._failed("failed", error.text)
            except Exception as error:
                log.failure("outgoing migration of {name}", name=machine.start.name)
                self._failed("failed", f"the guest's own fault: {error!r}")
        finally:
            machine.throttle(0)
            progress.throttle = 0
            if self._tracker is not None:
                self._tracker.close()
            if self._pages is not None:
                self._pages.close()
            if progress.over:
                self._close_channels()

    def _close_channels(self) -> None:
        with self._lock:
            for channel in self._channels:
                channel.close()
            self._channels.clear()

    def _failed(self, status: str, reason: str) -> None:
        if self._cancelled:
            status, reason = "cancelled", "it was cancelled"
        if self._away:
            # The guest is at the destination, or nowhere.
            status = "postcopy-paused"
        self.progress.error = reason
        self._close_channels()
        if status != "postcopy-paused":
            self.machine.go_on()
        self.progress.become(status)

    def _interrupted(self) -> bool:
        """Whether something cannot wait until the bandwidth allows for it."""
        if self._following is not None:
            return self._cancelled or self._following.urgent
        return self._cancelled or self._postcopy.is_set()

    def _check(self) -> None:
        if self._cancelled:
            raise _Cancelled
        if self._answers.refusal:
            raise Lost(self._answers.refusal)

    def _add(self, sock: socket.socket) -> Channel:
        channel = Channel(sock)
        with self._lock:
            self._channels.append(channel)
        self._check()
        return channel

    def _move(self) -> None:
        machine, progress = self.machine, self.progress
        target = self._target
        main = self._add(target if not isinstance(target, str) else connect(target))
        self._check()
        sender = MainSender(machine.ram, main, progress, self.pace, self._interrupted)
        pages: Sender = sender
        self._pages = pages
        if machine.settings.on("multifd"):
            self._pages = pages = self._spread(main, sender)
        elif by_rdma(target):
            self._pages = pages = self._write(main, sender)
        self._set_up(main)
        pages.sync()
        progress.setup_time = time.monotonic() - progress.begun
        progress.become("active")
        assert self._tracker is not None
        passes = Passes(machine, progress, pages, sender.rate, self._postcopy, self._check)
        dirty = passes.run(self._tracker)
        preempt = None
        if self._postcopy.is_set() and machine.settings.on("postcopy-preempt"):
            # The guest is not to be let go of before this one is there.
            assert isinstance(target, str)
            preempt = self._add(connect(target))
        state, stopped = self._stop()
        dirty |= self._tracker.take()
        if self._postcopy.is_set() and dirty.any():
            pages.sync()
            self._follow(main, sender, preempt, dirty, state, stopped)
        else:
            self._complete(main, sender, pages, dirty, state, stopped)
        self._answers.last()
        self._check()
        if not self._away:
            progress.downtime = time.monotonic() - stopped
        machine.gone()
        progress.become("completed")

    def _spread(self, main: Channel, sender: MainSender) -> MultifdSender:
        """Open the multifd channels."""
        settings, uuid = self.machine.settings, self.machine.start.uuid
        assert isinstance(self._target, str)
        channels = []
        for index in range(settings["multifd-channels"]):
            channel = self._add(connect(self._target))
            channel.send([Initial(uuid, index).encode()])
            channels.append(channel)
        return MultifdSender(
            *(self.machine.ram, sender, main, channels, self.progress, self.pace),
            *(self._interrupted, settings),
        )

    def _write(self, main: Channel, sender: MainSender) -> RdmaSender:
        """Open the connection that pairs the queue pairs."""
        assert isinstance(self._target, str)
        return RdmaSender(
            *(self.machine, sender, main, self._add(connect(self._target))),
            *(self.progress, self.pace, self._interrupted, self._check),
        )

    def _set_up(self, main: Channel) -> None:
        """Send the head of the stream, and begin to watch the RAM."""
        machine = self.machine
        settings, ram = machine.settings, machine.ram
        parts = [writer.header(), writer.configuration(MACHINE)]
        if settings.on("return-path") or settings.on("postcopy-ram"):
            parts += [writer.open_return_path(), writer.ping(1)]
            self._answers.listen(main, ram)
        if settings.on("postcopy-ram"):
            parts.append(advise(Advice(PAGE, PAGE)))
        parts += [
            writer.section_start(SectionType.START, RAM_SECTION, RAM_NAME, 0, RAM_VERSION),
            writer.ram_setup([RamBlock(ram.name, ram.size)]),
            END_OF_SECTION,
            writer.section_end(RAM_SECTION),
        ]
        self._tracker = track(ram)
        self.progress.transferred += main.send(parts)

    # -- the end of precopy

    def _stop(self) -> tuple[State, float]:
        """Have the guest stand still; returns what its devices hold, and since when."""
        self._check()
        stopped = time.monotonic()
        state = self.machine.finish()
        self.progress.become("device")
        self._finished = True
        self.pace.changed()
        return state, stopped

    def _complete(
        self,
        main: Channel,
        sender: MainSender,
        pages: Sender,
        left: NDArray[np.bool_],
        state: State,
        stopped: float,
    ) -> None:
        progress = self.progress
        before = progress.transferred
        sender.last()
        dirty = np.flatnonzero(left)
        while len(dirty):
            self._check()
            count = pages.batch(len(dirty))
            pages.send(dirty[:count], None)
            dirty = dirty[count:]
        pages.sync()
        parts = [*sender.enter(), END_OF_SECTION, writer.section_end(RAM_SECTION)]
        parts += [*self._device(state), writer.end()]
        parts.append(writer.description(devices.description(PAGE)))
        progress.transferred += main.send(parts)
        progress.downtime_bytes = progress.transferred - before
        progress.remaining = 0

    def _follow(
        self,
        main: Channel,
        sender: MainSender,
        preempt: Channel | None,
        left: NDArray[np.bool_],
        state: State,
        stopped: float,
    ) -> None:
        """Let the guest go, and send the rest of its RAM behind it."""
        progress, ram = self.progress, self.machine.ram
        sender.leave()
        progress.remaining = int(np.count_nonzero(left)) * PAGE
        if preempt is not None:
            main.keep_short()
            preempt.hurry()
        following = Following(ram, sender, preempt, left, progress)
        self._following = following
        main.send(discards(ram, left))
        self._check()
        self._away = True
        self.machine.leave()
        main.send(packaged([listen(), *self._device(state), run()]))
        progress.downtime = time.monotonic() - stopped
        progress.become("postcopy-active")
        self.pace.changed()
        before = progress.transferred
        following.send_all(self._check)
        sender.last()
        main.send([*sender.enter(), END_OF_SECTION, writer.section_end(RAM_SECTION), writer.end()])
        progress.postcopy_bytes = progress.transferred - before
        progress.remaining = 0

    @staticmethod
    def _device(state: State) -> list[bytes]:
        """The section of the guest's devices."""
        head = writer.section_start(SectionType.FULL, DEVICE_SECTION, DEVICE, 0, devices.VERSION)
        return [head, state.encode(), writer.section_end(DEVICE_SECTION)]

    def _requested(self, request: PageRequest) -> None:
        """The guest waits for pages at the destination: in the thread of the return path."""
        self.progress.requests += 1
        if self._following is not None:
            self._following.request(request)
            self.pace.changed()
