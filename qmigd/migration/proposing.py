"""The source's side of the handshake: what it proposes, and the plan that comes of it.

::

    source                                   destination
    looks at its guest,                      greets
    meanwhile calls: Reply, the guest's name
                                             looks at its guest
    describes the guest; FEATURE ...; PREPARE
                                             FEATURE ...; PREPARED with its plan
    computes the plan as well, and compares
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, succeed
from twisted.logger import Logger

from ..backend import Examined
from ..channels.secured import TlsSide
from ..errors import DeadlineError, FeatureError, MigrationError, ProtocolError
from ..handshake.events import FeatureSaid, Prepared, Secured
from ..handshake.source import SourceHandshake
from ..interfaces import (
    DIRECT,
    HANDOVER,
    HOST,
    PATH,
    PATHS,
    PROCESS,
    TCP,
    GuestFacts,
    No,
    Settings,
    Withdraw,
)
from ..negotiation.agree import build_plan
from ..negotiation.obstacles import Obstacle
from ..negotiation.plan import Plan
from ..negotiation.policy import Policy
from ..negotiation.terms import Terms, Traits, expect
from ..transports.programs import reach
from ..transports.sockets import limit_reads
from ..transports.uri import (
    Address,
    FdAddress,
    InBandAddress,
    Reachable,
    TcpAddress,
    bare,
    network_of,
)
from ..wire.greeting import TLS
from ..wire.role import SECRET_SIZE
from .control import Control, connect_control
from .foreseeing import most_channels
from .legacy import check_policy, plain_plan
from .movable import check_movable
from .move import Move
from .offer import kernel_does_tls, not_offered
from .services import Services
from .settings import compare, settings_for, settings_from_wire
from .status import Record

__all__ = ["Cancelled", "Proposing"]

log = Logger()

#: Transports over which one QEMU cannot connect to the other, and why.  Over vsock it can.
_NO_NETWORK = {
    "unix": "the two daemons speak over a unix socket, whose other end may be forwarded, and not "
    "over a network in which both guests' processes have addresses",
    "exec": "a program carries the connections, and only it knows where the destination is",
    "fd": "all connections are handed over as descriptors, and direct would be processes that make "
    "their own",
}

#: Until the destination says more.
_NOT_OFFERED = Obstacle("its qmigd does not offer it", HOST, "destination")


class Cancelled(MigrationError):
    """The user ended the migration."""

    code = "cancelled"


class Proposing(Move):
    """A source that negotiates.

    :ivar uri: where the peer listens.
    :ivar transport: by which it is reached, out of :data:`~qmigd.interfaces.TRANSPORTS`.
    :ivar in_band: the handshake has its in-band form there.
    :ivar reached: where it was reached at: of a name with several addresses, the one that is
        this very host.
    :ivar programs: what carries the connections of ``exec:``, or ``None``.
    :ivar control: the control connection, once there is one.
    :ivar calling: the attempt to make it.
    :ivar left_out: why features are not used.
    :ivar plan: what both sides settled on.
    :ivar tunables: the user's.
    :ivar secret: what proves that a payload channel is this migration's.
    :ivar was_running: the guest ran when its migration began.
    :ivar cancelled: why the user wants an end of it, or ``None``.
    :ivar baseline: no feature was selected: the stream takes the control connection.
    :ivar plain: nobody has greeted: there is no qmigd at the destination.
    :ivar hostname: what the peer's certificate has to be for; empty: nobody has said.
    """

    def __init__(
        self,
        services: Services,
        record: Record,
        uri: Address,
        policy: Policy,
        tls_hostname: str | None = None,
    ) -> None:
        super().__init__(services, record)
        self.in_band = isinstance(uri, InBandAddress)
        place = bare(uri)
        self.uri, self.programs = reach(
            services.reactor,
            services.bound(place, record.id, record.guest),
            record.name,
            services.leftovers,
        )
        self.reached: Reachable = self.uri
        self.transport = str(place).partition(":")[0]
        self.policy = policy
        self.tunables: Mapping[str, Any] = {}
        self.calling: Deferred[list[str]] | None = None
        self.left_out: dict[str, Obstacle] = {}
        self.control: Control | None = None
        self.plan: Plan | None = None
        self.secret = b""
        self.was_running = True
        self.cancelled: str | None = None
        self.baseline = False
        self.plain = False
        # But over TCP there is no name but one that is given.
        self.hostname = tls_hostname or (place.host if isinstance(place, TcpAddress) else "")

    @property
    def in_tls(self) -> bool:
        """Whether the control connection is in TLS."""
        return self.control is not None and self.control.peer is not None

    def tls_side(self, *, payload: bool = False) -> TlsSide | None:
        """What is done where a connection to the peer goes over to TLS."""
        services = self.services
        keep = payload and self.transport == TCP and kernel_does_tls(services, self.policy)
        return services.security.calling(self.hostname, keep_keys=keep)

    async def _call(self) -> list[str]:
        """Connect to the peer, and say which guest it is about.

        Done while the guest is still being looked at, so that both sides look at the same
        time; what this guest turns out not to be able to do is withdrawn later.

        :return: what both hosts can do; what they cannot is in ``_left_out``.
        """
        deadline = self.services.deadlines.handshake
        machine = SourceHandshake()
        control = await connect_control(
            self.services.reactor,
            self.uri,
            machine,
            deadline,
            self.tls_side(),
            in_band=self.in_band,
        )
        self.control = control
        at = network_of(control.transport.getPeer())
        if isinstance(self.uri, TcpAddress) and isinstance(at, TcpAddress):
            self.reached = replace(at, mptcp=self.uri.mptcp)
        try:
            greeted = await control.greeted(deadline)
        except DeadlineError:
            if not control.silent or self.in_band:
                raise  # this side has said something there already
            limit_reads(control.transport, 0)
            self.plain = True
            return []
        candidates = self._candidates(greeted.features)
        machine.reply(candidates)
        control.flush()
        if TLS in candidates:
            await control.next(Secured, deadline=deadline, what="TLS with the peer")
            self.record.peer_names = tuple(control.peer or ())
        machine.guest({"name": self.record.guest})
        control.flush()
        return candidates

    def _candidates(self, offered: tuple[str, ...]) -> list[str]:
        self.left_out |= not_offered(self.services, self.policy, "source")
        candidates = []
        if TLS not in self.left_out and not self.hostname:
            self.left_out[TLS] = Obstacle(
                f"{self.uri} has no host name that a certificate could be for; say which with "
                f"'tls-hostname'",
                HOST,
                "source",
            )
        for name, feature in self.services.features.items():
            if name in self.left_out:
                continue
            if self.transport not in feature.transports:
                able = " or ".join(sorted(feature.transports))
                self.left_out[name] = Obstacle(
                    f"it goes over {able} only, and the peer is reached over {self.transport}", PATH
                )
            elif name in offered:
                candidates.append(name)
            else:
                self.left_out[name] = _NOT_OFFERED
        self._check_required()
        return candidates

    def _check_required(self) -> None:
        for name in self.policy.require:
            if name in self.left_out:
                raise FeatureError(f"{name} is required but cannot be had: {self.left_out[name]}")

    async def negotiate(self, *, probe: bool = False) -> GuestFacts:
        """Come to a plan with the destination; returns the guest's facts.

        :param probe: the destination is to set nothing up for good.
        :raises QmigdError: there is none, and why.
        """
        assert self.guest is not None
        looking = Deferred.fromCoroutine(self.guest.examine())
        if isinstance(self.uri, FdAddress):
            # Who makes the connections is told how many before the first.
            looking = succeed(self._foresee(self.uri, await looking))
        self.calling = Deferred.fromCoroutine(self._call())
        both: list[Deferred[Any]] = [self.calling, looking]
        (called, candidates), (looked, examined) = await DeferredList(both, consumeErrors=True)
        if self.cancelled is not None:
            raise Cancelled(self.cancelled)
        for succeeded, failure in ((looked, examined), (called, candidates)):
            if not succeeded:
                raise failure.value
        facts: GuestFacts = examined.facts
        check_movable(examined)
        self.was_running = examined.status == "running"
        assert self.control is not None
        if self.control.failure is not None:
            raise self.control.failure
        if self.plain:
            self._go_plain(probe)
            return facts
        control, machine, left_out = self.control, self.control.machine, self.left_out

        machine.guest(examined.description)
        proposals: dict[str, dict[str, Any]] = {}
        for name in candidates:
            try:
                proposals[name] = self._propose(name, facts)
                machine.feature(name, proposals[name])
            except Withdraw as withdrawal:
                left_out[name] = Obstacle.of(withdrawal, PROCESS, "source")
                machine.feature(name, left_out[name].to_wire("withdrawn"))
        self._check_required()
        terms = Terms(
            {
                name: Traits.of(self.services.features[name], facts, self.services.host)
                for name in proposals
            },
            prefer=self.policy.prefer,
            require=self.policy.require,
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
                left_out[said.name] = Obstacle.from_wire(
                    said.parameters, "withdrawn", "destination"
                )
            elif said.name in proposals:
                self._accept(said, proposals[said.name])
                agreements[said.name] = said.parameters
        self._agree(said.body, terms, agreements, left_out, facts)
        self.baseline = not candidates
        return facts

    def _foresee(self, uri: FdAddress, examined: Examined) -> Examined:
        """Tell the management app how many connections it may be asked for.

        :raises Cancelled: none any more.
        """
        if self.cancelled is not None:
            raise Cancelled(self.cancelled)
        uri.foresee(
            most_channels(self.services, self.policy, self.transport, examined.facts, self.tunables)
        )
        return examined

    def _go_plain(self, probe: bool) -> None:
        """Do without a qmigd at the destination, if that is allowed."""
        policy = replace(self.policy, legacy="refuse") if probe else self.policy
        check_policy(policy, self.record.guest, str(self.uri), self.services.deadlines.handshake)
        log.info(
            "guest {guest} goes to {peer} as QEMU's plain stream: no qmigd has greeted there, and "
            "no feature is used",
            guest=self.record.guest,
            peer=self.uri,
        )
        self.plan = self.record.plan = plain_plan(self.services.features, "destination")
        self.baseline = True

    def _propose(self, name: str, facts: GuestFacts) -> dict[str, Any]:
        feature = self.services.features[name]
        answer = feature.probe_guest(facts, "source")
        if isinstance(answer, No):
            raise Withdraw(answer.reason, answer.where)
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
            if path == DIRECT and self.transport in _NO_NETWORK:
                closed[path] = _NO_NETWORK[self.transport]
            elif path in self.policy.exclude:
                closed[path] = "excluded by the source's policy"
            elif not any_feature and path != HANDOVER:
                closed[path] = "no feature was selected, so the stream takes this very connection"
        return closed

    def _agree(
        self,
        body: Mapping[str, Any],
        terms: Terms,
        agreements: Mapping[str, Mapping[str, Any]],
        left_out: dict[str, Obstacle],
        facts: GuestFacts,
    ) -> None:
        """Compute the plan, and see that the destination came to the same."""
        theirs = Terms.from_wire(expect(body, "terms", dict))
        for name, said in expect(body, "not-offered", dict, {}).items():
            if left_out.get(name) is _NOT_OFFERED and isinstance(said, dict):
                left_out[name] = Obstacle.from_wire(said, "reason", "destination")
        plan = build_plan(self.services.features, agreements, terms, theirs, left_out)
        plan.verify(expect(body, "plan", dict))
        self.plan = self.record.plan = plan
        self.secret = _secret(body)
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


def _secret(body: Mapping[str, Any]) -> bytes:
    try:
        secret = bytes.fromhex(expect(body, "secret", str))
    except ValueError:
        secret = b""
    if len(secret) != SECRET_SIZE:
        raise ProtocolError("PREPARED has no usable 'secret'", code="bad-json")
    return secret
