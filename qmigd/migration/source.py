"""The source's side of a migration, from the first connection to the outcome.

::

    negotiate   greeting, reply, the guest, the features' parameters; the plan
    set up      QEMU's capabilities and parameters, read back on both sides
    move        START; the channels; QEMU's ``migrate``
    hand over   RELEASE: from here on the guest is the destination's
    settle      settings put back; on a failure the guest runs here again

Who owns the guest at each moment, and why, is in :mod:`qmigd.migration.ownership`.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from twisted.internet.defer import Deferred, DeferredLock
from twisted.internet.task import deferLater
from twisted.logger import Logger

from ..errors import (
    DeadlineError,
    FeatureError,
    GuestError,
    GuestGone,
    MigrationError,
    PeerGone,
    QmigdError,
)
from ..handshake.events import (
    Event,
    Outcome,
    StatusSaid,
)
from ..interfaces import (
    DIRECT,
    Guest,
    GuestFacts,
    PeerIdentity,
    Settings,
)
from ..negotiation.plan import Plan
from ..negotiation.policy import Policy
from ..transports.uri import Address
from .move import LOOK, OVER
from .ownership import Act, Peer, Released, on_source_failure
from .paths import SourcePath
from .proposing import Cancelled, Proposing
from .services import Services
from .status import Record
from .switching import BANDWIDTH, Hold, start_postcopy
from .verdicts import ask

__all__ = ["Outgoing"]

log = Logger()

#: Seconds within which a QEMU whose channels have broken has failed by itself, or hangs.
FAILS_WITHIN = 2.0

_PEER = {True: Peer.RUNS, False: Peer.NEVER_RAN, None: Peer.UNKNOWN}


class Outgoing(Proposing):
    """One guest on its way out."""

    def __init__(
        self,
        services: Services,
        record: Record,
        uri: Address,
        policy: Policy,
        tunables: Mapping[str, Any],
        tls_hostname: str | None = None,
    ) -> None:
        super().__init__(services, record, uri, policy, tunables, tls_hostname)
        self._path: SourcePath | None = None
        self._started = False
        self._released = Released.NO
        self._peer = Peer.NEVER_RAN
        self._outcome: Outcome | None = None
        self._ready: Mapping[str, Any] | None = None
        self._release_taken: Deferred[None] | None = None
        self._completed: float | None = None
        self._stage = ""
        self._tuning = DeferredLock()
        self._bandwidth: int | None = None
        self._over = False
        self._lingers = False

    # what the daemon's commands call

    async def begin(self) -> None:
        """Do it all.  Never raises: how it ended is in the record."""
        error: QmigdError | None = None
        try:
            await self._move(await self.negotiate())
        except QmigdError as failure:
            error = failure
        except Exception:
            log.failure(
                "migration {id} of guest {guest}", id=self.record.id, guest=self.record.guest
            )
            error = MigrationError("qmigd itself failed; its log says where", code="internal")
        await self._settle(error)

    async def probe(self, guest: Guest) -> Plan:
        """Negotiate as for a migration, and leave it at that.

        :raises QmigdError: a migration would be refused, and why.
        """
        self.guest = guest
        error: QmigdError | None = None
        try:
            await self.attach(guest)
            await self.negotiate(probe=True)
            assert self.plan is not None
            return self.plan
        except QmigdError as failure:
            error = failure
            raise
        finally:
            if self.control is not None:
                self._part(error)
            self.let_go()

    def cancel(self, reason: str) -> None:
        """Ask for the end.

        :raises MigrationError: it is too late: the guest is the destination's.
        """
        if self._released is Released.YES:
            raise MigrationError(
                "it is too late to cancel: the guest belongs to the destination already"
            )
        self.cancelled = reason
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
        await self._tuning.run(lambda: Deferred.fromCoroutine(self._switch(guest)))

    async def _switch(self, guest: Guest) -> None:
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
            log.info("QEMU does not switch to postcopy any more: {error}", error=error.text)

    async def _while_under_way(self, seconds: float) -> None:
        if not self._over:
            await deferLater(self.services.reactor, seconds)
        if self._over:
            raise GuestError("the migration is over")

    async def _end_switch(self) -> None:
        """Have a switch that is not through yet let go of the guest, and wait for that."""
        self._over = True
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
        await self.set_up(Settings({}, tunables))
        self._note(self._stage)
        self.record.tunables = {**self.record.tunables, **tunables}

    # the move

    async def _move(self, facts: GuestFacts) -> None:
        services, guest, control, plan = self.services, self.guest, self.control, self.plan
        assert guest is not None and control is not None and plan is not None
        negotiated = set().union(*(services.features[name].tunables for name in plan.features))
        own = {key: value for key, value in self.tunables.items() if key not in negotiated}
        self._raise_if_over()
        peer = PeerIdentity(self.hostname, control.peer_subject) if self.in_tls else None
        await self.set_up_plan(plan, facts, "source", lambda: self._note("started"), own, peer)

        self._bandwidth = facts.parameters.get(BANDWIDTH)
        self._started = True
        control.machine.start()
        control.flush()
        self.record.update(step="moving RAM")
        if self.baseline:
            await guest.migrate(await control.take_socket())
            self.record.under_way()
        else:
            control.listen(self._said)
            control.stay_alive(services.deadlines.peer)
            await self._until_ready()
            self._path = SourcePath(
                services, plan, self.record.id, self.secret, self.wake, self.uri, self.tls_side
            )
            # Over a unix socket there is none, and the plan does without.
            host = str(getattr(control.transport.getPeer(), "host", ""))
            channel = await self._path.open(host, self._ready or {})
            await self._set_off(channel)
            self.record.under_way()
            self.record.can_postcopy = any(
                "postcopy" in services.features[name].abilities for name in plan.features
            )
        await self._watch()
        if self.baseline:
            self.record.owner = "destination"
        else:
            await self._hand_over()

    async def _set_off(self, channel: str | socket.socket) -> None:
        """Tell QEMU to migrate; some transports are connected before it answers."""
        assert self.guest is not None
        try:
            await self.guest.migrate(channel)
        except (GuestGone, DeadlineError):
            raise
        except GuestError as error:
            if not isinstance(channel, str):
                raise
            raise MigrationError(
                f"QEMU cannot migrate to {channel}: {error.text}{self._hint()}"
            ) from None

    async def _until_ready(self) -> None:
        """Wait until the destination's QEMU waits for the stream."""
        end = self.now() + self.services.deadlines.guest
        while self._ready is None:
            self._raise_if_over()
            if self.now() >= end:
                raise DeadlineError("the destination's QEMU was not ready for the stream in time")
            await self.rest()

    async def _watch(self) -> None:
        """Follow QEMU until its migration has completed.

        :raises QmigdError: it has failed, or must not go on.
        """
        while True:
            status = await self.look()
            if status == "completed":
                return
            if status in OVER:
                self._raise_if_over()
                raise MigrationError(f"QEMU's migration {status}: {await self._why()}")
            if status == "postcopy-paused":
                raise MigrationError(
                    "the stream broke in postcopy; the guest is the destination's, and RAM that "
                    "had not arrived is still here: do not end this QEMU"
                )
            self._raise_if_over()
            stall = self.services.deadlines.stall
            if self.stalled_for() > stall and status not in ("pre-switchover",):
                raise MigrationError(
                    f"nothing has moved for {stall:g} seconds (QEMU's status: {status})"
                    f"{'' if self._has_moved() else self._hint()}",
                    code="deadline",
                )
            await self.rest()

    async def _why(self) -> str:
        reason = await self.reason()
        return reason if self._has_moved() else reason + self._hint()

    def _has_moved(self) -> bool:
        return bool(self.record.progress.get("ram", {}).get("transferred", 0))

    def _hint(self) -> str:
        """What to do where the two QEMUs cannot reach each other."""
        by = self._path.by if self._path is not None else None
        if by is not None:
            return f"; with '--exclude {by}' the guest is moved without {by}"
        if self.plan is not None and self.plan.path == DIRECT:
            return (
                "; if the destination's direct-ports cannot be reached from here, "
                "'--exclude direct' takes another path"
            )
        return ""

    def _raise_if_over(self) -> None:
        """Give up where there is reason to and the guest is still ours."""
        if self._outcome is not None and "error" in self._outcome.body:
            raise _from_outcome(self._outcome)
        if self._released is Released.YES:
            return
        if self.cancelled is not None:
            raise Cancelled(self.cancelled)
        if self._path is not None and self._path.failure is not None:
            raise self._path.failure
        if self.control is not None and self.control.failure is not None and not self.baseline:
            raise self.control.failure

    def _said(self, event: Event | None) -> None:
        """The destination speaks."""
        if isinstance(event, StatusSaid):
            if event.body.get("ready"):
                self._ready = event.body
            if event.body.get("released") and self._release_taken is not None:
                taken, self._release_taken = self._release_taken, None
                taken.callback(None)
            if event.body.get("running"):
                self._runs_there()
        elif isinstance(event, Outcome):
            self._outcome = event
            self._peer = _PEER[event.body.get("ran")]
            if self._peer is Peer.RUNS:
                self._runs_there()
        if (event is None or self._outcome is not None) and self._release_taken is not None:
            taken, self._release_taken = self._release_taken, None
            taken.errback(
                MigrationError("the destination was lost before it could take the guest over")
            )
        self.wake()

    def _runs_there(self) -> None:
        self._peer = Peer.RUNS
        if self._completed is not None and self.record.handover_time is None:
            self.record.handover_time = self.now() - self._completed

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

    async def _hand_over(self) -> None:
        """QEMU has sent everything: see that the guest runs at the destination."""
        assert self.control is not None
        self.record.update(step="handing over")
        if self._released is Released.NO:
            if self.cancelled is not None:
                raise Cancelled(self.cancelled)
            self._completed = self.now()
            self._release(postcopy=False)
        end = self.now() + self.services.deadlines.stall
        while self._outcome is None:
            if self.control.failure is not None:
                await self._ask()
                if self._peer is not Peer.RUNS:
                    raise self.control.failure
                return
            if self.now() >= end:
                raise PeerGone("the destination does not say what became of the guest")
            await self.rest()
        self._raise_if_over()

    async def _ask(self) -> None:
        """RELEASE was sent and the connection lost: find out whether the guest arrived."""
        self.record.update(step="asking the destination whether the guest has arrived")
        end = self.now() + self.services.deadlines.ask
        while self._peer is Peer.UNKNOWN and self.now() < end:
            try:
                answer = await ask(
                    self.services.reactor,
                    self.uri,
                    self.record.id,
                    self.secret,
                    self.services.deadlines.handshake,
                    self.tls_side() if self.in_tls else None,
                )
            except QmigdError as error:
                log.info("no answer from {peer}: {error}", peer=self.uri, error=error.text)
            else:
                self._peer = _PEER[answer.get("ran")]
            if self._peer is Peer.UNKNOWN:
                await deferLater(self.services.reactor, LOOK)

    # the end

    async def _settle(self, error: QmigdError | None) -> None:
        """Leave both hosts in order, whatever happened."""
        await self._end_switch()
        step = "moved"
        if error is not None:
            step = await self._recover(error)
        if self.control is not None:
            self._part(error)
        if self._path is not None:
            self._path.close()
        if not self._lingers:
            await self.put_back()
            if error is None and self.services.source_after == "quit":
                step = await self._quit()
            self._leave()
        status = "completed"
        if error is not None:
            status = "cancelled" if isinstance(error, Cancelled) else "failed"
            log.warn(
                "migration {id} of guest {guest} {status}: {error}",
                id=self.record.id,
                guest=self.record.guest,
                status=status,
                error=error.text,
            )
        self.record.end(status, step, error)
        if error is not None and self._lingers:
            Deferred.fromCoroutine(self._recover_late(error))

    def _leave(self) -> None:
        """There is nothing left to be done."""
        self.let_go()
        self.services.journal.forget(self.record.id, "source")

    async def _recover(self, error: QmigdError) -> str:
        """After a failure: bring the guest back here; returns what has become of it."""
        if self.guest is None or not self._started:
            return "not begun; the guest goes on here"
        try:
            return await self._bring_back(error)
        except DeadlineError as second:
            self._lingers = True
            step = f"the guest's QEMU is not done, and qmigd goes on waiting for it: {second.text}"
        except QmigdError as second:
            step = f"the guest's QEMU could not be asked: {second.text}"
        log.warn("guest {guest}: {step}", guest=self.record.guest, step=step)
        return step

    async def _recover_late(self, error: QmigdError) -> None:
        """For as long as it takes: QEMU may hang for minutes in a connection that is no more.

        The guest remains in this migration's hands until then.  QEMU would not begin another.
        """
        step = ""
        try:
            while not step:
                await self.rest()
                with suppress(DeadlineError):
                    step = await self._bring_back(error)
            await self.put_back()
        except QmigdError as second:
            step = f"the guest's QEMU could not be asked: {second.text}"
        except Exception:
            log.failure("end of migration {id}", id=self.record.id)
            step = "qmigd itself failed; its log says where"
        log.info("guest {guest}: {step}", guest=self.record.guest, step=step)
        self.record.update(step=step)
        self._leave()

    async def _bring_back(self, error: QmigdError) -> str:
        """Let the guest run here again, unless it may run there; returns which.

        :raises DeadlineError: QEMU does not answer, or not end its migration, in time.
        """
        guest = self.guest
        assert guest is not None
        if self._released is Released.YES:
            await self._ask()
        await self._end_qemus_migration(error)
        act = on_source_failure(self._released, self._peer)
        if act is Act.LEAVE and self.qemu_status.startswith("postcopy"):
            return (
                "stopped here; it is the destination's, which may still need RAM that is "
                "here: do not end this QEMU before the guest there has all of it"
            )
        if act is Act.LEAVE:
            return (
                "stopped here, because it may run at the destination; if it is lost there "
                "for good, let it go on here with 'cont' on its QMP socket"
            )
        if self.was_running and await guest.query_status() != "running":
            await guest.cont()
        return "the guest goes on here"

    async def _end_qemus_migration(self, error: QmigdError) -> None:
        """Bring it to its end, where that is still safe, and wait until QEMU is done with it."""
        assert self.guest is not None
        over = await self._is_over()
        if over or (self._released is Released.YES and self._peer is not Peer.NEVER_RAN):
            return
        if not isinstance(error, Cancelled) and self._path is not None:
            # Its channels are broken, or are now, and it fails by itself.  Told to cancel at
            # that very moment, QEMU 7.2 with multifd ends in an assertion
            # (yank_unregister_instance), and the guest with it: 3 of 60 tries.
            self._path.close()
            if await self._over_within(FAILS_WITHIN):
                return
        await self.guest.cancel()
        if not await self._over_within(self.services.deadlines.guest):
            raise DeadlineError("QEMU does not end its migration although it was cancelled")

    async def _over_within(self, seconds: float) -> bool:
        """Whether QEMU's migration comes to an end by then."""
        end = self.now() + seconds
        while not await self._is_over():
            if self.now() >= end:
                return False
            await self.rest(0.05)
        return True

    async def _is_over(self) -> bool:
        assert self.guest is not None
        return await self.look() in {*OVER, "none"} and not await self.guest.holds_on()

    def _part(self, error: QmigdError | None) -> None:
        control = self.control
        assert control is not None
        streams = self.baseline and self._started  # the connection is QEMU's
        if error is None or control.failure is not None or self._outcome is not None or streams:
            control.close()
        elif isinstance(error, Cancelled) and self._started:
            control.machine.cancel(error.text)
            control.flush()
            control.close()
        else:
            control.refuse(error)

    async def _quit(self) -> str:
        if self.baseline:
            return "moved; kept here paused, because nobody reported that it runs there"
        try:
            assert self.guest is not None
            await self.guest.quit()
        except QmigdError as error:
            return f"moved; the QEMU here could not be ended: {error.text}"
        return "moved; the QEMU here was ended"

    def _note(self, stage: str) -> None:
        assert self.guest is not None
        self._stage = stage
        self.services.journal.write(
            self.record.id,
            "source",
            {
                "guest": self.record.guest,
                "qmp": self.services.guests.where(self.guest),
                "peer": self.record.peer,
                "stage": stage,
                "baseline": self.baseline,
                "tls-hostname": self.hostname if self.in_tls else None,
                "secret": self.secret.hex(),
                "was-running": self.was_running,
                "capabilities": dict(self.saved.capabilities),
                "parameters": dict(self.saved.parameters),
                "objects": list(self.saved.objects),
            },
        )


def _from_outcome(outcome: Outcome) -> QmigdError:
    error = outcome.body.get("error", {})
    text = error.get("desc", "no reason given") if isinstance(error, dict) else str(error)
    return MigrationError(f"the destination failed: {text}")


def new_id() -> str:
    """The id of a new migration."""
    return str(uuid.uuid4())
