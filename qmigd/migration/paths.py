"""The three paths, from either side: how the payload gets from QEMU to QEMU.

====================  =====================================  ================================
path                  source                                 destination
====================  =====================================  ================================
``handover``          opens one payload channel, and hands    hands the channel that comes in
                      its socket to QEMU                      to QEMU
``direct``            tells QEMU host and port                has QEMU listen on a port
``relay``             a socket for QEMU's channels, each      a channel to QEMU's socket for
                      forwarded to the peer                   each that comes in
====================  =====================================  ================================

Where the plan has TLS, every payload channel is in TLS from its greeting on.  Behind
ATTACHED the kernel takes it over, where it can, and else the relay's threads do it.

In the baseline form none of them is needed: the control connection itself is handed
to QEMU.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from ..channels.attach import Line, open_channel
from ..channels.codecs import chain
from ..channels.inband import InBand
from ..channels.relay import (
    ChannelEnded,
    ChannelHeld,
    ChannelLost,
    ChannelRefused,
    DestinationRelay,
    RelayEvent,
    SourceRelay,
)
from ..channels.secured import Secured, TlsSide
from ..channels.tls import PeerSocket, TlsSocket
from ..errors import (
    GuestError,
    LocalError,
    MigrationError,
    PeerGone,
    ProtocolError,
    QmigdError,
)
from ..handshake.channel import ChannelHandshake
from ..interfaces import COPY, DIRECT, HANDOVER, MOVERS, RELAY, Guest, ICodec, Role
from ..negotiation.allow import PeerNames
from ..negotiation.plan import MAIN, Plan
from ..transports.mptcp import carries_mptcp
from ..transports.uri import FdAddress, Network, Reachable, TcpAddress
from ..wire.greeting import TLS
from ..wire.role import RoleHeader
from .services import Services

__all__ = ["DestinationPath", "SourcePath"]

log = Logger()

#: Seconds between two looks at channels that are being opened.
_LOOK = 0.05
#: Seconds within which QEMU makes the connections to a relay that it makes at once.  It takes
#: a millisecond; a QEMU that has failed before never makes them.
_CONNECTS_WITHIN = 5.0


class _Path:
    """What both sides have in common.

    :ivar failure: why the stream cannot go on, or ``None``.
    :ivar by: the feature that says what QEMU listens on and connects to, or ``None``.
    """

    def __init__(
        self, services: Services, plan: Plan, migration: str, secret: bytes, wake: Callable[[], Any]
    ) -> None:
        self.failure: QmigdError | None = None
        self.by: str | None = None
        self._services = services
        self._plan = plan
        self._migration = uuid.UUID(migration)
        self._secret = secret
        self._wake = wake
        self._relay: SourceRelay | DestinationRelay | None = None
        self._held: str | None = None

    @property
    def broken(self) -> str | None:
        """Why a relay has no stream any more, also where QEMU is not told; or ``None``."""
        return self.failure.text if self.failure is not None else self._held

    @property
    def busy(self) -> bool:
        """Whether a relay may still have bytes to pass on."""
        return self._relay is not None and any(
            channel.state in ("opening", "open") for channel in self._relay.channels()
        )

    def hold(self) -> None:
        """From here on QEMU's sockets stay open when the peer is lost (ownership)."""
        if self._relay is not None:
            self._relay.hold = True

    def close(self) -> None:
        """The migration is over: nothing of the path may be left."""
        if self._relay is not None:
            self._relay.stop().addErrback(
                lambda failure: log.failure("a relay did not end", failure=failure)
            )
            self._relay = None

    def _fail(self, error: QmigdError) -> None:
        if self.failure is None:
            self.failure = error
            self._wake()

    def _uri(self, at: Network, port: int) -> str:
        """What QEMU listens on and connects to on the path ``direct``."""
        host = at.host if isinstance(at, TcpAddress) else ""
        for name in self._plan.features:
            agreement = self._plan.agreements[name]
            uri = self._services.features[name].uri(agreement, host, port)
            if uri is not None:
                self.by = name
                return uri
        return str(replace(at, port=port))

    def _codec(self) -> Callable[[], ICodec] | None:
        makers = [
            self._services.features[name].codec(self._plan.agreements[name])
            for name in self._plan.features
        ]
        return chain([maker for maker in makers if maker is not None])

    def _mover(self, role: Role) -> str:
        for name in self._plan.features:
            mover = self._services.features[name].mover(self._plan.agreements[name], role)
            if mover is not None:
                if mover not in MOVERS:
                    raise MigrationError(
                        f"{name} wants bytes moved by '{mover}', but there are {', '.join(MOVERS)}"
                    )
                return mover
        return COPY

    def _heard(self, event: RelayEvent) -> None:
        name = "a channel" if event.channel is None else f"channel {event.channel[0]}"
        if isinstance(event, ChannelLost):
            self._fail(PeerGone(f"{name} to the peer broke: {event.reason}"))
        elif isinstance(event, ChannelRefused):
            self._fail(MigrationError(event.reason))
        elif isinstance(event, ChannelHeld) and event.channel == MAIN:
            self._held = f"{name}: {event.reason}"
        elif isinstance(event, ChannelEnded):
            self._wake()


def _socket(end: PeerSocket) -> socket.socket:
    """What QEMU can be given.

    :raises LocalError: the TLS on it is not in the kernel.
    """
    if isinstance(end, TlsSocket):
        end.close()
        raise LocalError(
            "The plan is to hand a connection in TLS to QEMU, but this side's kernel does not "
            "do the TLS."
        )
    return end


class SourcePath(_Path):
    """The source's side: :meth:`open` returns what QEMU is to migrate to."""

    def __init__(
        self,
        services: Services,
        plan: Plan,
        migration: str,
        secret: bytes,
        wake: Callable[[], Any],
        peer: Reachable,
        tls_side: Callable[..., TlsSide | None],
        *,
        in_band: bool,
        unawaited: frozenset[str] = frozenset(),
    ) -> None:
        """
        :param in_band: channels begin in the handshake's in-band form.
        :param unawaited: channels that QEMU connects as it begins and does not wait for.
        """
        super().__init__(services, plan, migration, secret, wake)
        self._unawaited = [channel for channel in plan.channels if channel[0] in unawaited]
        self._steadying: Deferred[None] | None = None
        self._owned = False
        self._peer = peer
        self._in_band = in_band
        self._tls_side = tls_side
        self._ahead: dict[tuple[str, int], Deferred[Any]] = {}
        self._opening: Deferred[PeerSocket] | None = None

    def prepare(self) -> None:
        """Open the first channel ahead of time, while the QEMUs are set up.

        Not where an app makes it: it is to hear first of all that are going to be asked for.
        """
        if self._plan.path != DIRECT and not isinstance(self._peer, FdAddress):
            Deferred.fromCoroutine(self._open_ahead(MAIN))

    async def open(self, at: Network | None, ready: Mapping[str, Any]) -> str | socket.socket:
        """Make ready.

        :param at: the peer's address, as this side reached it.
        :param ready: the destination's STATUS that said so.
        """
        if self._plan.path == DIRECT:
            port = ready.get("port")
            if not isinstance(port, int) or not 0 < port <= 0xFFFF or at is None:
                raise ProtocolError("the destination names no port for 'direct'", code="bad-json")
            return self._uri(at, port)
        if self._plan.path == HANDOVER:
            return _socket(await self._channel(*MAIN))
        relay = SourceRelay(
            self._services.reactor,
            self._services.run_dir,
            self._plan.channels,
            self._channel,
            self._heard,
            self._codec(),
            self._mover("source"),
        )
        self._relay = relay
        relay.hold = bool(self._unawaited)
        return str(relay.listen())

    def set_off(self, guest: Guest) -> None:
        """QEMU has been told to migrate."""
        if self._relay is not None and self._unawaited:
            self._steadying = Deferred.fromCoroutine(self._steady(self._relay, guest))

    async def steady(self) -> None:
        """Wait until QEMU's migration may be failed: not before QEMU has its connections.

        Otherwise one that comes about later ends QEMU (``unawaited`` in
        :mod:`qmigd.guests.quirks`), and the guest with it.
        """
        if self._steadying is not None:
            steadying, self._steadying = self._steadying, None
            await steadying

    async def _steady(self, relay: SourceRelay | DestinationRelay, guest: Guest) -> None:
        reactor = self._services.reactor
        end = reactor.seconds() + _CONNECTS_WITHIN
        while reactor.seconds() < end:
            begun = [(channel.name, channel.index) for channel in relay.channels()]
            if all(channel in begun for channel in self._unawaited):
                break
            await deferLater(reactor, _LOOK)
        # QEMU has connected, and its main loop takes that in when it has nothing better to do.
        await deferLater(reactor, _LOOK)
        with suppress(QmigdError):
            await guest.query_status()
        relay.hold = self._owned

    async def complete(self, pause: Callable[[float], Awaitable[None]]) -> None:
        """See that every channel has reached the peer, before the guest is let go of.

        QEMU takes a channel for connected once the relay has it, and may open its last one
        (preempt) only when its guest is to run at the destination, where it would be missed
        for good if it did not come about.  So what QEMU has not opened yet is opened ahead.

        :param pause: waits for so many seconds.
        :raises QmigdError: a channel cannot be had; the path has failed.
        """
        relay = self._relay
        if relay is None:
            return
        await self._settled(relay, pause)
        for channel in self._plan.channels:
            if channel not in [(begun.name, begun.index) for begun in relay.channels()]:
                await self._open_ahead(channel)
                # One after another, as ever: a QEMU that gets preempt before its multifd
                # channels waits for what preempt is going to say, and does nothing else.
                await self._settled(relay, pause)

    async def _settled(
        self, relay: SourceRelay | DestinationRelay, pause: Callable[[float], Awaitable[None]]
    ) -> None:
        """Wait for the channels that are on their way."""
        while any(begun.state == "opening" for begun in relay.channels()):
            await pause(_LOOK)
        if self.failure is not None:
            raise self.failure

    async def _open_ahead(self, channel: tuple[str, int]) -> None:
        handed = self._ahead[channel] = Deferred()
        self._opening = Deferred.fromCoroutine(self._open(*channel))
        try:
            end = await self._opening
        except (CancelledError, QmigdError) as error:
            reason = error.text if isinstance(error, QmigdError) else "the migration is over"
            failure = PeerGone(f"channel {channel[0]} to the peer cannot be opened: {reason}")
            if self._ahead.pop(channel, None) is None and not handed.called:
                # QEMU has asked for it meanwhile.
                handed.errback(failure)
            self._fail(failure)
        else:
            if handed.called:
                end.close()
            else:
                handed.callback(end)

    def hold(self) -> None:
        super().hold()
        self._owned = True

    def abandon(self) -> None:
        """Open nothing more ahead of time."""
        if self._opening is not None:
            self._opening.cancel()

    def close(self) -> None:
        super().close()
        self.abandon()
        ahead, self._ahead = self._ahead, {}
        for handed in ahead.values():
            handed.addCallback(lambda end: end.close())

    def _channel(self, name: str, index: int) -> Deferred[PeerSocket]:
        """Open a channel to the peer, unless that was done ahead of time."""
        ahead = self._ahead.pop((name, index), None)
        return ahead if ahead is not None else Deferred.fromCoroutine(self._open(name, index))

    async def _open(self, name: str, index: int) -> PeerSocket:
        role = RoleHeader(self._migration, name, index)
        tls = TLS in self._plan.features
        secured = Secured(
            ChannelHandshake(role, self._secret, tls=tls),
            self._tls_side(payload=True) if tls else None,
        )
        peer, deadline = self._peer, self._services.deadlines.handshake
        if isinstance(peer, FdAddress):
            # How long the app takes is no part of how long the peer may take.
            peer, deadline = peer.to(name, index), deadline + peer.timeout
        line = await open_channel(
            self._services.reactor,
            peer.client(self._services.reactor),
            InBand(secured, server=False) if self._in_band else secured,
            deadline,
        )
        peer = self._peer
        if isinstance(peer, TcpAddress) and peer.mptcp and not carries_mptcp(line.sock):
            log.warn(
                "channel {name} {index} of migration {id} is an ordinary TCP connection: "
                "something between the two hosts does not let Multipath TCP through",
                name=name,
                index=index,
                id=str(self._migration),
            )
        return line.plain()


class DestinationPath(_Path):
    """The destination's side.

    :meth:`expect` lets the source open channels; :meth:`open` has the guest's QEMU wait for
    the stream, and gives it what has come by then.
    """

    def __init__(
        self,
        services: Services,
        plan: Plan,
        migration: str,
        secret: bytes,
        wake: Callable[[], Any],
        guest: Guest,
        peer: PeerNames | None,
    ) -> None:
        super().__init__(services, plan, migration, secret, wake)
        self._guest = guest
        self._peer = peer if TLS in plan.features else None
        self._port: int | None = None
        self._take: Callable[[str, int, Line], None] | None = None
        self._early: list[tuple[str, int, Line]] = []

    def expect(self) -> None:
        """Let the source open its channels, which it may do as soon as it has PREPARED."""
        if self._plan.path != DIRECT:
            channels = self._plan.channels if self._plan.path == RELAY else [MAIN]
            self._services.attachments.expect(
                self._migration, self._secret, channels, self._came, self._peer
            )

    async def open(self, at: Network | None) -> dict[str, Any]:
        """Make ready, and return what the source has to know.

        :param at: the address of this host that the source has connected to.
        :raises QmigdError: QEMU refused, or there is no free port.
        """
        if self._plan.path == DIRECT:
            assert at is not None  # or the path would be closed
            return {"port": await self._listen(at)}
        if self._plan.path == RELAY:
            relay = DestinationRelay(
                self._services.reactor,
                self._services.run_dir,
                self._heard,
                self._codec(),
                self._mover("destination"),
            )
            self._relay = relay
            await self._guest.incoming(str(relay.address))
            self._take_by(partial(self._relay_it, relay))
        else:
            self._take_by(self._hand_over)
        return {}

    async def _listen(self, at: Network) -> int:
        ports = self._services.ports
        assert ports is not None
        refusals: list[GuestError] = []
        for port in ports.candidates(at):
            try:
                await self._guest.incoming(self._uri(at, port))
            except GuestError as error:
                if refusals and error.text == refusals[-1].text:
                    break
                # Somebody may have taken the port in between: try another one.
                refusals.append(error)
                continue
            ports.take(port)
            self._port = port
            return port
        # The first one has the reason: a QEMU that has failed once may say no more than that.
        raise (*refusals, GuestError("QEMU could not listen on any of the direct-ports"))[0]

    def _came(self, name: str, index: int, line: Line) -> None:
        if self._take is None:
            self._early.append((name, index, line))
        else:
            self._take(name, index, line)

    def _take_by(self, take: Callable[[str, int, Line], None]) -> None:
        self._take = take
        early, self._early = self._early, []
        for channel in early:
            take(*channel)

    def _relay_it(self, relay: DestinationRelay, name: str, index: int, line: Line) -> None:
        try:
            relay.take(name, index, line.plain())
        except QmigdError as error:
            self._fail(error)

    def _hand_over(self, name: str, index: int, line: Line) -> None:
        async def hand_over() -> None:
            await self._guest.incoming(_socket(line.plain()))

        Deferred.fromCoroutine(hand_over()).addErrback(self._refused)

    def _heard(self, event: RelayEvent) -> None:
        if isinstance(event, ChannelHeld) and event.channel == MAIN:
            # The source's QEMU has sent everything, or its qmigd was killed: which of the
            # two it was shows in whether the guest is whole in a while.  Any other channel
            # may end before the stream does.
            event = ChannelLost(event.channel, event.reason)
        super()._heard(event)

    def _refused(self, failure: Any) -> None:
        failure.trap(QmigdError)
        self._fail(failure.value)

    def close(self) -> None:
        super().close()
        self._services.attachments.forget(self._migration)
        early, self._early = self._early, []
        for _, _, line in early:
            line.sock.close()
        if self._port is not None and self._services.ports is not None:
            self._services.ports.free(self._port)
            self._port = None
