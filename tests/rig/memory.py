"""The memory guest in tests: in a process of its own, started here or by a daemon."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from tests.rig.daemons import Daemon
from tests.rig.netns import Namespace
from tests.rig.news import DEADLINE, ask_until
from tests.rig.preloaded import MEMORY
from tests.rig.process import Process, temporary_directory
from tests.rig.qmp import Lost, QmpClient

__all__ = ["MemoryGuest", "moved_whole"]


class MemoryGuest:
    """One memory guest, through its QMP socket.

    :ivar qmp_path: the socket.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str] = (),
        *,
        path: str = "",
        namespace: Namespace | None = None,
        before: Sequence[str] = (),
        preloaded: bool = False,
    ) -> None:
        """:param argv: for a guest that :meth:`start` starts.
        :param namespace: where its network is then, if not here.
        :param before: what it is started by, a prefix.
        :param path: the QMP socket of one that somebody else starts.
        :param preloaded: it need not load its own Python, if it runs here (see ``preloaded``).
        """
        self.name = name
        self.directory = temporary_directory()
        self.qmp_path = path or os.path.join(self.directory, "qmp")
        self._argv = argv
        self._prefix = (*(namespace.prefix if namespace else ()), *before)
        self._preloaded = preloaded and not self._prefix
        self._process: Process | None = None
        self._monitor: QmpClient | None = None

    @classmethod
    def of(cls, daemon: Daemon, name: str = "vm") -> MemoryGuest:
        """The guest of a daemon's configuration, whoever starts it."""
        path = os.path.join(daemon.config["daemon"]["state-dir"], f"{name}.qmp")
        return cls(f"{name} at {daemon.name}", path=path)

    def start(self) -> MemoryGuest:
        """Start it, and return once it answers."""
        return self.launch().wait()

    def launch(self) -> MemoryGuest:
        """Start it."""
        log = os.path.join(self.directory, "log")
        given = ["-name", "vm", *self._argv, "-qmp", f"unix:{self.qmp_path},server=on,wait=off"]
        if self._preloaded:
            argv = [MEMORY, *given]
            self._process = Process.fork(argv, log=log, environment={}, directory=self.directory)
        else:
            argv = [*self._prefix, sys.executable, "-m", MEMORY, *given]
            self._process = Process.start(argv, log=log)
        return self

    def wait(self) -> MemoryGuest:
        """Wait until it answers."""
        ask_until(lambda: self.alive, lambda: f"{self.name} to answer; {self.log}")
        return self

    def adopt(self) -> MemoryGuest:
        """Know the process that a daemon has started."""
        pid = int(self.clock()["here"].rpartition(":")[2])
        self._process = Process.adopt(pid)
        return self

    @property
    def process(self) -> Process:
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        """What it has printed, if it was started here."""
        path = os.path.join(self.directory, "log")
        with contextlib.suppress(FileNotFoundError), open(path) as file:
            return file.read()
        return ""

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(Lost, OSError):
            self.qmp("query-status")
            return True
        return False

    def qmp(self, command: str, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
        """Run a QMP command."""
        if self._monitor is None or self._monitor.lost:
            self._monitor = QmpClient.connect(self.qmp_path)
        return self._monitor.execute(command, arguments, **more)

    @property
    def monitor(self) -> QmpClient:
        """The connection, with the events."""
        self.qmp("query-status")
        assert self._monitor is not None
        return self._monitor

    def status(self) -> str:
        """Its run state; ``"gone"`` if it does not answer."""
        try:
            return str(self.qmp("query-status")["status"])
        except (Lost, OSError):
            return "gone"

    def clock(self) -> dict[str, Any]:
        """How far it has counted, and where."""
        return dict(self.qmp("query-clock"))

    def wait_ticks(self, count: int) -> None:
        """Wait until it has counted so much further."""
        wanted = self.clock()["ticks"] + count
        ask_until(lambda: self.clock()["ticks"] >= wanted, f"{count} ticks of {self.name}")

    def wait_migration(self, *statuses: str) -> dict[str, Any]:
        """Wait until its migration has one of these statuses."""

        def look() -> dict[str, Any]:
            found: dict[str, Any] = self.qmp("query-migrate")
            return found if found.get("status") in statuses else {}

        return ask_until(look, lambda: f"{statuses} of {self.name}: {self.qmp('query-migrate')}")

    def ram(self) -> bytes:
        """Its RAM; it should not run."""
        path = os.path.join(self.directory, "ram")
        size = self.qmp("query-memory-size-summary")["base-memory"]
        self.qmp("pmemsave", val=0, size=size, filename=path)
        with open(path, "rb") as file:
            return file.read()

    def check(self) -> None:
        """Check that its RAM is what it wrote."""
        wrong = self.qmp("check-ram", deadline=DEADLINE).get("wrong")
        if wrong:
            raise AssertionError(f"{self.name}: {wrong}")

    def close(self) -> None:
        """End it and remove everything; harmless when that has happened."""
        with contextlib.suppress(Lost, OSError):
            self.qmp("quit")
        if self._monitor is not None:
            self._monitor.close()
        if self._process is not None:
            self._process.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> MemoryGuest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def moved_whole(source: MemoryGuest, destination: MemoryGuest, *, ended: bool = False) -> None:
    """Check that a guest has gone over whole, and runs at the destination alone.

    :param ended: the source's process was ended after the move.
    """
    if destination.status() != "running":
        raise AssertionError(f"After the move the guest is {destination.status()}.")
    destination.wait_ticks(2)
    destination.check()
    here = destination.clock()
    for before, after in zip(here["places"], here["places"][1:], strict=False):
        if before["to"] != after["from"]:
            raise AssertionError(f"It has run twice, or not at all, in between: {here['places']}")
    if ended:
        return
    if source.status() != "postmigrate":
        raise AssertionError(f"After the move the source is {source.status()}.")
    there = source.clock()
    if there["running"] or there["ticks"] != here["places"][-1]["from"]:
        raise AssertionError(f"It has gone on at the source: {there}, {here}")
    source.check()
