"""The source's side of the three paths (:mod:`qmigd.migration.paths`)."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from ..backend import Guest
from ..channels.attach import open_channel
from ..channels.inband import InBand
from ..channels.relay import (
    DestinationRelay,
    SourceRelay,
)
from ..channels.secured import Secured, TlsSide
from ..channels.tls import PeerSocket
from ..errors import PeerGone, ProtocolError, QmigdError
from ..handshake.channel import ChannelHandshake
from ..interfaces import DIRECT, HANDOVER
from ..negotiation.plan import MAIN, Plan
from ..transports.mptcp import carries_mptcp
from ..transports.uri import FdAddress, Network, Reachable, TcpAddress
from ..wire.greeting import TLS
from ..wire.role import RoleHeader
from .paths import Path, for_qemu
from .services import Services

__all__ = ["SourcePath"]

log = Logger()

#: Seconds between two looks at channels that are being opened.
_LOOK = 0.05
#: Seconds within which QEMU makes the connections to a relay that it makes at once.  It takes
#: a millisecond; a QEMU that has failed before never makes them.
_CONNECTS_WITHIN = 5.0


class SourcePath(Path):
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
        :raises QmigdError: a channel cannot be had; QEMU has not been told of anything yet.
        """
        if self.failure is not None:
            raise self.failure
        if self._plan.path == DIRECT:
            port = ready.get("port")
            if not isinstance(port, int) or not 0 < port <= 0xFFFF or at is None:
                raise ProtocolError("the destination names no port for 'direct'", code="bad-json")
            return self._uri(at, port)
        if self._plan.path == HANDOVER:
            return for_qemu(await self._channel(*MAIN))
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
