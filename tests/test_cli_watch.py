"""Watching a migration: what makes qmigctl look, and what it does with what it sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from qmigd.cli.progress import watch
from qmigd.errors import MigrationError
from qmigd.qmp.client import QMPClient
from qmigd.qmp.connecting import connect

from .management import MIGRATION, ManagementTestCase, Scripted, entry


class Shown:
    """Keeps the statuses that it was shown."""

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.statuses: list[str] = []
        self.closed = 0
        self.next: Deferred[None] = Deferred()

    def show(self, entry: Mapping[str, Any]) -> None:
        self.statuses.append(entry["status"])
        last, self.next = self.next, Deferred()
        # not before whoever shows has gone on to wait
        self.reactor.callLater(0, last.callback, None)

    def close(self) -> None:
        self.closed += 1


class WatchTests(ManagementTestCase):
    async def start(self) -> None:
        await super().start()
        self.clock = Clock()
        self.shown = Shown(self.reactor)
        self.client: QMPClient = await connect(self.reactor, self.socket)
        gone: Deferred[None] = Deferred()
        self.client.when_lost(lambda reason: gone.callback(None))

        def close() -> Deferred[None]:
            self.client.close()
            return gone

        self.addCleanup(close)

    def script(self, *entries: dict[str, Any]) -> None:
        self.operations.answers["query-migrate"] = Scripted.Sequence([one] for one in entries)

    def watch(self, role: str | None = "source") -> Deferred[dict[str, Any]]:
        return Deferred.fromCoroutine(watch(self.clock, self.client, MIGRATION, role, self.shown))

    async def test_time(self) -> None:
        """It looks twice a second, up to the end, and leaves no timer behind."""
        self.script(entry("setup"), entry(), entry("completed", ended=1.0))
        watching = self.watch()
        await self.shown.next
        self.clock.advance(0.4)
        self.assertEqual(["setup"], self.shown.statuses)
        self.clock.advance(0.1)
        await self.shown.next
        self.clock.advance(0.5)
        last = await watching
        self.assertEqual("completed", last["status"])
        self.assertEqual(["setup", "active", "completed"], self.shown.statuses)
        self.assertEqual((1, []), (self.shown.closed, self.clock.getDelayedCalls()))

    async def test_event(self) -> None:
        """An event of that migration makes it look at once; one of another does not."""
        self.script(entry("setup"), entry("completed", ended=1.0))
        watching = self.watch()
        await self.shown.next
        self.monitor.event("MIGRATION", {"id": "other", "guest": "g", "status": "active"})
        self.operations.answers["query-guests"] = []
        await self.client.execute("query-guests")  # after which the event has come
        self.assertEqual(["setup"], self.shown.statuses)
        self.monitor.event("MIGRATION", {"id": MIGRATION, "guest": "g", "status": "completed"})
        last = await watching
        self.assertEqual("completed", last["status"])
        self.assertEqual([], self.clock.getDelayedCalls())

    async def test_not_the_end(self) -> None:
        """A status that sounds like the end is none until the daemon says that it has ended."""
        self.script(entry("completed"), entry("failed", ended=1.0))
        watching = self.watch()
        await self.shown.next
        self.clock.advance(0.5)
        self.assertEqual("failed", (await watching)["status"])

    async def test_role(self) -> None:
        """A daemon that is both ends has two entries; the one asked for is shown."""
        both = [entry("active", role="destination"), entry("completed", ended=1.0)]
        self.operations.answers["query-migrate"] = both
        self.assertEqual("source", (await self.watch())["role"])

    async def test_forgotten(self) -> None:
        """A migration that the daemon does not know is an error, and the display is closed."""
        self.operations.answers["query-migrate"] = []
        await self.raised(MigrationError, self.watch())
        self.assertEqual(1, self.shown.closed)
