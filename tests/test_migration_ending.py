"""When QEMU is told to cancel its migration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from qmigd.backend import Guest
from qmigd.errors import DeadlineError, QmigdError
from qmigd.migration.move import SETS_UP_WITHIN, Move
from qmigd.migration.services import Deadlines, Services
from qmigd.migration.status import Records


class _Source:
    """A guest that is being migrated; it is cancelled as soon as it is told to, or never."""

    def __init__(self, *, ends: bool = True) -> None:
        self.status = "setup"
        self.cancels = 0
        self.numbers: dict[str, int] = {}
        self._ends = ends

    async def query_migrate(self) -> dict[str, Any]:
        return {"status": self.status, **self.numbers}

    async def holds_on(self) -> bool:
        return False

    async def cancel(self) -> None:
        self.cancels += 1
        self.status = "cancelled" if self._ends else "cancelling"


class _Ending(Move):
    """A move of which nothing is left but its end."""

    async def carry_out(self) -> None:
        await self.end_migration()

    async def settle(self, error: QmigdError | None) -> None:
        """It is settled as it is."""


class SummaryTests(SynchronousTestCase):
    """QEMU 7.2 says that a migration has completed before it has its numbers."""

    def summed_up(self, source: _Source) -> tuple[Clock, Deferred[None], dict[str, Any]]:
        clock = Clock()
        services = SimpleNamespace(reactor=clock, deadlines=Deadlines())
        record = Records(lambda *_: None).new("1", "vm", "source", "tcp:peer")
        move = _Ending(cast(Services, services), record, cast(Guest, source))
        return clock, Deferred.fromCoroutine(move.sum_up()), record.progress

    def test_late(self) -> None:
        """It is asked until it has."""
        source = _Source()
        source.status, source.numbers = "completed", {"total-time": 0, "downtime": 0}
        clock, done, progress = self.summed_up(source)
        clock.pump([0.02] * 3)
        self.assertNoResult(done)
        source.numbers = {"total-time": 4100, "downtime": 4}
        clock.pump([0.02])
        self.successResultOf(done)
        self.assertEqual((4100, 4), (progress["total-time"], progress["downtime"]))

    def test_never(self) -> None:
        """And not for ever."""
        clock, done, _ = self.summed_up(_Source())
        clock.pump([0.02] * 30)
        self.successResultOf(done)


class EndingTests(SynchronousTestCase):
    def end(self, source: _Source) -> Deferred[None]:
        """Have its migration ended."""
        self.clock = Clock()
        services = SimpleNamespace(reactor=self.clock, deadlines=Deadlines())
        record = Records(lambda *_: None).new("1", "vm", "source", "tcp:peer")
        move = _Ending(cast(Services, services), record, cast(Guest, source))
        return Deferred.fromCoroutine(move.carry_out())

    def test_setup(self) -> None:
        """Not while it sets its migration up, but as soon as that is done."""
        source = _Source()
        ending = self.end(source)
        self.clock.pump([0.05] * 5)
        self.assertEqual(0, source.cancels)
        source.status = "active"
        self.clock.pump([0.05] * 2)
        self.successResultOf(ending)
        self.assertEqual(1, source.cancels)

    def test_over_by_itself(self) -> None:
        """Not at all where it fails meanwhile."""
        source = _Source()
        ending = self.end(source)
        source.status = "failed"
        self.clock.pump([0.05] * 2)
        self.successResultOf(ending)
        self.assertEqual(0, source.cancels)

    def test_long_setup(self) -> None:
        """After a while even so: it may be calling somebody who never answers."""
        source = _Source(ends=False)
        ending = self.end(source)
        self.clock.pump([0.05] * int(SETS_UP_WITHIN / 0.05 + 2))
        self.assertEqual(1, source.cancels)
        self.assertNoResult(ending)
        self.clock.pump([1] * int(Deadlines().guest + 1))
        self.failureResultOf(ending, DeadlineError)
