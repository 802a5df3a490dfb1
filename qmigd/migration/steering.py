"""What a user asks of a migration that is under way: postcopy, tunables, an end of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

from ..backend import Guest
from ..errors import FeatureError, GuestError, MigrationError, QmigdError
from ..interfaces import Settings
from ..transports.uri import FdAddress
from .ownership import Peer, Released
from .proposing import Cancelled
from .settling import Settling
from .switching import BANDWIDTH, Hold, start_postcopy

__all__ = ["Steering"]

log = Logger()


class Steering(Settling):
    """A source that does what its user asks for, at the moment when that can be done."""

    _release_taken: Deferred[None] | None = None
    _bandwidth: int | None = None
    _over = False
    _stands_still = False
    _given_up = False

    @cached_property
    def _tuning(self) -> DeferredLock:
        """Who has it sets the guest's migration parameters, and nobody else does."""
        return DeferredLock()

    def cancel(self, reason: str) -> None:
        """Ask for the end.

        :raises MigrationError: it is too late: the guest is the destination's.  But a postcopy
            that stands still can be given up: it is left to the two QEMUs.
        """
        if self._released is Released.YES:
            if not self._stands_still:
                raise MigrationError(
                    "it is too late to cancel: the guest belongs to the destination already"
                )
            self._given_up = True
            self.wake()
            return
        self.cancelled = reason
        self.services.requests.withdraw(self.record.id, Cancelled(reason))
        self.wake()
        if self._started:
            return
        if self.control is not None:
            self.control.abandon(Cancelled(reason))
        elif self.calling is not None:
            self.calling.cancel()

    async def start_postcopy(self) -> None:
        """Switch the guest over now; its remaining RAM follows.

        :raises FeatureError: this migration was negotiated without postcopy.
        :raises MigrationError: it is not possible now.
        """
        if not self.record.can_postcopy or self.control is None or self.guest is None:
            raise self._why_no_postcopy()
        self.record.can_postcopy = False
        self.record.update(step="switching over to postcopy")
        guest = self.guest
        switching = self._tuning.run(lambda: Deferred.fromCoroutine(self._switch(guest)))
        if isinstance(self.uri, FdAddress):
            # Whoever waits for this may be the one who has to hand a channel over meanwhile.
            switching.addErrback(self._not_switched)
        else:
            await switching

    def _not_switched(self, failure: Failure) -> None:
        if not failure.check(QmigdError):
            log.failure("switch of migration {id}", failure, id=self.record.id)
        log.warn(
            "migration {id} was not switched to postcopy: {error}",
            id=self.record.id,
            error=failure.getErrorMessage(),
        )

    async def _switch(self, guest: Guest) -> None:
        assert self._path is not None
        await self._path.complete(self._while_under_way)
        hold = Hold(guest) if guest.postcopy_without_pages else None
        try:
            if hold is not None:
                self.saved = Settings({}, {BANDWIDTH: self._bandwidth}) | self.saved
                self._note(self._stage)
                await hold.take()
            # The fence (see ownership): from here on QEMU does not let it run again by itself.
            await guest.stop()
            if self._released is Released.YES:
                return  # it has just arrived by precopy, and is being handed over
            await self._release_and_switch(guest, hold)
        finally:
            if hold is not None:
                await hold.drop()
            self.wake()

    async def _release_and_switch(self, guest: Guest, hold: Hold | None) -> None:
        try:
            self._release(postcopy=True)
            self._release_taken = Deferred()
            await self._release_taken
            await start_postcopy(guest, hold, self._while_under_way)
        except GuestError as error:
            # With the guest stopped, precopy comes to its end at once.
            log.info(
                "the guest's process does not switch to postcopy any more: {error}",
                error=error.text,
            )

    async def _while_under_way(self, seconds: float) -> None:
        if not self._over:
            await deferLater(self.services.reactor, seconds)
        if self._over:
            raise GuestError("the migration is over")

    async def _end_switch(self) -> None:
        """Have a switch that is not through yet let go of the guest, and wait for that."""
        self._over = True
        if self._path is not None:
            self._path.abandon()
        if self._release_taken is not None:
            taken, self._release_taken = self._release_taken, None
            taken.errback(MigrationError("the migration was over before the switch to postcopy"))
        await self._tuning.run(lambda: None)

    def _why_no_postcopy(self) -> QmigdError:
        plan = self.plan
        if plan is None or self.record.status != "active":
            return MigrationError("postcopy can be started while RAM is being moved, not now")
        for name, feature in self.services.features.items():
            if "postcopy" in feature.abilities and name not in plan.features:
                reason = plan.left_out.get(name, "it was not chosen")
                return FeatureError(f"this migration cannot switch to postcopy: {name}: {reason}")
        return MigrationError("this migration is switching to postcopy already")

    async def set_tunables(self, tunables: Mapping[str, Any]) -> None:
        """Set migration parameters while it runs."""
        if self.guest is None or not self._started:
            raise MigrationError("the migration is not under way yet, or over")
        # Not while the stream is held: what is set then would be lost.
        await self._tuning.run(lambda: Deferred.fromCoroutine(self._tune(tunables)))

    async def _tune(self, tunables: Mapping[str, Any]) -> None:
        await self.tune(tunables, lambda: self._note(self._stage))

    def _release(self, *, postcopy: bool) -> None:
        """From here on the guest is the destination's."""
        assert self.control is not None
        if self.control.failure is not None:
            raise self.control.failure
        self._note("released")
        self._released = Released.YES
        self.record.owner = "destination"
        if self._peer is Peer.NEVER_RAN:
            self._peer = Peer.UNKNOWN
        if self._path is not None:
            self._path.hold()
        self.control.machine.release({"run": self.was_running, "postcopy": postcopy})
        self.control.flush()
