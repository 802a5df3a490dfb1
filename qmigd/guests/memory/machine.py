"""The guest as a whole: its RAM and its workload, whether it runs, and its migration.

Run states are QEMU's.  Whoever calls in here is the monitor, in one thread; the migration's
own threads use what :class:`Machine` says is theirs.

::

    running <-> paused                  stop, cont
    running, paused -> finish-migrate   the source's RAM is being completed
    finish-migrate -> postmigrate       all of it is at the destination
    finish-migrate -> running, paused   it failed, or was cancelled
    inmigrate -> running, paused        loaded; running if it is to run by itself
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from qmigd.errors import ArgumentError, GuestError
from qmigd.guests.memory.channels import by_rdma, check
from qmigd.guests.memory.contents import Pattern
from qmigd.guests.memory.devices import State
from qmigd.guests.memory.faults import can_serve
from qmigd.guests.memory.incoming import Incoming
from qmigd.guests.memory.options import Start, moved_note
from qmigd.guests.memory.outgoing import Outgoing
from qmigd.guests.memory.progress import BUSY
from qmigd.guests.memory.ram import PAGE, Ram
from qmigd.guests.memory.settings import Settings
from qmigd.guests.memory.verbs import usable
from qmigd.guests.memory.workload import Workload
from qmigd.interfaces import No

__all__ = ["Machine"]

#: Told of an event: its name and its data; in any thread.
Notify = Callable[[str, Mapping[str, Any]], None]

#: Seconds that the virtual CPU has to come to a stand; it may itself wait for a page.
_STAND_STILL = 5.0


_machines = count(1)


def _place() -> str:
    """Return what a place where a guest runs is called: host, process, and which one in that."""
    number = next(_machines)
    return f"{socket.gethostname()}:{os.getpid()}" + (f".{number}" if number > 1 else "")


class Machine:
    """One guest.

    :ivar start: the command line that it was made of.
    :ivar ram: its RAM.
    :ivar settings: migration capabilities and parameters.
    :ivar on_end: called when the process is to end by itself, after a failed load.
    :ivar failed: why it did, or empty.
    """

    def __init__(self, start: Start, notify: Notify, on_end: Callable[[], None]) -> None:
        """:raises OSError: there is no room for its RAM."""
        self.start = start
        self.ram = Ram(start.options.size, allocated=start.options.prealloc)
        self.settings = Settings(self._busy, faults=start.incoming is None or can_serve())
        self.on_end = on_end
        self.failed = ""
        self._notify = notify
        self._options = start.options
        self._workload = self._new_workload()
        self._history: list[dict[str, Any]] = []
        self._moved = moved_note(start.qmp)
        self._here = _place()
        self._lock = threading.RLock()
        self._outgoing: Outgoing | None = None
        self._incoming: Incoming | None = None
        self._autostart = not start.paused
        self._state = "inmigrate" if start.incoming else "paused"
        self._closed = False
        self._ran = False  # it was running before it was stopped for its migration
        if start.incoming is None:
            self._workload.fill_all()
            if self._autostart:
                self._run()

    def _new_workload(self) -> Workload:
        options = self._options
        pages = options.window // PAGE
        pattern = Pattern(options.pattern, self.ram.pages - pages, pages)
        return Workload(self.ram, pattern, options.dirty_rate, filled=options.fill == "random")

    def _busy(self) -> bool:
        return any(
            migration is not None and migration.progress.status in BUSY
            for migration in (self._outgoing, self._incoming)
        )

    # -- its state

    @property
    def state(self) -> str:
        """Its run state in QEMU's words."""
        return self._state

    def stop(self) -> None:
        """Stop it; one that waits for its stream will be paused once it is loaded.

        :raises GuestError: it does not come to a stand: it waits for a page of its RAM.
        """
        with self._lock:
            if self._state == "inmigrate":
                self._autostart = False
            elif self._state == "running":
                if not self._workload.stop(_STAND_STILL):
                    # It is not to go on when the page has come.
                    self._state = "paused"
                    raise GuestError("the virtual CPU waits for a page that does not come")
                self._note_place()
                self._state = "paused"
                self._notify("STOP", {})
            elif self._state == "finish-migrate":
                self._ran = False

    def cont(self) -> None:
        """Let it run; one that waits for its stream runs as soon as it is loaded.

        :raises GuestError: it cannot.
        """
        with self._lock:
            if self._state == "inmigrate":
                self._autostart = True
            elif self._state == "finish-migrate":
                raise GuestError("The migration is just being completed")
            elif self._state != "running":
                self._run()

    def _run(self) -> None:
        self._moved.unlink(missing_ok=True)
        if self._history and self._history[-1]["at"] == self._here:
            del self._history[-1]["to"]  # it goes on where it stopped
        else:
            self._history.append({"at": self._here, "from": self._workload.ticks})
        self._state = "running"
        self._workload.run()
        self._notify("RESUME", {})

    def _note_place(self) -> None:
        if self._history and "to" not in self._history[-1]:
            self._history[-1]["to"] = self._workload.ticks

    def clock(self) -> dict[str, Any]:
        """Return how far it has counted, and where it has run: ``query-clock``."""
        history = [dict(place) for place in self._history]
        if history and "to" not in history[-1]:
            history[-1]["to"] = self._workload.ticks
        return {
            "ticks": self._workload.ticks,
            "written": self._workload.written,
            "running": self._state == "running",
            "here": self._here,
            "places": history,
        }

    def check(self) -> str | None:
        """Return what is wrong with the RAM, or ``None``; it has to stand still.

        This may wait for pages.
        """
        return self._workload.wrong()

    def save(self, start: int, size: int, path: str) -> None:
        """Write a part of the RAM to a file; pages that have not come yet are zero bytes there.

        :raises ArgumentError: there is no such part.
        :raises OSError: the file cannot be written.
        """
        if not 0 <= start <= start + size <= self.ram.size:
            raise ArgumentError(f"The RAM ends at {self.ram.size:#x}")
        with open(path, "wb") as file:
            # By read(), which fills no hole.
            while size and (data := os.pread(self.ram.descriptor, min(size, 1 << 20), start)):
                file.write(data)
                start, size = start + len(data), size - len(data)

    def faults(self) -> dict[str, Any]:
        """Return how long the guest waited for pages in the last postcopy: ``query-faults``."""
        waits = sorted(self._incoming.latencies) if self._incoming is not None else []
        shown: dict[str, Any] = {"count": len(waits)}
        if waits:
            for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
                at = min(len(waits) - 1, int(len(waits) * share))
                shown[name] = round(waits[at] * 1e6)  # microseconds
        return shown

    def query_migrate(self) -> dict[str, Any]:
        for migration in (self._outgoing, self._incoming):
            if migration is not None:
                return migration.show()
        return {}

    def holds_on(self) -> bool:
        """Whether a migration still has threads at work."""
        return any(
            migration is not None and migration.alive
            for migration in (self._outgoing, self._incoming)
        )

    # -- migrations, for the monitor

    def migrate(self, target: str | socket.socket) -> None:
        """Begin to move it away.

        :raises GuestError: it cannot be moved now.
        :raises ArgumentError: it cannot be moved there.
        """
        with self._lock:
            if self._busy() or self.holds_on():
                raise GuestError("There's a migration process in progress")
            if self._state == "inmigrate":
                raise GuestError("Guest is waiting for an incoming migration")
            if self._state == "postmigrate":
                raise GuestError("Can't migrate the vm that was paused due to previous migration")
            self._check_end(target)
            self._incoming = None
            self._outgoing = Outgoing(self, target)
            self._outgoing.begin()

    def receive(self, source: str | socket.socket, *, stay: bool) -> None:
        """Have it wait for the stream.

        :param stay: the process does not end where the load fails.
        :raises GuestError: it does not wait for one.
        :raises ArgumentError: nobody can listen there.
        """
        with self._lock:
            if self._state != "inmigrate":
                raise GuestError("'-incoming' was not specified on the command line")
            if self._incoming is not None and self._incoming.progress.status != "none":
                raise GuestError("The incoming migration has already been started")
            self._check_end(source)
            self._incoming = Incoming(self, source, stay=stay)
            self._incoming.begin()

    def _check_end(self, end: str | socket.socket) -> None:
        if isinstance(end, str):
            check(end)
        several = self.settings.on("multifd") or self.settings.on("postcopy-preempt")
        if not isinstance(end, str) and several:
            raise ArgumentError("Migration requires multi-channel URIs (e.g. tcp)")
        if by_rdma(end):
            for name in ("multifd", "postcopy-ram"):
                if self.settings.on(name):
                    raise ArgumentError(f"RDMA and {name} do not go together")
            if isinstance(answer := usable(self.ram.size), No):
                raise GuestError(f"RDMA cannot be used: {answer.reason}")

    def cancel(self) -> None:
        """Ask for the end of the outgoing migration."""
        if self._outgoing is not None:
            self._outgoing.cancel()

    def start_postcopy(self) -> None:
        """Ask for the switch.

        :raises GuestError: nothing can be switched.
        """
        if self._outgoing is None or self._outgoing.progress.over:
            raise GuestError("Migration must be started before postcopy can be started")
        if not self.settings.on("postcopy-ram"):
            raise GuestError(
                "Enable postcopy with migrate_set_capability before the start of migration"
            )
        self._outgoing.start_postcopy()

    def set_parameters(self, values: Mapping[str, Any]) -> None:
        """:raises ArgumentError: one is unknown, or does not fit."""
        self.settings.change(values)
        if self._outgoing is not None:
            self._outgoing.pace.changed()

    # -- for the migration's threads

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        """Tell of something, where ``events`` is on."""
        if self.settings.on("events"):
            self._notify(name, data)

    def throttle(self, per_cent: int) -> None:
        """Take some of its time from the virtual CPU."""
        self._workload.throttle = per_cent

    def finish(self) -> State:
        """Stop it at the source for good, and return what its devices hold.

        :raises GuestError: it does not come to a stand.
        """
        with self._lock:
            self._ran = self._state == "running"
            if not self._workload.stop(_STAND_STILL):
                raise GuestError("the virtual CPU does not come to a stand")
            if self._ran:
                self._note_place()
                self._notify("STOP", {})
            self._state = "finish-migrate"
            workload = self._workload
            return State(
                *(workload.ticks, workload.written, self._ran),
                {**self._options.program, "size": self.ram.size},
                self._history,
            )

    def leave(self) -> None:
        """It is about to run at the destination."""
        self._moved.touch(mode=0o600)

    def gone(self) -> None:
        """All of it is at the destination."""
        with self._lock:
            self._state = "postmigrate"
            self.leave()

    def go_on(self) -> None:
        """It is not, after all: let it go on here."""
        with self._lock:
            if self._state == "finish-migrate":
                if self._ran:
                    self._run()
                else:
                    self._state = "paused"

    def load(self, state: State) -> None:
        """Take over what the devices of the source held.

        :raises ValueError: it is of no use here.
        """
        program = dict(state.program)
        size = program.pop("size", self.ram.size)
        if size != self.ram.size:
            raise ValueError(f"the guest has {size} bytes of RAM, and this one {self.ram.size}")
        options = self._options.with_program(program)
        with self._lock:
            self._options = options
            self._workload.end()
            self._workload = self._new_workload()
            self._workload.ticks, self._workload.written = state.ticks, state.written
            self._history = state.history
            self._autostart = self._autostart and state.running

    def loaded(self) -> None:
        """Its devices are loaded: it runs, if it is to."""
        with self._lock:
            if self._state == "inmigrate":
                self._state = "paused"
                if self._autostart:
                    self._run()

    # -- the end

    def close(self) -> None:
        """End it, with whatever it is doing; harmless when that has been done."""
        if self._closed:
            return
        self._closed = True
        self._workload.stop(0)
        for migration in (self._outgoing, self._incoming):
            if migration is not None:
                migration.close()
        self._workload.end()
        if not self.holds_on() and not self._workload.alive:
            self.ram.close()
