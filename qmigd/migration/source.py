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
from dataclasses import replace
from typing import Any

from twisted.logger import Logger

from ..backend import Guest
from ..errors import (
    DeadlineError,
    GuestError,
    GuestGone,
    MigrationError,
    PeerGone,
    QmigdError,
)
from ..handshake.events import Event, Outcome, StatusSaid
from ..interfaces import DIRECT, GuestFacts, PeerIdentity
from ..negotiation.plan import Plan
from ..transports.uri import FdAddress, Reachable, TcpAddress, network_of
from .move import OVER
from .ownership import SAID, Peer, Released
from .proposing import Cancelled
from .source_path import SourcePath
from .steering import Steering
from .switching import BANDWIDTH

__all__ = ["Outgoing"]

log = Logger()


class Outgoing(Steering):
    """One guest on its way out."""

    _ready: Mapping[str, Any] | None = None
    _ready_by = 0.0
    _completed: float | None = None

    async def carry_out(self) -> None:
        await self._move(await self.negotiate())

    async def settle(self, error: QmigdError | None) -> None:
        await self._end_switch()
        await super().settle(error)
        self.services.requests.forget(self.record.id)

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
            await self._end_programs(error)

    # the move

    async def _move(self, facts: GuestFacts) -> None:
        services, guest, control, plan = self.services, self.guest, self.control, self.plan
        assert guest is not None and control is not None and plan is not None
        negotiated = set().union(*(services.features[name].tunables for name in plan.features))
        own = {key: value for key, value in self.tunables.items() if key not in negotiated}
        self._raise_if_over()
        if isinstance(self.uri, FdAddress):
            self.uri.plan(() if self.baseline else plan.channels)
        if not self.baseline:
            self._path = SourcePath(
                services,
                plan,
                self.record.id,
                self.secret,
                self.wake,
                self._payload_address(plan),
                self.tls_side,
                in_band=self.in_band,
                unawaited=services.unawaited(facts),
            )
            self._path.prepare()
        peer = PeerIdentity(self.hostname, control.peer_subject) if self.in_tls else None
        await self.set_up_plan(
            plan, facts, "source", lambda: self._note("started"), own, peer, alone=self.plain
        )

        self._bandwidth = facts.parameters.get(BANDWIDTH)
        self._started = True
        if not self.plain:
            control.machine.start()
            control.flush()
        self.record.update(step="moving RAM")
        if self.baseline:
            channel: str | socket.socket = await control.take_socket()
            self._hand_to_qemu(channel)
            await guest.migrate(channel)
            self.record.under_way()
        else:
            control.listen(self._said)
            control.stay_alive(services.deadlines.peer)
            self._ready_by = self.now() + services.deadlines.guest
            if plan.path == DIRECT:
                await self._until_ready()
            assert self._path is not None
            at = network_of(control.transport.getPeer())
            channel = await self._path.open(at, self._ready or {})
            self._hand_to_qemu(channel)
            await self._set_off(channel)
            self._path.set_off(guest)
            self.record.under_way()
            self.record.can_postcopy = any(
                "postcopy" in services.features[name].abilities for name in plan.features
            )
        await self._watch()
        if self.baseline:
            self.record.owner = "destination"
        else:
            await self._hand_over()
        await self.sum_up()

    def _payload_address(self, plan: Plan) -> Reachable:
        """Where payload channels are opened, and by which protocol."""
        if not isinstance(self.reached, TcpAddress):
            return self.reached
        abilities = [self.services.features[name].abilities for name in plan.features]
        return replace(self.reached, mptcp=any("multipath" in each for each in abilities))

    def _hand_to_qemu(self, channel: str | socket.socket) -> None:
        if self.programs is not None and isinstance(channel, socket.socket):
            self.programs.hand_over(channel)

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
                f"the guest cannot migrate to {channel}: {error.text}{self._hint()}"
            ) from None

    async def _until_ready(self) -> None:
        """Wait until the destination's QEMU waits for the stream.

        Only to learn where: in a payload channel the stream waits for that QEMU by itself.
        """
        while self._ready is None:
            self._raise_if_over()
            self._raise_if_not_ready()
            await self.rest()

    def _raise_if_not_ready(self) -> None:
        if self._ready is None and self.now() >= self._ready_by:
            raise DeadlineError("the destination's process was not ready for the stream in time")

    async def _watch(self) -> None:
        """Follow QEMU until its migration has completed.

        :raises QmigdError: it has failed, or must not go on.
        """
        while True:
            try:
                status = await self.look()
            except DeadlineError:
                # Whoever gives a postcopy up takes RAM from the guest that comes to nobody else.
                if self._released is Released.NO:
                    raise
                status = self.qemu_status
            if status == "completed":
                return
            if status in OVER:
                self._raise_if_over()
                raise MigrationError(f"the guest's migration {status}: {await self._why()}")
            if status == "postcopy-paused":
                raise MigrationError(
                    "the stream broke in postcopy; the guest is the destination's, and RAM that "
                    "had not arrived is still here: do not end this process"
                )
            self._raise_if_over()
            if not self.baseline:
                self._raise_if_not_ready()
            self._raise_if_stalled(status)
            await self.rest()

    def _raise_if_stalled(self, status: str) -> None:
        """Give up where nothing moves any more, but for a postcopy that still may."""
        stall = self.services.deadlines.stall
        stalled = self.stalled_for() > stall and status != "pre-switchover"
        nothing = f"nothing has moved for {stall:g} seconds (migration status: {status})"
        # One whose guest has arrived whole has nothing to wait for, and QEMU 7.2 may hang there.
        if not status.startswith("postcopy") or self._outcome is not None:
            if stalled:
                hint = "" if self._has_moved() else self._hint()
                raise MigrationError(nothing + hint, code="deadline")
            return
        if self._given_up:
            raise MigrationError(
                f"{nothing}, and the user has given it up; the guest is the destination's, and "
                f"RAM that had not arrived is still here: do not end this process"
            )
        if stalled and self._path is not None and self._path.broken is not None:
            raise MigrationError(
                f"the stream broke in postcopy ({self._path.broken}); the guest is the "
                f"destination's, and RAM that had not arrived is still here: do not end this "
                "process"
            )
        if stalled != self._stands_still:
            self._stands_still = stalled
            step = "moving RAM"
            if stalled:
                # Whoever gave up would lose RAM that is still to come; TCP may wait for longer.
                step = f"{nothing}; it is waited for, unless 'migrate-cancel' gives it up"
                log.warn("{migration}: {step}", migration=self.record.name, step=step)
            self.record.update(step=step)

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
            self._peer = SAID[event.body.get("ran")]
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


def _from_outcome(outcome: Outcome) -> QmigdError:
    error = outcome.body.get("error", {})
    if not isinstance(error, dict):
        return MigrationError(f"the destination failed: {error}")
    text = error.get("desc", "no reason given")
    if error.get("class") == Cancelled.code:
        return MigrationError(f"the destination has cancelled it: {text}", code=Cancelled.code)
    return MigrationError(f"the destination failed: {text}")


def new_id() -> str:
    """The id of a new migration."""
    return str(uuid.uuid4())
