"""The destination's side: a port that greets, and a guest that comes in.

Every connection to the port begins with the greeting.  What the other side says
first decides what it is: a Reply makes it a control connection, a role header a
payload channel of a migration that was negotiated before.

A guest that comes in does not run by itself.  Its QEMU is told to ``stop`` before
the stream flows, and to ``cont`` when RELEASE has come (see
:mod:`qmigd.migration.ownership`); only in the baseline form, where nobody would
send RELEASE, QEMU decides as it always did.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from ..errors import (
    DeadlineError,
    FeatureError,
    GuestError,
    GuestGone,
    MigrationError,
    PeerGone,
    ProtocolError,
    QmigdError,
)
from ..handshake.destination import DestinationHandshake
from ..handshake.events import (
    Asked,
    CancelAsked,
    ChannelOpened,
    Event,
    FeatureSaid,
    GuestDescribed,
    PrepareAsked,
    Released,
    Selected,
    Started,
)
from ..interfaces import DIRECT, PATHS, GuestFacts, No, Settings, Withdraw
from ..negotiation.agree import build_plan
from ..negotiation.plan import Plan
from ..negotiation.terms import Terms, Traits, expect
from ..wire.role import SECRET_SIZE
from . import preflight
from .control import Control
from .move import OVER, Move
from .ownership import Act, on_destination_failure
from .ownership import Released as Owned
from .paths import DestinationPath
from .services import Services
from .settings import settings_for, settings_to_wire

__all__ = ["Incoming", "IncomingConnection", "IncomingFactory", "offered"]

log = Logger()


def offered(services: Services) -> list[str]:
    """The features that this host's greeting offers."""
    return [
        name
        for name, feature in services.features.items()
        if name not in services.policy.exclude and feature.probe_host(services.host)
    ]


class IncomingFactory(Factory):
    """What listens on the daemon's port."""

    noisy = False

    def __init__(self, services: Services) -> None:
        self._services = services
        self._offer = offered(services)

    def buildProtocol(self, addr: IAddress | None) -> IncomingConnection:
        return IncomingConnection(self._services, self._offer)


class IncomingConnection(Control):
    """One connection to the port; a control connection until it turns out otherwise."""

    def __init__(self, services: Services, offer: list[str]) -> None:
        super().__init__(DestinationHandshake(offer), services.reactor)
        self._services = services
        self._expiry: Any = None

    def connectionMade(self) -> None:
        self.expect_within(self._services.deadlines.handshake)
        super().connectionMade()

    def connectionLost(self, reason: Any = None) -> None:
        self.expect_within(None)
        super().connectionLost(reason)

    def expect_within(self, seconds: float | None) -> None:
        """The peer has to be done with its part within ``seconds``; ``None``: no more."""
        if self._expiry is not None and self._expiry.active():
            self._expiry.cancel()
        self._expiry = None
        if seconds is not None:
            self._expiry = self._clock.callLater(seconds, self._expired, seconds)

    def _expired(self, seconds: float) -> None:
        self.refuse(DeadlineError(f"the handshake was not done within {seconds:g} seconds"))

    def _take(self, event: Event) -> None:
        if isinstance(event, ChannelOpened):
            self._attach(event)
        elif isinstance(event, Selected):
            move = Incoming(self._services, self, event)
            Deferred.fromCoroutine(move.serve())
        elif isinstance(event, Asked):
            self._answer(event)
        else:
            super()._take(event)

    def _answer(self, event: Asked) -> None:
        try:
            self.machine.outcome(self._services.verdicts.answer(event))
        except ProtocolError as error:
            self.refuse(error)
            return
        self.flush()
        self.close()

    def _attach(self, event: ChannelOpened) -> None:
        self.expect_within(None)
        try:
            claim = self._services.attachments.claim(event.role)
        except ProtocolError as error:
            self.refuse(error)
            return
        self.machine.attached()
        self._detached = True
        handing = claim.hand_over(self.transport, self.machine.data_to_send())
        handing.addErrback(lambda failure: failure.trap(PeerGone))


class Incoming(Move):
    """One guest on its way in."""

    def __init__(self, services: Services, control: IncomingConnection, selected: Selected) -> None:
        peer = control.transport.getPeer()
        host = getattr(peer, "host", None)
        where = f"tcp:{host}:{peer.port}" if host else str(peer)
        super().__init__(
            services, services.records.new(str(uuid.uuid4()), "", "destination", where)
        )
        self._control = control
        # This host's address, as the peer has reached it; none over a unix socket.
        self._host = str(getattr(control.transport.getHost(), "host", ""))
        self._selected = selected.features
        self._theirs: Mapping[str, Any] = {}
        self._description: Mapping[str, Any] = {}
        self._taking: Deferred[GuestFacts] | None = None
        self._proposals: dict[str, Mapping[str, Any]] = {}
        self._left_out: dict[str, str] = {}
        self._plan: Plan | None = None
        self._path: DestinationPath | None = None
        self._baseline = False
        self._receiving = False
        self._secret = b""
        self._owned = Owned.NO
        self._run = True
        self._ran: bool | None = False
        self._told_running = False
        self._torn = 0.0
        self._cancelled: str | None = None
        self._failure: QmigdError | None = None

    async def serve(self) -> None:
        """Do it all.  Never raises: how it ended is in the record."""
        error: QmigdError | None = None
        try:
            await self._negotiate()
            await self._receive()
        except QmigdError as failure:
            error = failure
        except Exception:
            log.failure("incoming migration {id}", id=self.record.id)
            error = MigrationError("qmigd itself failed; its log says where", code="internal")
        await self._settle(error)

    # negotiation

    async def _negotiate(self) -> None:
        control, deadline = self._control, self.services.deadlines.handshake
        for name in self.services.policy.require:
            if name in self.services.features and name not in self._selected:
                raise FeatureError(
                    f"this host's policy requires {name}, which the source did not select"
                )
        while True:
            said = await control.next(
                GuestDescribed,
                FeatureSaid,
                PrepareAsked,
                Started,
                deadline=deadline,
                what="the source's next message",
            )
            if isinstance(said, GuestDescribed):
                self._described(said.description)
            elif isinstance(said, FeatureSaid):
                if said.withdrawn is not None:
                    self._left_out[said.name] = f"source: {said.withdrawn}"
                else:
                    self._proposals[said.name] = said.parameters
            elif isinstance(said, PrepareAsked):
                control.expect_within(None)
                await self._prepare(said.body)
                control.expect_within(deadline)
                await control.next(Started, deadline=deadline, what="the source's START")
                break
            else:
                facts = await self._taken()
                self.services.records.add(self.record)
                self._plan = self.record.plan = Plan("handover", path_reason="baseline")
                await self._set_up(self._plan, facts)
                break
        control.expect_within(None)
        self._baseline = not self._selected

    def _described(self, description: Mapping[str, Any]) -> None:
        """Take in what the source says of its guest; the name may come ahead of the rest."""
        name = self._theirs.get("name", description.get("name"))
        if name is not None and not isinstance(name, str):
            raise ProtocolError("the guest's 'name' is not a string", code="bad-json")
        self._theirs = {**self._theirs, **description, "name": name}
        if name is not None and self._taking is None:
            self._taking = Deferred.fromCoroutine(self._take_guest(name))

    async def _taken(self) -> GuestFacts:
        """The guest that is meant, in our hands.  To be called once."""
        taking, self._taking = self._taking, None
        return await (taking or self._take_guest(None))

    async def _take_guest(self, name: str | None) -> GuestFacts:
        self.record.update(step="waiting for the guest's QEMU")
        guest = await self.services.guests.waiting(name, self.record.id)
        self.guest = guest
        self.record.guest = guest.name
        await self.attach(guest)
        examined = await guest.examine()
        if examined.status != "inmigrate":
            raise GuestError(
                f"guest {guest.name} does not wait for a migration, it is {examined.status}; "
                f"start its QEMU with -incoming defer",
                code="guest-not-waiting",
            )
        self._description = examined.description
        return examined.facts

    async def _prepare(self, body: Mapping[str, Any]) -> None:
        services, machine = self.services, self._control.machine
        migration = _canonical(expect(body, "migration", str))
        theirs = Terms.from_wire(expect(body, "terms", dict))

        probe = expect(body, "probe", bool, False)
        facts = await self._taken()
        assert self.guest is not None
        services.guests.assign(self.guest, migration)
        self.record.id = migration
        if not probe:
            services.records.add(self.record)
        preflight.check(self._theirs, self._description)
        agreements = self._answer(facts)
        self._secret = secrets.token_bytes(SECRET_SIZE)
        while True:
            terms = Terms(
                {name: Traits.of(services.features[name]) for name in agreements},
                conflicts=tuple(services.conflicts(self._source_facts(facts), facts)),
                prefer=services.policy.prefer,
                require=services.policy.require,
                closed=self._closed_paths(),
            )
            plan = build_plan(services.features, agreements, theirs, terms, self._left_out)
            try:
                real = await self._set_up(plan, facts)
                break
            except GuestError as error:
                # Some things show only now: that this host forbids userfaultfd, say.
                if _lost(error) or not (refused := await self._refused(plan, facts)):
                    raise
                self._left_out.update(refused)
                agreements = {name: agreements[name] for name in agreements if name not in refused}
        self._plan = self.record.plan = plan
        prepared: dict[str, Any] = {"plan": plan.to_wire(), "terms": terms.to_wire()}
        if probe:
            await self.put_back()
        else:
            prepared["settings"] = settings_to_wire(real)
        prepared["secret"] = self._secret.hex()
        services.verdicts.expect(self.record.id, self._secret)
        for name in self._selected:
            if name in agreements:
                machine.feature(name, agreements[name])
            elif name in self._proposals:
                machine.feature(name, {"withdrawn": self._left_out[name]})
        machine.prepared(prepared)
        self._control.flush()

    def _answer(self, facts: GuestFacts) -> dict[str, dict[str, Any]]:
        """Each feature's agreement; what cannot be had goes to ``left_out``."""
        agreements: dict[str, dict[str, Any]] = {}
        for name, proposal in self._proposals.items():
            feature = self.services.features[name]
            answer = feature.probe_guest(facts, "destination")
            try:
                if isinstance(answer, No):
                    raise Withdraw(answer.reason)
                agreements[name] = feature.answer(facts, self.services.host, proposal)
            except Withdraw as withdrawal:
                self._left_out[name] = str(withdrawal)
            except ValueError as error:
                raise ProtocolError(
                    f"the source's parameters for {name} make no sense: {error}", code="feature"
                ) from None
        return agreements

    async def _set_up(self, plan: Plan, facts: GuestFacts) -> Settings:
        return await self.set_up_plan(plan, facts, "destination", lambda: self._note("prepared"))

    async def _refused(self, plan: Plan, facts: GuestFacts) -> dict[str, str]:
        """The features of a plan that QEMU does not take by themselves, and what it says."""
        assert self.guest is not None
        features = self.services.features
        refused: dict[str, str] = {}
        # Those that need no other one first: where one falls, those that need it do as well.
        for name in sorted(plan.features, key=lambda name: len(features[name].requires)):
            members = [name]
            for member in members:
                members.extend(sorted(features[member].requires - set(members)))
            if not refused.keys().isdisjoint(members):
                continue
            alone = Plan(plan.path, tuple(members), plan.agreements)
            try:
                wanted = settings_for(alone, features, facts, "destination")
                before, _ = await self.guest.apply(wanted)
                await self.guest.apply(before)
            except GuestError as error:
                if _lost(error):
                    raise
                refused[name] = error.text
        return refused

    def _source_facts(self, here: GuestFacts) -> GuestFacts:
        """What the source said of its QEMU; where it said nothing, the same as here."""
        version = here.version
        words = str(self._theirs.get("qemu", "")).split(".")
        if len(words) == 3 and all(word.isdigit() for word in words):
            version = (int(words[0]), int(words[1]), int(words[2]))
        machine = str(self._theirs.get("machine", here.machine))
        return GuestFacts(here.name, here.backend, version, machine, {}, {})

    def _closed_paths(self) -> dict[str, str]:
        closed = {
            path: "excluded by the destination's policy"
            for path in PATHS
            if path in self.services.policy.exclude
        }
        if self.services.ports is None:
            closed.setdefault(DIRECT, "the destination offers no direct-ports")
        if not self._host:
            closed.setdefault(DIRECT, "the two daemons speak over a unix socket, not a network")
        return closed

    # the stream

    async def _receive(self) -> None:
        guest, plan, control = self.guest, self._plan, self._control
        assert guest is not None and plan is not None
        self.record.update(step="receiving RAM")
        self._note("receiving")
        self._receiving = True
        if self._baseline:
            log.info(
                "guest {guest} comes in from {peer} with no feature selected",
                guest=guest.name,
                peer=self.record.peer,
            )
            await guest.incoming(await control.take_socket())
            await self._watch_baseline()
            return
        control.listen(self._said)
        control.stay_alive(self.services.deadlines.peer)
        await guest.stop()
        self._path = DestinationPath(
            self.services, plan, self.record.id, self._secret, self.wake, guest
        )
        ready = await self._path.open(self._host)
        control.machine.status({"ready": True, **ready})
        control.flush()
        await self._watch()

    async def _watch_baseline(self) -> None:
        assert self.guest is not None
        while True:
            status = await self.look()
            if status == "completed":
                return
            if status in OVER:
                raise MigrationError(f"QEMU's migration {status}: {await self.reason()}")
            await self.rest()

    async def _watch(self) -> None:
        """Follow QEMU until the guest is here for good.

        :raises QmigdError: it has failed, or must not go on.
        """
        assert self.guest is not None
        while True:
            status = await self.look()
            if status in OVER and status != "completed":
                raise MigrationError(f"QEMU's migration {status}: {await self.reason()}")
            if self._failure is not None:
                raise self._failure
            if self._owned is Owned.YES:
                if await self._settled(status):
                    return
                self._raise_if_torn(status)
            else:
                self._raise_if_over()
                if status == "completed":
                    self.record.update(step="waiting for the source to release the guest")
            await self.rest()

    async def _settled(self, status: str) -> bool:
        """The guest is ours: let it run; returns whether all of it is here."""
        assert self.guest is not None
        state = await self.guest.query_status()
        if status == "completed" and self._run and state != "running":
            await self.guest.cont()
            state = await self.guest.query_status()
        if state == "running" or (state != "inmigrate" and not self._run):
            self._ran = True
            self.services.verdicts.settle(self.record.id, True)
            if not self._told_running:
                self._told_running = True
                self._tell({"running": True, "status": status})
            return status == "completed"
        return False

    def _raise_if_torn(self, status: str) -> None:
        """Give up where the guest is ours and the rest of its RAM cannot come any more."""
        torn = status == "postcopy-paused"
        if self._path is not None and self._path.failure is not None:
            # All may have come before; then QEMU needs a moment to say so.
            self._torn = self._torn or self.now()
            torn = torn or self.now() - self._torn > self.services.deadlines.stall
        if torn:
            raise MigrationError(
                "the stream broke in postcopy; the guest runs here, and RAM that had not "
                "arrived is still at the source: do not end its QEMU there"
            )

    def _raise_if_over(self) -> None:
        if self._cancelled is not None:
            raise MigrationError(self._cancelled, code="cancelled")
        if self._path is not None and self._path.failure is not None:
            raise self._path.failure
        if self._control.failure is not None:
            raise self._control.failure

    def _said(self, event: Event | None) -> None:
        """The source speaks."""
        if isinstance(event, CancelAsked):
            self._cancelled = event.reason or "cancelled at the source"
        elif isinstance(event, Released):
            self._run = bool(event.body.get("run", True))
            Deferred.fromCoroutine(self._take_over())
        self.wake()

    async def _take_over(self) -> None:
        """RELEASE has come: the guest is ours from here on."""
        assert self.guest is not None
        self._note("released")
        self._owned = Owned.YES
        self.record.owner = "destination"
        if self._path is not None:
            self._path.hold()
        try:
            # A QEMU that is gone before it was told to run has never run.
            await self.guest.query_status()
            self._ran = None
            if self._run:
                # While it still waits for the stream this only lets it run later.
                await self.guest.cont()
            self._tell({"released": True})
        except QmigdError as error:
            self._failure = error
        self.wake()

    def _tell(self, body: Mapping[str, Any]) -> None:
        """Tell the source, if it is still there: it may be lost, but not what it released."""
        if self._control.failure is None:
            self._control.machine.status(body)
            self._control.flush()

    # the end

    async def _settle(self, error: QmigdError | None) -> None:
        """Leave this host in order, whatever happened."""
        if error is not None:
            await self._recover()
            self.services.verdicts.settle(self.record.id, self._ran)
        self._report(error)
        if error is None:
            await self._drain()
        self._control.close()
        if self._path is not None:
            self._path.close()
        await self.put_back()
        self.let_go()
        self.services.journal.forget(self.record.id, "destination")
        if error is None:
            self.record.end("completed", "arrived")
            return
        log.warn(
            "incoming migration {id} of guest {guest} failed: {error}",
            id=self.record.id,
            guest=self.record.guest or "?",
            error=error.text,
        )
        status = "cancelled" if error.code == "cancelled" else "failed"
        self.record.end(status, "runs here" if self._ran else "not here", error)

    async def _recover(self) -> None:
        """After a failure: nothing must run here that may run at the source."""
        if self._taking is not None:
            # A QEMU may just be starting for it.
            with suppress(QmigdError):
                await self._taking
        guest = self.guest
        if guest is None:
            return
        try:
            if not self._receiving:
                if self.services.guests.launched_for(guest, self.record.id):
                    await guest.quit()
                return
            state = await guest.query_status()
            if self._owned is Owned.YES:
                self._ran = state != "inmigrate"
            if on_destination_failure(self._owned, bool(self._ran)) is Act.QUIT:
                self.saved = Settings()
                await guest.quit()
        except GuestGone:
            # It ended by itself, as QEMU does when a load fails.
            self.saved = Settings()
        except QmigdError as second:
            log.warn("guest {guest}: {error}", guest=guest.name, error=second.text)

    def _report(self, error: QmigdError | None) -> None:
        """Tell the source what became of it."""
        control = self._control
        if self._baseline and self._receiving:
            return
        if error is not None and not self._receiving:
            control.refuse(error)
            return
        if control.failure is None:
            body: dict[str, Any] = {"ran": self._ran, "status": self.qemu_status}
            if error is not None:
                body["error"] = {"class": error.code, "desc": error.text}
            control.machine.outcome(body)
            control.flush()
            control.said_all()

    async def _drain(self) -> None:
        """Let a relay pass on what QEMU has still to say.

        QEMU calls a migration completed before it tells the source so on the return path,
        without which the source's QEMU never ends.  The source closes the control
        connection when all has arrived.
        """
        end = self.now() + self.services.deadlines.guest
        while self._path is not None and self._path.busy and self.now() < end:
            if self._control.failure is not None:
                return
            await self.rest()

    def _note(self, stage: str) -> None:
        assert self.guest is not None
        self.services.journal.write(
            self.record.id,
            "destination",
            {
                "guest": self.record.guest,
                "qmp": self.services.guests.where(self.guest),
                "peer": self.record.peer,
                "stage": stage,
                "baseline": self._baseline,
                "secret": self._secret.hex(),
                "run": self._run,
                "capabilities": dict(self.saved.capabilities),
                "parameters": dict(self.saved.parameters),
            },
        )


def _lost(error: GuestError) -> bool:
    """Whether it is about the QEMU itself, and not about what it was told."""
    return isinstance(error, GuestGone | DeadlineError)


def _canonical(migration: str) -> str:
    try:
        return str(uuid.UUID(migration))
    except ValueError:
        raise ProtocolError(f"{migration!r} is no UUID", code="bad-json") from None
