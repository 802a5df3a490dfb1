"""The destination's side of the handshake: the guest that is meant, and what it can do.

The guest is taken hold of as soon as the source has said its name, so that both
sides look at their guests at the same time.  PREPARE is answered when the plan is
made and this side's QEMU is set up for it.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from twisted.internet.defer import Deferred

from ..errors import DeadlineError, FeatureError, GuestError, GuestGone, ProtocolError
from ..handshake.events import FeatureSaid, GuestDescribed, PrepareAsked, Selected, Started
from ..interfaces import (
    DIRECT,
    PATH,
    PATHS,
    PROCESS,
    TCP,
    GuestFacts,
    No,
    PeerIdentity,
    Settings,
    Withdraw,
)
from ..negotiation.agree import build_plan
from ..negotiation.obstacles import Obstacle
from ..negotiation.plan import Plan
from ..negotiation.terms import Terms, Traits, expect
from ..transports.descriptors import DescriptorAddress
from ..transports.sockets import caller
from ..transports.uri import TcpAddress, network_of
from ..wire.greeting import TLS
from ..wire.role import SECRET_SIZE
from . import preflight
from .control import Control
from .destination_path import DestinationPath
from .move import Move
from .offer import not_offered
from .services import Services
from .settings import settings_for, settings_to_wire

__all__ = ["Answering"]


class Answering(Move):
    """A destination that negotiates.

    :ivar control: the control connection.
    :ivar at: this host's address, as the peer has reached it; ``None``: in no network.
    :ivar selected: the features in the source's Reply.
    :ivar taking: the attempt to take hold of the guest that was named.
    :ivar left_out: why features are not used.
    :ivar plan: what both sides settled on.
    :ivar path: how the stream comes in, once that is settled; ``None``: as the baseline has it.
    :ivar secret: what proves that a payload channel is this migration's.
    :ivar run: the guest is to run once it is here.
    :ivar baseline: no feature was selected: the stream takes the control connection.
    """

    def __init__(self, services: Services, control: Control, selected: Selected) -> None:
        peer = control.transport.getPeer()
        self._handed_over = isinstance(peer, DescriptorAddress)
        where = str(peer) if self._handed_over else caller(control.transport)
        super().__init__(
            services, services.records.new(str(uuid.uuid4()), "", "destination", where)
        )
        self.record.peer_names = tuple(control.peer or ())
        self.control = control
        self.at = network_of(control.transport.getHost())
        self.selected = selected.features
        self.taking: Deferred[GuestFacts] | None = None
        self.left_out: dict[str, Obstacle] = {}
        self.plan: Plan | None = None
        self.path: DestinationPath | None = None
        self.secret = b""
        self.run = True
        self.baseline = False
        self._theirs: Mapping[str, Any] = {}
        self._description: Mapping[str, Any] = {}
        self._proposals: dict[str, Mapping[str, Any]] = {}

    async def negotiate(self) -> None:
        """Answer the source up to its START.

        :raises QmigdError: it does not come to that, and why.
        """
        control, deadline = self.control, self.services.deadlines.handshake
        for name in self._required:
            if name in self.services.features and name not in self.selected:
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
                    self.left_out[said.name] = Obstacle.from_wire(
                        said.parameters, "withdrawn", "source"
                    )
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
                self.plan = self.record.plan = Plan("handover", path_reason="baseline")
                await self._set_up(self.plan, facts)
                break
        control.expect_within(None)
        self.baseline = not self.selected

    @property
    def _required(self) -> tuple[str, ...]:
        """What this side insists on: by its policy, or because of where the peer comes from."""
        tls = (TLS,) if self.control.tls_required else ()
        return (*self.services.policy.require, *tls)

    def _described(self, description: Mapping[str, Any]) -> None:
        """Take in what the source says of its guest; the name may come ahead of the rest."""
        name = self._theirs.get("name", description.get("name"))
        if name is not None and not isinstance(name, str):
            raise ProtocolError("the guest's 'name' is not a string", code="bad-json")
        self._theirs = {**self._theirs, **description, "name": name}
        if name is not None and self.taking is None:
            self.services.security.check_guest(self.control.peer, name)
            self.taking = Deferred.fromCoroutine(self._take_guest(name))

    async def _taken(self) -> GuestFacts:
        """The guest that is meant, in our hands.  To be called once."""
        taking, self.taking = self.taking, None
        return await (taking or self._take_guest(None))

    async def _take_guest(self, name: str | None) -> GuestFacts:
        examined = await self.take_from_peer(name, self.control.peer)
        self._description = examined.description
        return examined.facts

    async def _prepare(self, body: Mapping[str, Any]) -> None:
        services, machine = self.services, self.control.machine
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
        self.secret = secrets.token_bytes(SECRET_SIZE)
        while True:
            terms = Terms(
                {
                    name: Traits.of(services.features[name], facts, services.host)
                    for name in agreements
                },
                conflicts=tuple(services.conflicts(self._source_facts(facts), facts)),
                prefer=services.policy.prefer,
                require=self._required,
                closed=self._closed_paths(),
            )
            plan = build_plan(services.features, agreements, theirs, terms, self.left_out)
            try:
                real = await self._set_up(plan, facts)
                break
            except GuestError as error:
                # Some things show only now: that this host forbids userfaultfd, say.
                if _lost(error) or not (refused := await self._refused(plan, facts)):
                    raise
                self.left_out.update(refused)
                agreements = {name: agreements[name] for name in agreements if name not in refused}
        self.plan = self.record.plan = plan
        prepared: dict[str, Any] = {"plan": plan.to_wire(), "terms": terms.to_wire()}
        if refused := not_offered(services):
            prepared["not-offered"] = {name: one.to_wire("reason") for name, one in refused.items()}
        if probe:
            await self.put_back()
        else:
            prepared["settings"] = settings_to_wire(real)
            if self.selected:
                self.path = DestinationPath(
                    services,
                    plan,
                    self.record.id,
                    self.secret,
                    self.wake,
                    self.guest,
                    self.control.peer,
                )
                self.path.expect()
        prepared["secret"] = self.secret.hex()
        services.verdicts.expect(self.record.id, self.secret, self.control.peer)
        for name in self.selected:
            if name in agreements:
                machine.feature(name, agreements[name])
            elif name in self._proposals:
                machine.feature(name, self.left_out[name].to_wire("withdrawn"))
        machine.prepared(prepared)
        self.control.flush()

    def _answer(self, facts: GuestFacts) -> dict[str, dict[str, Any]]:
        """Each feature's agreement; what cannot be had goes to ``left_out``."""
        agreements: dict[str, dict[str, Any]] = {}
        address = self.at.host if isinstance(self.at, TcpAddress) else ""
        host = replace(self.services.host, address=address)
        for name, proposal in self._proposals.items():
            feature = self.services.features[name]
            answer = feature.probe_guest(facts, "destination")
            try:
                if isinstance(answer, No):
                    raise Withdraw(answer.reason, answer.where)
                if feature.transports <= {TCP} and not isinstance(self.at, TcpAddress):
                    # What the source connects with is another matter: a descriptor that was
                    # handed in here may be the end of anything.
                    raise Withdraw("it goes over TCP only, and this connection is none", PATH)
                agreements[name] = feature.answer(facts, host, proposal)
            except Withdraw as withdrawal:
                self.left_out[name] = Obstacle.of(withdrawal, PROCESS, "destination")
            except ValueError as error:
                raise ProtocolError(
                    f"the source's parameters for {name} make no sense: {error}", code="feature"
                ) from None
        return agreements

    async def _set_up(self, plan: Plan, facts: GuestFacts) -> Settings:
        control = self.control
        peer = PeerIdentity("", control.peer_subject) if control.peer is not None else None
        return await self.set_up_plan(
            plan, facts, "destination", lambda: self.note("prepared"), peer=peer
        )

    async def _refused(self, plan: Plan, facts: GuestFacts) -> dict[str, Obstacle]:
        """The features of a plan that QEMU does not take by themselves, and what it says."""
        assert self.guest is not None
        features = self.services.features
        refused: dict[str, Obstacle] = {}
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
                refused[name] = Obstacle(error.text, PROCESS, "destination")
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
        if self._handed_over:
            closed.setdefault(DIRECT, "its connections are handed over as descriptors")
        elif self.at is None:
            closed.setdefault(DIRECT, "the two daemons speak over a unix socket, not a network")
        return closed

    def note(self, stage: str) -> None:
        """Put down in the journal how far it is."""
        self.note_arrival(stage, baseline=self.baseline, secret=self.secret, run=self.run)


def _lost(error: GuestError) -> bool:
    """Whether it is about the QEMU itself, and not about what it was told."""
    return isinstance(error, GuestGone | DeadlineError)


def _canonical(migration: str) -> str:
    try:
        return str(uuid.UUID(migration))
    except ValueError:
        raise ProtocolError(f"{migration!r} is no UUID", code="bad-json") from None
