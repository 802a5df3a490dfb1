"""For authors of features: two daemons and a guest that moves between them, in one process.

::

    class MyFeatureTests(TestCase):
        async def test_it_is_used(self) -> None:
            async with Pair(reactor, features=[my_feature]) as pair:
                moved = await pair.move()
            self.assertIn(my_feature.name, moved.plan["features"])

Everything is real but for the number of processes: two whole daemons with state of their own, which
shake hands over TCP on loopback or over a unix socket, and a *memory* guest at each
(docs/memory-guest), one that runs and one that waits.  A move is checked: the guest runs at the
destination alone, has counted on where it stopped, and each page of its RAM holds what it wrote.
A test takes a fraction of a second.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from qmigd.daemon.config_file import parse
from qmigd.daemon.service import QmigdService
from qmigd.errors import GuestError, QmigdError
from qmigd.features.registry import collect, load_features
from qmigd.guests.memory.monitor import Monitor
from qmigd.guests.memory.options import Start, from_table
from qmigd.interfaces import IFeature
from qmigd.qmp.client import QMPClient
from qmigd.qmp.connecting import connect
from qmigd.waiting import with_deadline

__all__ = ["GUEST", "Host", "Moved", "Pair"]

#: What both hosts call the guest.
GUEST = "guest"

#: Statuses of a migration that is over.
_ENDED = ("completed", "failed", "cancelled")

#: Seconds that anything may take before it counts as hung.
_DEADLINE = 60.0
#: Seconds between two looks at what tells nobody.
_LOOK = 0.005
#: Ports that the guest of a destination may listen on.
_PORTS = 4
#: Bytes a second with which a move by precopy does not end by itself.
_SLOW = 1 << 20


@dataclass(frozen=True)
class Moved:
    """What came of a move.

    :ivar status: ``completed``, ``failed`` or ``cancelled``.
    :ivar plan: what was negotiated, as in ``query-migrate``; empty where it did not come to that.
    :ivar error: why it failed, a sentence; or empty.
    :ivar source: all that the source says of it (``query-migrate``).
    :ivar destination: all that the destination does; empty where it never heard of it.
    """

    status: str
    plan: Mapping[str, Any]
    error: str
    source: Mapping[str, Any]
    destination: Mapping[str, Any]


class Host:
    """One host: a daemon, and a guest that it knows as :data:`GUEST`.

    :ivar uri: where other daemons reach it.
    :ivar directory: where its files are.
    """

    def __init__(
        self,
        reactor: Any,
        name: str,
        features: Mapping[str, IFeature],
        transport: str,
        policy: Mapping[str, Any],
    ) -> None:
        self.name = name
        self.directory = Path(tempfile.mkdtemp(prefix="qmigd-"))
        self.uri = f"unix:{self.directory}/peer"
        ports = ""
        if transport == "tcp":
            first, *others = _free_ports(1 + _PORTS)
            self.uri = f"tcp:127.0.0.1:{first}"
            ports = f"{others[0]}-{others[-1]}"
        self._reactor = reactor
        self._failure = ""
        self._client: QMPClient | None = None
        self._guest: Monitor | None = None
        self._number = 0
        text = _toml(
            {
                "daemon": {
                    "listen": [self.uri],
                    "direct-ports": ports,
                    "monitor": f"unix:{self.directory}/monitor",
                    "state-dir": f"{self.directory}/state",
                    "zero-copy": "off",
                },
                "policy": policy,
            }
        )
        config = parse(text, name, dict(os.environ), os.getuid())
        self.service = QmigdService(
            reactor, config, dict(features), None, on_failure=self._does_not_start
        )

    @property
    def guest(self) -> Monitor:
        """The guest: ``execute`` runs its QMP commands, ``machine`` is what they are about."""
        assert self._guest is not None, "this host has no guest at present"
        return self._guest

    def _does_not_start(self, reason: str) -> None:
        self._failure = reason

    async def start(self) -> None:
        """Start the daemon; returns once it answers."""
        self.service.startService()
        address = f"unix:{self.directory}/monitor"

        async def answers() -> bool:
            if self._failure:
                raise AssertionError(f"{self.name} does not start: {self._failure}")
            try:
                self._client = await connect(self._reactor, address)
            except GuestError:
                return False
            return True

        await _until(self._reactor, answers, f"{self.name} to start")

    async def put(self, table: Mapping[str, Any], *, waits: bool) -> None:
        """Have it know a new guest, in place of the one before.

        :param table: as ``memory`` in the configuration.
        :param waits: it waits for a guest to come in; or else it runs.
        """
        await self.take_away()
        self._number += 1
        path = f"{self.directory}/{self._number}.qmp"
        name = uuid.uuid5(uuid.NAMESPACE_URL, GUEST)
        start = Start(GUEST, from_table(table), path, "defer" if waits else None, False, name)
        self._guest = guest = Monitor(self._reactor, start)
        guest.ended.addCallback(lambda _: Deferred.fromCoroutine(guest.close()))
        await guest.listen()
        await self.execute("guest-add", name=GUEST, qmp=f"unix:{path}")

    async def take_away(self) -> None:
        """Have it know no guest; the one that it knew is gone."""
        guest, self._guest = self._guest, None
        if guest is not None:
            await guest.close()
            if self._client is not None:
                await self.execute("guest-remove", name=GUEST)

    def execute(self, command: str, **arguments: Any) -> Deferred[Any]:
        """Run a management command (docs/commands); fires with what it returned."""
        assert self._client is not None
        return self._client.execute(command, **arguments)

    async def migration(self, migration: str) -> dict[str, Any]:
        """What it knows of a migration; empty if nothing."""
        try:
            (entry,) = await self.execute("query-migrate", id=migration)
        except QmigdError:
            return {}
        return dict(entry)

    async def stop(self) -> None:
        """End guest and daemon, and remove its files."""
        client, self._client = self._client, None
        await self.take_away()
        if client is not None:
            client.close()
        await self.service.stopService()
        shutil.rmtree(self.directory, ignore_errors=True)


class Pair:
    """Two hosts: the guest runs at ``here``, and ``there`` waits for it.

    It is an async context manager, which starts and ends everything.
    """

    def __init__(
        self,
        reactor: Any,
        features: Iterable[IFeature] = (),
        *,
        source_features: Iterable[IFeature] = (),
        destination_features: Iterable[IFeature] = (),
        guest: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
        transport: Literal["tcp", "unix"] = "tcp",
    ) -> None:
        """:param features: what both hosts have beside all that is installed.
        :param source_features: what ``here`` has besides, and ``there`` has not.
        :param destination_features: what ``there`` has besides, and ``here`` has not.
        :param guest: as ``memory`` in the configuration; left out: 8 MiB, full and busy.
        :param policy: as ``[policy]`` in the configuration, for both hosts.
        :param transport: ``tcp`` over loopback, or ``unix``: nothing leaves the kernel's memory,
            and the path ``direct`` is closed.
        :raises AssertionError: one of the features is none; the log says what it lacks.
        """
        self._reactor = reactor
        self._guest = {"size": "8M", "dirty-rate": "8M/s", "fill": "random", **(guest or {})}
        every, mine, yours = tuple(features), tuple(source_features), tuple(destination_features)
        self.here, self.there = (
            Host(reactor, name, _with((*every, *more), lacks), transport, policy or {})
            for name, more, lacks in (("here", mine, yours), ("there", yours, mine))
        )

    async def start(self) -> Pair:
        """Start both daemons and both guests."""
        await self.here.start()
        await self.there.start()
        await self.here.put(self._guest, waits=False)
        await self.there.put(self._guest, waits=True)
        return self

    async def stop(self) -> None:
        """End everything; nothing is left."""
        await self.here.stop()
        await self.there.stop()

    async def __aenter__(self) -> Pair:
        try:
            return await self.start()
        except BaseException:
            await self.stop()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def move(self, *, postcopy: bool = False, check: bool = True, **arguments: Any) -> Moved:
        """Move the guest from ``here`` to ``there``.

        :param postcopy: switch it to postcopy as soon as it is on its way.
        :param check: a move that fails, or harms the guest, is an ``AssertionError``.
        :param arguments: of the command ``migrate`` (docs/commands): ``require``, ``exclude``,
            ``tunables`` ...
        """
        if postcopy:
            tunables = {"max-bandwidth": _SLOW, **arguments.pop("tunables", {})}
            arguments["tunables"] = tunables
        done = await self.here.execute("migrate", guest=GUEST, uri=self.there.uri, **arguments)
        migration = str(done["id"])
        if postcopy:
            await self._until_status(self.here, migration, "active")
            await self.here.execute("migrate-start-postcopy", guest=GUEST)
        source = await self._until_status(self.here, migration)
        destination: dict[str, Any] = {}
        if await self.there.migration(migration):
            destination = await self._until_status(self.there, migration)
        moved = Moved(
            status=source["status"],
            plan=source.get("plan", {}),
            error=source.get("error", {}).get("desc", ""),
            source=source,
            destination=destination,
        )
        if check:
            if moved.status != "completed":
                raise AssertionError(f"The guest was not moved: {moved.error}")
            await self.check()
        return moved

    async def turn(self) -> None:
        """What was ``there`` is ``here`` from now on, and a fresh guest waits at the other."""
        self.here, self.there = self.there, self.here
        await self.there.put(self._guest, waits=True)

    async def check(self) -> None:
        """See that the guest runs ``there``, there alone, and has come to no harm.

        :raises AssertionError: it does not, or has.
        """
        source, destination = self.here.guest, self.there.guest
        clock = destination.machine.clock()
        if not clock["running"] or source.machine.state == "running":
            raise AssertionError(
                f"The guest is {source.machine.state} here and {destination.machine.state} there."
            )
        places = clock["places"]
        gaps = [one for one, after in pairwise(places) if one["to"] != after["from"]]
        if gaps or source.machine.clock()["ticks"] != places[-1]["from"]:
            raise AssertionError(f"The guest has not counted on without a gap: {places}.")
        for monitor in (source, destination):
            wrong = (await monitor.execute("check-ram")).get("wrong")
            if wrong:
                raise AssertionError(f"The guest's RAM is not what it wrote: {wrong}.")

    async def _until_status(self, host: Host, migration: str, *statuses: str) -> dict[str, Any]:
        """Wait until a migration has one of these statuses at a host, or is over there."""
        found: dict[str, Any] = {}

        async def look() -> bool:
            found.update(await host.migration(migration))
            return found["status"] in (*statuses, *_ENDED)

        await _until(self._reactor, look, f"the migration's {statuses or 'end'} {host.name}")
        return found


def _with(features: Iterable[IFeature], lacks: Iterable[IFeature]) -> dict[str, IFeature]:
    """Return all features that are installed, and these; one of these before its namesake.

    :param lacks: not even if they are installed.
    """
    wanted = tuple(features)
    added = collect((type(one).__name__, one) for one in wanted)
    if missing := [type(one).__name__ for one in wanted if one not in added.values()]:
        raise AssertionError(f"{', '.join(missing)} is no feature as it is; the log says why.")
    unwanted = {one.name for one in lacks}
    installed = {name: one for name, one in load_features().items() if name not in unwanted}
    return dict(sorted({**installed, **added}.items()))


async def _until(reactor: Any, condition: Callable[[], Any], what: str) -> None:
    async def poll() -> None:
        while not await condition():
            await deferLater(reactor, _LOOK)

    await with_deadline(reactor, Deferred.fromCoroutine(poll()), _DEADLINE, what)


def _free_ports(count: int) -> range:
    """Return that many consecutive TCP ports of 127.0.0.1 on which nobody listens."""
    # Below those that the kernel hands out; each process begins elsewhere.
    start = 10000 + (os.getpid() * 64 + time.monotonic_ns() // 1000) % 20000
    for first in range(start, start + 2000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return range(first, first + count)
    raise OSError(f"There are no {count} free ports.")


def _toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Return tables of strings, booleans and lists of strings as TOML."""
    lines = []
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_value(value)}" for key, value in table.items()]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return "[" + ", ".join(map(_value, value)) + "]"
