"""What both sides of a migration have in common: hold on a guest, and an eye on it.

A side looks at its QEMU again and again: whenever an event of QEMU's or of the
peer's gives reason to, and every half second anyway, so that a lost event delays
things and no more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ..backend import Examined, Guest
from ..errors import DeadlineError, GuestError, MigrationError, QmigdError
from ..interfaces import GuestFacts, PeerIdentity, Role, Settings
from ..negotiation.allow import PeerNames
from ..negotiation.plan import Plan
from .services import Services
from .settings import compare, settings_for
from .status import Record

__all__ = ["LOOK", "OVER", "Move"]

log = Logger()

#: Seconds between two looks at QEMU when nothing happens.
LOOK = 0.5

#: Seconds within which a QEMU whose channels have broken has failed by itself, or hangs.
FAILS_WITHIN = 2.0

#: QEMU's statuses that a migration does not come back from.
OVER = frozenset({"completed", "failed", "cancelled"})

#: Seconds that QEMU gets to set its migration up before it is told to cancel.  QEMU 11 that is
#: told so meanwhile may wait, and its guest with it, for a return path that only the peer closes:
#: right behind ``migrate`` 6 of 14 cancels on a busy machine, and none of 900 once it was active.
#: One that is still being connected stays in setup for longer, and can be told so.
SETS_UP_WITHIN = 1.0


#: Seconds within which QEMU has counted how long a migration took that it says to be completed.
COUNTS_WITHIN = 0.5


class Move(ABC):
    """One side of one migration.

    :ivar guest: in this migration's hands once it has been attached.
    :ivar saved: what was set on the guest's QEMU before; put back at the end.
    """

    def __init__(self, services: Services, record: Record, guest: Guest | None = None) -> None:
        self.services = services
        self.record = record
        self.guest = guest
        self.saved = Settings()
        self.qemu_status = "none"
        self._waiter: Deferred[None] | None = None
        self._woken = False
        self._unwatch: Any = None
        self._progress: tuple[Any, ...] = ()
        self._progressed = 0.0

    async def begin(self) -> None:
        """Do it all.  Never raises: how it ended is in the record."""
        error: QmigdError | None = None
        try:
            await self.carry_out()
        except QmigdError as failure:
            error = failure
        except Exception:
            log.failure(
                "{role} side of migration {id} of guest {guest}",
                role=self.record.role,
                id=self.record.id,
                guest=self.record.guest or "?",
            )
            error = MigrationError("qmigd itself failed; its log says where", code="internal")
        await self.settle(error)

    @abstractmethod
    async def carry_out(self) -> None:
        """Do all that may fail.

        :raises QmigdError: it has failed, or somebody wanted an end of it.
        """

    @abstractmethod
    async def settle(self, error: QmigdError | None) -> None:
        """Leave this host in order, and put down in the record how it ended.  Never raises."""

    # waiting

    def wake(self) -> None:
        """Something happened: look at everything now."""
        self._woken = True
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            waiter.callback(None)

    async def rest(self, seconds: float = LOOK) -> None:
        """Wait until something happens, ``seconds`` at the most."""
        if not self._woken:
            self._waiter = Deferred()
            call = self.services.reactor.callLater(seconds, self.wake)
            await self._waiter
            if call.active():
                call.cancel()
        self._woken = False

    def now(self) -> float:
        return float(self.services.reactor.seconds())

    # the guest

    async def attach(self, guest: Guest) -> None:
        """Take hold of the guest."""
        self.guest = guest
        await guest.attach()
        self._unwatch = guest.watch(self._heard)

    def _heard(self, name: str, data: dict[str, Any]) -> None:
        if name == "MIGRATION_PASS" and self.record.role == "source":
            self.record.passed(int(data.get("pass", 0)))
        self.wake()

    async def take_from_peer(self, name: str | None, peer: PeerNames | None = None) -> Examined:
        """Take hold of a guest that waits for the stream of a peer's.

        :param name: ``None``: the only one that waits.
        :param peer: whose certificate it is to come with; ``None``: in clear.
        :raises QmigdError: there is none, or it may not come from there.
        """
        guest = await self.find_waiting(name)
        self.services.security.check_guest(peer, guest.name)
        return await self.take_waiting(guest, "for a migration")

    async def find_waiting(self, name: str | None) -> Guest:
        """Wait for a guest that may be taken; see :meth:`take_from_peer`."""
        self.record.update(step="waiting for the guest's process")
        self.guest = guest = await self.services.guests.waiting(name, self.record.id)
        self.record.guest = guest.name
        return guest

    async def take_waiting(self, guest: Guest, what: str) -> Examined:
        """Take hold of a guest, and see that it waits.

        :param what: for, as the text of an error has it.
        :raises GuestError: it does not.
        """
        await self.attach(guest)
        examined = await guest.examine()
        if examined.status != "inmigrate":
            raise GuestError(
                f"guest {guest.name} does not wait {what}, it is {examined.status}; "
                f"start its process with -incoming defer",
                code="guest-not-waiting",
            )
        if examined.migration != "none":
            # It cannot be told any more where to wait, and is somebody else's to end.
            raise GuestError(
                f"guest {guest.name} does not wait {what}: its process waits for a stream "
                f"by itself, or has had one (its migration is {examined.migration}); start it "
                f"with -incoming defer",
                code="guest-not-waiting",
            )
        return examined

    def note_arrival(
        self, stage: str, *, baseline: bool, secret: bytes = b"", run: bool = True
    ) -> None:
        """Put down in the journal how far a guest that comes in is."""
        self.put_down(stage, baseline=baseline, secret=secret.hex(), run=run)

    def put_down(self, stage: str, **more: Any) -> None:
        """Put down in the journal how far it is, and what is to be put back.

        :param more: what else a daemon has to know that finds it interrupted, JSON.
        """
        assert self.guest is not None
        self.services.journal.write(
            self.record.id,
            self.record.role,
            {
                "guest": self.record.guest,
                "qmp": self.services.guests.where(self.guest),
                "peer": self.record.peer,
                "stage": stage,
                "capabilities": dict(self.saved.capabilities),
                "parameters": dict(self.saved.parameters),
                "objects": list(self.saved.objects),
                **more,
            },
        )

    async def set_up(self, settings: Settings, facts: GuestFacts | None = None) -> Settings:
        """Set, remember what was set before, and return what is really set now.

        :param facts: say what was before.
        """
        assert self.guest is not None
        before, now = await self.guest.apply(settings, facts)
        self.saved = before | self.saved
        return now

    async def tune(self, tunables: Mapping[str, Any], note: Callable[[], None]) -> None:
        """Set migration parameters while it runs; ``note`` puts down what is to be put back."""
        await self.set_up(Settings({}, tunables))
        note()
        self.record.tunables = {**self.record.tunables, **tunables}

    def remember(self, settings: Settings, guest: GuestFacts) -> None:
        """Put down what is set at present of all that is going to be set."""
        self.saved = (
            Settings(
                {
                    name: guest.capabilities[name]
                    for name in settings.capabilities
                    if name in guest.capabilities
                },
                {name: guest.parameters.get(name) for name in settings.parameters},
                dict.fromkeys(settings.objects),
            )
            | self.saved
        )

    async def set_up_plan(
        self,
        plan: Plan,
        guest: GuestFacts,
        role: Role,
        note: Callable[[], None],
        tunables: Mapping[str, Any] | None = None,
        peer: PeerIdentity | None = None,
        *,
        alone: bool = False,
    ) -> Settings:
        """Set all that the plan asks for, and see that it is set.

        :param note: puts down what is to be put back, before anything is set.
        :param tunables: to be set as well.
        :param peer: whom it is with, if in TLS.
        :param alone: there is no qmigd at the other side.
        :raises FeatureError: QEMU took it, but does not have it.
        """
        services = self.services
        wanted = settings_for(
            plan, services.features, guest, role, services.host, peer, alone=alone
        )
        every = wanted | Settings({}, tunables or {})
        self.remember(every, guest)
        note()
        real = await self.set_up(every, guest)
        compare(wanted, real, role)
        return Settings(
            {name: real.capabilities[name] for name in wanted.capabilities},
            {name: real.parameters[name] for name in wanted.parameters},
        )

    async def look(self) -> str:
        """Ask QEMU how far the migration is; returns its status in QEMU's words."""
        assert self.guest is not None
        progress = await self.guest.query_migrate()
        status = str(progress.get("status", "none"))
        ram = progress.get("ram", {})
        mark = (status, ram.get("transferred"), ram.get("postcopy-requests"))
        if mark != self._progress:
            self._progress = mark
            self._progressed = self.now()
        self.record.progressed(progress)
        self.qemu_status = status
        if status not in OVER and status != "none":
            self.record.update(status=status)
        return status

    async def sum_up(self) -> None:
        """Take QEMU's last numbers of a migration that has completed.  Never raises.

        QEMU says that it has before it has counted how long that took.
        """
        end = self.now() + COUNTS_WITHIN
        with suppress(QmigdError):
            while not self.record.progress.get("total-time") and self.now() < end:
                await self.rest(0.02)
                await self.look()

    async def until_completed(self) -> None:
        """Watch a guest come in by a stream that is QEMU's alone, however long that takes.

        :raises MigrationError: QEMU says that it has failed.
        :raises GuestGone: QEMU has ended.
        """
        while True:
            with suppress(DeadlineError):
                status = await self.look()
                if status == "completed":
                    return
                if status in OVER:
                    raise MigrationError(f"the guest's migration {status}: {await self.reason()}")
            await self.rest()

    async def until_over(self) -> None:
        """Wait until QEMU's migration is over, however long QEMU takes, or does not even answer.

        :raises GuestError: the guest's QEMU is gone, or the stream broke in postcopy.
        """
        status = ""
        while status not in OVER and status != "none":
            if status == "postcopy-paused":
                raise GuestError("the stream broke in postcopy, and pages of its RAM are missing")
            if status:
                await self.rest()
            with suppress(DeadlineError):
                status = await self.look()

    async def is_over(self) -> bool:
        """Whether QEMU is done with its migration: it could begin another."""
        assert self.guest is not None
        return await self.look() in {*OVER, "none"} and not await self.guest.holds_on()

    async def over_within(self, seconds: float) -> bool:
        """Whether QEMU's migration comes to an end by then."""
        end = self.now() + seconds
        while not await self.is_over():
            if self.now() >= end:
                return False
            await self.rest(0.05)
        return True

    async def fails_by_itself(self) -> bool:
        """Whether QEMU's migration ends of its own, now that its channels are broken.

        It has to be given the time.  Told to cancel at that very moment, QEMU 7.2 with multifd
        ends in an assertion (yank_unregister_instance), and the guest with it: 3 of 60 tries.
        """
        return await self.over_within(FAILS_WITHIN)

    async def cancel_migration(self) -> None:
        """Tell QEMU to cancel its migration, if it is not over, as soon as QEMU can bear that."""
        assert self.guest is not None
        end = self.now() + SETS_UP_WITHIN
        while (status := await self.look()) == "setup" and self.now() < end:
            await self.rest(0.05)
        if status not in {*OVER, "none"}:
            await self.guest.cancel()

    async def end_migration(self) -> None:
        """Have QEMU end its migration, and wait until it is done with it.

        :raises DeadlineError: it does not, or does not answer, in time.
        """
        assert self.guest is not None
        await self.cancel_migration()
        if not await self.over_within(self.services.deadlines.guest):
            raise DeadlineError(
                "the guest's process does not end its migration although it was cancelled"
            )

    def stalled_for(self) -> float:
        """Seconds since QEMU's migration moved at all."""
        return self.now() - self._progressed if self._progress else 0.0

    async def reason(self) -> str:
        """What QEMU says of why its migration failed."""
        assert self.guest is not None
        try:
            progress = await self.guest.query_migrate()
        except GuestError as error:
            return error.text
        return str(progress.get("error-desc") or "no reason is given")

    async def put_back(self) -> None:
        """Set everything as it was before the migration."""
        if self.guest is None or not self.saved:
            return
        try:
            await self.guest.apply(self.saved)
            self.saved = Settings()
        except QmigdError as error:
            log.warn(
                "guest {guest}: its migration settings could not be put back: {error}",
                guest=self.guest.name,
                error=error.text,
            )

    def leave(self) -> None:
        """There is nothing left to be done."""
        self.let_go()
        self.services.journal.forget(self.record.id, self.record.role)

    def let_go(self) -> None:
        """Leave the guest to itself; harmless when that has been done before."""
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        if self.guest is not None:
            self.guest.detach()
            self.services.guests.free(self.guest)
            self.guest = None
