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

import uuid
from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.task import deferLater
from twisted.logger import Logger

from ..errors import (
    DeadlineError,
    FeatureError,
    GuestError,
    MigrationError,
    PeerGone,
    ProtocolError,
    QmigdError,
)
from ..handshake.events import (
    Event,
    FeatureSaid,
    Outcome,
    Prepared,
    StatusSaid,
)
from ..handshake.source import SourceHandshake
from ..interfaces import (
    DIRECT,
    HANDOVER,
    PATHS,
    Guest,
    GuestFacts,
    No,
    Settings,
    Withdraw,
)
from ..negotiation.agree import build_plan
from ..negotiation.plan import Plan
from ..negotiation.policy import Policy
from ..negotiation.terms import Terms, Traits, expect
from ..transports.uri import Address
from ..wire.role import SECRET_SIZE
from .control import Control, connect_control
from .move import LOOK, OVER, Move
from .ownership import Act, Peer, Released, on_source_failure
from .paths import SourcePath
from .services import Services
from .settings import compare, settings_for, settings_from_wire
from .status import Record
from .verdicts import ask

__all__ = ["Outgoing"]

log = Logger()

#: Run states in which a guest has nothing that could be moved.
_NOT_MOVABLE = {
    "inmigrate": "it waits for a migration itself",
    "postmigrate": "it was moved away already; what is here is the stopped rest",
    "internal-error": "QEMU stopped it because of an internal error",
    "shutdown": "it has shut down",
}


_PEER = {True: Peer.RUNS, False: Peer.NEVER_RAN, None: Peer.UNKNOWN}


class Cancelled(MigrationError):
    """The user ended the migration."""

    code = "cancelled"


class Outgoing(Move):
    """One guest on its way out."""

    def __init__(
        self,
        services: Services,
        record: Record,
        uri: Address,
        policy: Policy,
        tunables: Mapping[str, Any],
    ) -> None:
        super().__init__(services, record)
        self._uri = uri
        self._policy = policy
        self.tunables = tunables
        self._calling: Deferred[list[str]] | None = None
        self._left_out: dict[str, str] = {}
        self._control: Control | None = None
        self._path: SourcePath | None = None
        self._plan: Plan | None = None
        self._was_running = True
        self._started = False
        self._released = Released.NO
        self._peer = Peer.NEVER_RAN
        self._outcome: Outcome | None = None
        self._ready: Mapping[str, Any] | None = None
        self._secret = b""
        self._release_taken: Deferred[None] | None = None
        self._completed: float | None = None
        self._stage = ""
        self._cancelled: str | None = None
        self._baseline = False

    # what the daemon's commands call

    async def begin(self) -> None:
        """Do it all.  Never raises: how it ended is in the record."""
        error: QmigdError | None = None
        try:
            await self._move(await self._negotiate())
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
            await self._negotiate(probe=True)
            assert self._plan is not None
            return self._plan
        except QmigdError as failure:
            error = failure
            raise
        finally:
            if self._control is not None:
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
        self._cancelled = reason
        self.wake()
        if self._started:
            return
        if self._control is not None:
            self._control.abandon(Cancelled(reason))
        elif self._calling is not None:
            self._calling.cancel()

    async def start_postcopy(self) -> None:
        """Switch the guest over now; its remaining RAM follows.

        :raises FeatureError: this migration was negotiated without postcopy.
        :raises MigrationError: it is not possible now.
        """
        if not self.record.can_postcopy or self._control is None or self.guest is None:
            raise self._why_no_postcopy()
        self.record.can_postcopy = False
        self.record.update(step="switching over to postcopy")
        # The fence (see ownership): from here on QEMU does not let it run again by itself.
        await self.guest.stop()
        if self._released is Released.YES:
            return  # it has just arrived by precopy, and is being handed over
        try:
            self._release_taken = Deferred()
            self._release(postcopy=True)
            await self._release_taken
            await self.guest.start_postcopy()
        except GuestError as error:
            # With the guest stopped, precopy comes to its end at once.
            log.info("QEMU does not switch to postcopy any more: {error}", error=error.text)
        finally:
            self.wake()

    def _why_no_postcopy(self) -> QmigdError:
        plan = self._plan
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
        await self.set_up(Settings({}, tunables))
        self._note(self._stage)
        self.record.tunables = {**self.record.tunables, **tunables}

    # negotiation

    async def _call(self) -> list[str]:
        """Connect to the peer, and say which guest it is about.

        Done while the guest is still being looked at, so that both sides look at the same
        time; what this guest turns out not to be able to do is withdrawn later.

        :return: what both hosts can do; what they cannot is in ``_left_out``.
        """
        deadline = self.services.deadlines.handshake
        machine = SourceHandshake()
        control = await connect_control(self.services.reactor, self._uri, machine, deadline)
        self._control = control
        greeted = await control.greeted(deadline)
        candidates = self._candidates(greeted.features)
        machine.reply(candidates)
        machine.guest({"name": self.record.guest})
        control.flush()
        return candidates

    def _candidates(self, offered: tuple[str, ...]) -> list[str]:
        candidates = []
        for name, feature in self.services.features.items():
            answer = feature.probe_host(self.services.host)
            if name in self._policy.exclude:
                self._left_out[name] = "excluded by the policy"
            elif isinstance(answer, No):
                self._left_out[name] = f"source host: {answer.reason}"
            elif name not in offered:
                self._left_out[name] = "destination: its qmigd does not offer it"
            else:
                candidates.append(name)
        self._check_required()
        return candidates

    def _check_required(self) -> None:
        for name in self._policy.require:
            if name in self._left_out:
                raise FeatureError(f"{name} is required but cannot be had: {self._left_out[name]}")

    async def _negotiate(self, *, probe: bool = False) -> GuestFacts:
        assert self.guest is not None
        self._calling = Deferred.fromCoroutine(self._call())
        both: list[Deferred[Any]] = [
            self._calling,
            Deferred.fromCoroutine(self.guest.examine()),
        ]
        (called, candidates), (looked, examined) = await DeferredList(both, consumeErrors=True)
        if self._cancelled is not None:
            raise Cancelled(self._cancelled)
        for succeeded, failure in ((looked, examined), (called, candidates)):
            if not succeeded:
                raise failure.value
        facts: GuestFacts = examined.facts
        if examined.status in _NOT_MOVABLE:
            why = _NOT_MOVABLE[examined.status]
            raise GuestError(f"guest {facts.name} cannot be moved: {why}")
        self._was_running = examined.status == "running"
        assert self._control is not None
        if self._control.failure is not None:
            raise self._control.failure
        control, machine, left_out = self._control, self._control.machine, self._left_out

        machine.guest(examined.description)
        proposals: dict[str, dict[str, Any]] = {}
        for name in candidates:
            try:
                proposals[name] = self._propose(name, facts)
                machine.feature(name, proposals[name])
            except Withdraw as withdrawal:
                left_out[name] = f"source: {withdrawal}"
                machine.feature(name, {"withdrawn": str(withdrawal)})
        self._check_required()
        terms = Terms(
            {name: Traits.of(self.services.features[name]) for name in proposals},
            prefer=self._policy.prefer,
            require=self._policy.require,
            closed=self._closed_paths(bool(candidates)),
        )
        machine.prepare({"migration": self.record.id, "terms": terms.to_wire(), "probe": probe})
        control.flush()

        agreements: dict[str, Mapping[str, Any]] = {}
        while True:
            said = await control.next(
                FeatureSaid,
                Prepared,
                deadline=self.services.deadlines.prepare,
                what="the destination's PREPARED",
            )
            if isinstance(said, Prepared):
                break
            assert isinstance(said, FeatureSaid)
            if said.withdrawn is not None:
                left_out[said.name] = f"destination: {said.withdrawn}"
            elif said.name in proposals:
                self._accept(said, proposals[said.name])
                agreements[said.name] = said.parameters
        self._agree(said.body, terms, agreements, left_out, facts)
        self._baseline = not candidates
        return facts

    def _propose(self, name: str, facts: GuestFacts) -> dict[str, Any]:
        feature = self.services.features[name]
        answer = feature.probe_guest(facts, "source")
        if isinstance(answer, No):
            raise Withdraw(answer.reason)
        own = {key: value for key, value in self.tunables.items() if key in feature.tunables}
        return feature.propose(facts, self.services.host, own)

    def _accept(self, said: FeatureSaid, proposal: Mapping[str, Any]) -> None:
        try:
            self.services.features[said.name].accept(proposal, said.parameters)
        except ValueError as error:
            raise ProtocolError(
                f"the destination's answer on {said.name} makes no sense: {error}", code="feature"
            ) from None

    def _closed_paths(self, any_feature: bool) -> dict[str, str]:
        closed = {}
        for path in PATHS:
            if path in self._policy.exclude:
                closed[path] = "excluded by the source's policy"
            elif not any_feature and path != HANDOVER:
                closed[path] = "no feature was selected, so the stream takes this very connection"
        return closed

    def _agree(
        self,
        body: Mapping[str, Any],
        terms: Terms,
        agreements: Mapping[str, Mapping[str, Any]],
        left_out: Mapping[str, str],
        facts: GuestFacts,
    ) -> None:
        """Compute the plan, and see that the destination came to the same."""
        theirs = Terms.from_wire(expect(body, "terms", dict))
        plan = build_plan(self.services.features, agreements, terms, theirs, left_out)
        plan.verify(expect(body, "plan", dict))
        self._plan = self.record.plan = plan
        self._secret = _secret(body)
        if "settings" not in body:  # only a probe: nothing was set
            return
        there = settings_from_wire(expect(body, "settings", dict))
        wanted = settings_for(plan, self.services.features, facts, "destination")
        compare(
            Settings(
                {k: v for k, v in wanted.capabilities.items() if k in plan.features},
                wanted.parameters,
            ),
            there,
            "destination",
        )

    # the move

    async def _move(self, facts: GuestFacts) -> None:
        services, guest, control, plan = self.services, self.guest, self._control, self._plan
        assert guest is not None and control is not None and plan is not None
        negotiated = set().union(*(services.features[name].tunables for name in plan.features))
        own = {key: value for key, value in self.tunables.items() if key not in negotiated}
        self._raise_if_over()
        await self.set_up_plan(plan, facts, "source", lambda: self._note("started"), own)

        self._started = True
        control.machine.start()
        control.flush()
        self.record.update(step="moving RAM")
        if self._baseline:
            await guest.migrate(await control.take_socket())
            self.record.under_way()
        else:
            control.listen(self._said)
            control.stay_alive(services.deadlines.peer)
            await self._until_ready()
            self._path = SourcePath(
                services, plan, self.record.id, self._secret, self.wake, self._uri
            )
            # Over a unix socket there is none, and the plan does without.
            host = str(getattr(control.transport.getPeer(), "host", ""))
            await guest.migrate(await self._path.open(host, self._ready or {}))
            self.record.under_way()
            self.record.can_postcopy = any(
                "postcopy" in services.features[name].abilities for name in plan.features
            )
        await self._watch()
        if self._baseline:
            self.record.owner = "destination"
        else:
            await self._hand_over()

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
                    f"nothing has moved for {stall:g} seconds (QEMU's status: {status})",
                    code="deadline",
                )
            await self.rest()

    async def _why(self) -> str:
        reason = await self.reason()
        moved = self.record.progress.get("ram", {}).get("transferred", 0)
        if self._plan is not None and self._plan.path == DIRECT and not moved:
            reason += (
                "; if the destination's direct-ports cannot be reached from here, "
                "'--exclude direct' takes another path"
            )
        return reason

    def _raise_if_over(self) -> None:
        """Give up where there is reason to and the guest is still ours."""
        if self._outcome is not None and "error" in self._outcome.body:
            raise _from_outcome(self._outcome)
        if self._released is Released.YES:
            return
        if self._cancelled is not None:
            raise Cancelled(self._cancelled)
        if self._path is not None and self._path.failure is not None:
            raise self._path.failure
        if self._control is not None and self._control.failure is not None and not self._baseline:
            raise self._control.failure

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
        assert self._control is not None
        if self._control.failure is not None:
            raise self._control.failure
        self._note("released")
        self._released = Released.YES
        self.record.owner = "destination"
        if self._peer is Peer.NEVER_RAN:
            self._peer = Peer.UNKNOWN
        if self._path is not None:
            self._path.hold()
        self._control.machine.release({"run": self._was_running, "postcopy": postcopy})
        self._control.flush()

    async def _hand_over(self) -> None:
        """QEMU has sent everything: see that the guest runs at the destination."""
        assert self._control is not None
        self.record.update(step="handing over")
        if self._released is Released.NO:
            if self._cancelled is not None:
                raise Cancelled(self._cancelled)
            self._completed = self.now()
            self._release(postcopy=False)
        end = self.now() + self.services.deadlines.stall
        while self._outcome is None:
            if self._control.failure is not None:
                await self._ask()
                if self._peer is not Peer.RUNS:
                    raise self._control.failure
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
                    self._uri,
                    self.record.id,
                    self._secret,
                    self.services.deadlines.handshake,
                )
            except QmigdError as error:
                log.info("no answer from {peer}: {error}", peer=self._uri, error=error.text)
            else:
                self._peer = _PEER[answer.get("ran")]
            if self._peer is Peer.UNKNOWN:
                await deferLater(self.services.reactor, LOOK)

    # the end

    async def _settle(self, error: QmigdError | None) -> None:
        """Leave both hosts in order, whatever happened."""
        step = "moved"
        if error is not None:
            step = await self._recover(error)
        if self._control is not None:
            self._part(error)
        if self._path is not None:
            self._path.close()
        await self.put_back()
        if error is None and self.services.source_after == "quit":
            step = await self._quit()
        self.let_go()
        self.services.journal.forget(self.record.id, "source")
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

    async def _recover(self, error: QmigdError) -> str:
        """After a failure: the guest runs here again, unless it may run there."""
        guest = self.guest
        if guest is None or not self._started:
            return "not begun; the guest goes on here"
        try:
            if self._released is Released.YES:
                await self._ask()
            await self._end_qemus_migration()
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
            if self._was_running and await guest.query_status() != "running":
                await guest.cont()
            return "the guest goes on here"
        except QmigdError as second:
            log.warn("guest {guest}: {error}", guest=guest.name, error=second.text)
            return f"the guest's QEMU could not be asked: {second.text}"

    async def _end_qemus_migration(self) -> None:
        """Cancel, where that is still safe, and wait until QEMU is done with it."""
        assert self.guest is not None
        status = await self.look()
        if self._released is Released.YES and self._peer is not Peer.NEVER_RAN:
            return
        if status in OVER or status == "none":
            return
        await self.guest.cancel()
        if self._path is not None:
            self._path.close()
        end = self.now() + self.services.deadlines.guest
        while await self.look() not in OVER:
            if self.now() >= end:
                raise GuestError("QEMU does not end its migration although it was cancelled")
            await self.rest(0.05)

    def _part(self, error: QmigdError | None) -> None:
        control = self._control
        assert control is not None
        streams = self._baseline and self._started  # the connection is QEMU's
        if error is None or control.failure is not None or self._outcome is not None or streams:
            control.close()
        elif isinstance(error, Cancelled) and self._started:
            control.machine.cancel(error.text)
            control.flush()
            control.close()
        else:
            control.refuse(error)

    async def _quit(self) -> str:
        if self._baseline:
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
                "baseline": self._baseline,
                "secret": self._secret.hex(),
                "was-running": self._was_running,
                "capabilities": dict(self.saved.capabilities),
                "parameters": dict(self.saved.parameters),
            },
        )


def _secret(body: Mapping[str, Any]) -> bytes:
    try:
        secret = bytes.fromhex(expect(body, "secret", str))
    except ValueError:
        secret = b""
    if len(secret) != SECRET_SIZE:
        raise ProtocolError("PREPARED has no usable 'secret'", code="bad-json")
    return secret


def _from_outcome(outcome: Outcome) -> QmigdError:
    error = outcome.body.get("error", {})
    text = error.get("desc", "no reason given") if isinstance(error, dict) else str(error)
    return MigrationError(f"the destination failed: {text}")


def new_id() -> str:
    """The id of a new migration."""
    return str(uuid.uuid4())
