"""The switch to postcopy: the stream is held, and QEMU is asked where enough is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock, deferLater
from twisted.trial.unittest import SynchronousTestCase

from qmigd.backend import Guest
from qmigd.errors import GuestError, GuestGone
from qmigd.interfaces import Settings
from qmigd.migration.switching import BANDWIDTH, HELD, LEFT, Hold, start_postcopy

#: What its owner has set.
_SET = 1 << 30


class _Source:
    """A guest on its way out; ``looks`` has status and bytes left at each look."""

    name = "vm"

    def __init__(self, *looks: tuple[str, int]) -> None:
        self.done: list[Any] = []
        self.bandwidth = _SET
        self.gone = False
        self._looks: Iterator[tuple[str, int]] = iter(looks)

    async def apply(self, settings: Settings) -> tuple[Settings, Settings]:
        if self.gone:
            raise GuestGone("QEMU has closed the connection")
        before, self.bandwidth = self.bandwidth, settings.parameters[BANDWIDTH]
        self.done.append(self.bandwidth)
        return Settings({}, {BANDWIDTH: before}), settings

    async def query_migrate(self) -> dict[str, Any]:
        status, left = next(self._looks)
        self.done.append("look")
        return {"status": status, "ram": {"remaining": left}}

    async def start_postcopy(self) -> None:
        self.done.append("start")


class SwitchTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()

    def switch(self, source: _Source, *, held: bool = True) -> Deferred[None]:
        """Begin to switch."""
        guest = cast(Guest, source)
        hold = Hold(guest) if held else None

        async def run() -> None:
            try:
                if hold is not None:
                    await hold.take()
                await start_postcopy(guest, hold, lambda seconds: deferLater(self.clock, seconds))
            finally:
                if hold is not None:
                    await hold.drop()

        return Deferred.fromCoroutine(run())

    def test_enough_is_left(self) -> None:
        """The stream is held until QEMU has really switched, and flows as before then."""
        source = _Source(("active", LEFT), ("active", LEFT), ("postcopy-device", LEFT))
        done = self.switch(source)
        self.assertEqual(source.done, [HELD, "look", "start", "look"])
        self.assertNoResult(done)
        self.clock.advance(1)
        self.successResultOf(done)
        self.assertEqual(source.done[4:], ["look", _SET])

    def test_all_is_sent(self) -> None:
        """QEMU is left to itself, without a hold, and not asked where it then completes."""
        source = _Source(("active", LEFT - 1), ("completed", 0))
        done = self.switch(source)
        self.assertEqual(source.done, [HELD, "look", _SET])
        self.clock.advance(1)
        self.assertIn("completed", self.failureResultOf(done, GuestError).value.text)
        self.assertEqual(source.done[3:], [HELD, "look", _SET])

    def test_more_is_found(self) -> None:
        """What the guest had dirtied last, QEMU finds late; then it switches after all."""
        source = _Source(("active", 0), ("active", LEFT), ("postcopy-active", LEFT))
        done = self.switch(source)
        self.clock.advance(1)
        self.successResultOf(done)
        self.assertEqual(source.done, [HELD, "look", _SET, HELD, "look", "start", "look", _SET])

    def test_lost_meanwhile(self) -> None:
        """A QEMU that is lost ends it, with that as the reason."""
        source = _Source(("active", 0))
        done = self.switch(source)
        source.gone = True
        self.clock.advance(1)
        self.failureResultOf(done, GuestGone)

    def test_not_needed(self) -> None:
        """A QEMU that looks first whether it is done is just asked."""
        source = _Source()
        self.successResultOf(self.switch(source, held=False))
        self.assertEqual(source.done, ["start"])
