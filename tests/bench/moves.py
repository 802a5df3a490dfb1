"""One guest, moved on and on: each time to a fresh QEMU, by qmigd or by QEMU alone.

*QEMU alone* is a QMP script: it sets the same capabilities and parameters on both
QEMUs, says ``migrate-incoming`` to the one and ``migrate`` to the other, and has its
connections to both made before.  Where qmigd hands a socket over, the script does the
same with a TCP connection of its own.

Both start from the same state, the guest that was moved last and a QEMU that has just
been started, so that what a move leaves behind cannot favour one of them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmigd.transports.sockets import tcp_pair
from tests.bench.course import cpu_seconds
from tests.bench.qmp import Client
from tests.rig.bootsector import Program
from tests.rig.daemons import Daemon, free_ports
from tests.rig.guest import Guest
from tests.rig.process import temporary_directory
from tests.rig.qemus import Qemu

__all__ = ["FEATURES", "Chain", "Moved", "Way", "system_qemu"]

#: The features that a way can ask for or do without.
FEATURES = ("multifd", "postcopy-ram", "postcopy-preempt", "zero-copy-send")

#: Those that only the source's QEMU is told of.
_AT_SOURCE = ("zero-copy-send",)

#: ``max-bandwidth`` that is no limit, in bytes a second.
_UNLIMITED = 100 << 30

#: MiB of RAM beside what the program fills: below it, and for the firmware.
_BESIDE = 16

#: What both daemons call the guest.
_NAME = "guest"


@dataclass(frozen=True)
class Way:
    """How a guest is moved.

    :ivar name: of the way, for the table.
    :ivar path: qmigd's path; ``None`` leaves everything to qmigd; ``baseline`` is the
        control connection itself, with no feature.
    :ivar channels: 1, or so many multifd channels.
    :ivar tls: in TLS; the daemons need certificates.
    """

    name: str
    path: str | None
    channels: int = 1
    tls: bool = False

    @property
    def choice(self) -> dict[str, Any]:
        """The arguments of qmigd's ``migrate`` that lead there."""
        tunables: dict[str, Any] = {"max-bandwidth": _UNLIMITED}
        choice: dict[str, Any] = {"tunables": tunables}
        if self.path == "baseline":
            choice["exclude"] = list(FEATURES)
        elif self.path is not None:
            # A path other than the baseline takes a feature: postcopy-ram, unused, costs least.
            unwanted = "multifd" if self.channels == 1 else "postcopy-ram"
            choice["exclude"] = [unwanted, "postcopy-preempt"]
            choice["require"] = [self.path]
            choice["require" if self.tls else "exclude"].append("tls")
            if self.channels > 1:
                choice["require"].append("multifd")
                tunables["multifd-channels"] = self.channels
        return choice

    @property
    def one_socket(self) -> bool:
        """Whether QEMU gets a connected socket (``fd:``) rather than an address (``tcp:``)."""
        return self.path in ("baseline", "handover")


@dataclass(frozen=True)
class Moved:
    """What one move took.

    :ivar begin: ms from the command to the first ``MIGRATION`` event of the source's QEMU.
    :ivar stream: seconds from there to its ``completed``.
    :ivar downtime: ms from the source's ``STOP`` to the destination's ``RESUME``.
    :ivar whole: ms from the command to that ``RESUME``.
    :ivar cpu: CPU seconds of both QEMUs.
    :ivar daemons_cpu: CPU seconds of both daemons; 0 without.
    :ivar told: ``negotiation-time`` in ``query-migrate``, ms; 0 without qmigd.
    """

    begin: float
    stream: float
    downtime: float
    whole: float
    cpu: float
    daemons_cpu: float = 0.0
    told: float = 0.0


@functools.cache
def system_qemu() -> Qemu:
    """Return the QEMU that the host has.

    :raises RuntimeError: it has none.
    """
    program = shutil.which("qemu-system-x86_64")
    if program is None:
        raise RuntimeError("there is no qemu-system-x86_64 here")
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"version (\S+)", told.stdout)
    return Qemu("system", found[1] if found else "?", (program,))


class _Stop:
    """One QEMU that the guest passes through, with the benchmark's own line to it."""

    def __init__(self, guest: Guest, path: str) -> None:
        self.guest = guest.start()
        self.client = Client(path)

    def when(self, name: str, status: str | None = None) -> float:
        """Return when that event happened, waiting for it."""
        return self.client.until(
            lambda event: event.name == name and event.data.get("status") == status
        ).time

    def begun(self) -> float:
        """Return when its migration began."""
        return self.client.until(lambda event: event.name == "MIGRATION").time

    def set(self, capabilities: Mapping[str, bool], parameters: Mapping[str, Any]) -> None:
        """Set up its migration."""
        states = [{"capability": name, "state": on} for name, on in capabilities.items()]
        self.client.execute("migrate-set-capabilities", {"capabilities": states})
        self.client.execute("migrate-set-parameters", dict(parameters))

    def close(self) -> None:
        """End the QEMU."""
        self.client.close()
        self.guest.close()


class Chain:
    """A guest on its way; a context manager that ends it.

    :ivar ram: bytes that its program has filled, none of them zero.
    """

    def __init__(self, here: Daemon, there: Daemon, mib: int) -> None:
        """Start the guest.

        :param here: the daemon of every source, which is started; it has no guests of its own.
        :param there: the daemon of every destination.
        :param mib: non-zero RAM that the guest has.
        """
        self.ram = mib << 20
        self._here, self._there = here, there
        self._program = Program(pages=self.ram // 4096, pages_per_tick=0, ticks_per_second=19)
        self._plans: dict[Way, Mapping[str, Any]] = {}
        self._directory = temporary_directory()
        self._count = 0
        self._source = self._start(incoming=False)

    def _start(self, *, incoming: bool) -> _Stop:
        self._count += 1
        path = os.path.join(self._directory, str(self._count))
        guest = Guest(
            system_qemu(),
            f"guest {self._count}",
            incoming=incoming,
            memory=(self.ram >> 20) + _BESIDE,
            program=self._program,
            extra=(
                "-mem-prealloc",  # first touches of RAM would cost more than the stream
                *("-chardev", f"socket,id=bench,path={path},server=on,wait=off"),
                *("-mon", "chardev=bench,mode=control"),
            ),
        )
        try:
            return _Stop(guest, path)
        except BaseException:
            guest.close()
            raise

    def pair(self, way: Way, *, alone_first: bool) -> tuple[Moved, Moved]:
        """Move the guest twice: by qmigd, and by QEMU alone in the same way.

        :return: qmigd's, and QEMU's.
        """
        if alone_first and way in self._plans:
            alone = self.alone(way)
            return self.by_qmigd(way), alone
        ours = self.by_qmigd(way)
        return ours, self.alone(way)

    def by_qmigd(self, way: Way) -> Moved:
        """Move the guest by qmigd.

        :raises RuntimeError: it did not move, or otherwise than was asked for.
        """
        with self._leg() as (source, destination):
            daemons = (self._here, self._there)
            marks = [len(daemon.monitor.events) for daemon in daemons]
            for daemon, stop in zip(daemons, (source, destination), strict=True):
                daemon.execute("guest-add", name=_NAME, qmp=f"unix:{stop.guest.qmp_path}")
            clocks = _Clocks(source, destination, daemons)
            begun = time.time()
            answer = self._here.execute("migrate", guest=_NAME, uri=self._there.uri, **way.choice)
            for daemon, mark in zip(daemons, marks, strict=True):
                _wait_for_end(daemon, answer["id"], mark)
            cpu, daemons_cpu = clocks.spent()
            entry = self._here.execute("query-migrate", id=answer["id"])[0]
            self._check(way, entry["plan"])
            for daemon in daemons:
                daemon.execute("guest-remove", name=_NAME)
            return _moved(
                source, destination, begun, cpu, daemons_cpu, entry.get("negotiation-time", 0.0)
            )

    def _check(self, way: Way, plan: Mapping[str, Any]) -> None:
        wanted = "handover" if way.path == "baseline" else way.path
        channels = sum(channel["name"] == "multifd" for channel in plan["channels"]) or 1
        found = plan["path"], channels, "tls" in plan["features"]
        if wanted is not None and found != (wanted, way.channels, way.tls):
            raise RuntimeError(f"moved otherwise than was asked for: {plan}")
        self._plans[way] = plan

    def alone(self, way: Way) -> Moved:
        """Move the guest by a script, with what qmigd has chosen for that way before."""
        plan = self._plans[way]
        features = plan["features"]
        capabilities = {
            "return-path": True,
            "events": True,
            **{name: name in features for name in FEATURES},
        }
        parameters: dict[str, Any] = {}
        if "multifd" in features:
            parameters["multifd-channels"] = plan["agreements"]["multifd"]["channels"]
        with self._leg() as (source, destination):
            address = f"tcp:127.0.0.1:{free_ports()[0]}"
            clocks = _Clocks(source, destination)
            begun = time.time()
            there = {name: on for name, on in capabilities.items() if name not in _AT_SOURCE}
            destination.set(there, parameters)
            source.set(capabilities, {"max-bandwidth": _UNLIMITED, **parameters})
            if plan["path"] == "handover":
                address = "fd:stream"
                _give_socket(source.client, destination.client)
            destination.client.execute("migrate-incoming", {"uri": address})
            source.client.execute("migrate", {"uri": address})
            source.when("MIGRATION", "completed")
            destination.when("MIGRATION", "completed")
            return _moved(source, destination, begun, *clocks.spent())

    @contextlib.contextmanager
    def _leg(self) -> Iterator[tuple[_Stop, _Stop]]:
        """The QEMU that has the guest, and the next one, which has it afterwards."""
        destination = self._start(incoming=True)
        self._source.client.forget()  # how it came here itself
        try:
            yield self._source, destination
            if destination.when("RESUME") and not destination.guest.running():
                raise RuntimeError("the guest does not run after its move")
        except BaseException:
            destination.close()
            raise
        self._source.close()
        self._source = destination

    def check(self) -> None:
        """See that the guest's RAM is right, after all its moves."""
        self._source.guest.check_ram()

    def close(self) -> None:
        """End the guest."""
        self._source.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Clocks:
    """CPU time from here on."""

    def __init__(self, source: _Stop, destination: _Stop, daemons: Sequence[Daemon] = ()) -> None:
        self._guests = [stop.guest.process.pid for stop in (source, destination)]
        self._daemons = [daemon.process.pid for daemon in daemons]
        self._before = self._sums()

    def _sums(self) -> tuple[float, float]:
        return sum(map(cpu_seconds, self._guests)), sum(map(cpu_seconds, self._daemons))

    def spent(self) -> tuple[float, float]:
        """Return the seconds of the QEMUs, and of the daemons."""
        (guests, daemons), now = self._before, self._sums()
        return now[0] - guests, now[1] - daemons


def _wait_for_end(daemon: Daemon, migration: str, mark: int) -> None:
    def over(data: dict[str, Any]) -> bool:
        return data["id"] == migration and data["status"] in ("completed", "failed", "cancelled")

    event = daemon.monitor.wait_event("MIGRATION", where=over, since=mark)
    if event.data["status"] != "completed":
        raise RuntimeError(f"not moved: {event.data['error']['desc']}")


def _give_socket(source: Client, destination: Client) -> None:
    """Give each of the two one end of a TCP connection."""
    near, far = tcp_pair()
    with near, far:
        for client, end in ((source, near), (destination, far)):
            client.execute("getfd", {"fdname": "stream"}, end.fileno())


def _moved(
    source: _Stop, destination: _Stop, begun: float, cpu: float, daemons_cpu: float, told: float = 0
) -> Moved:
    began, stopped, resumed = source.begun(), source.when("STOP"), destination.when("RESUME")
    return Moved(
        begin=(began - begun) * 1000,
        stream=source.when("MIGRATION", "completed") - began,
        downtime=(resumed - stopped) * 1000,
        whole=(resumed - begun) * 1000,
        cpu=cpu,
        daemons_cpu=daemons_cpu,
        told=told,
    )
