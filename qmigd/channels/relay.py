"""The relay: every payload channel of a migration, from QEMU to QEMU through two qmigd.

::

    source                                                            destination
    QEMU --unix--> SourceRelay ==one TCP connection a channel==> DestinationRelay --unix--> QEMU

The source's QEMU connects to a socket in a directory that nobody else can enter.  Its
connections carry no names, but come in a known order: main, multifd, preempt, as the
plan lists them.  Each is forwarded as it comes and before the next one; never are all
awaited: a QEMU may not open the second before the first is answered, and its preempt
channel comes only with postcopy.  The destination connects to its own QEMU in the order
in which the channels reach it, because QEMU before 8.0 takes the first one for main.

Once the two ends of a channel are there, a :class:`qmigd.channels.pump.Pump` joins them.
"""

from __future__ import annotations

import os
import secrets
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.error import CannotListenError, ConnectError
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Protocol
from twisted.logger import Logger

from qmigd.channels.pump import Pump
from qmigd.channels.relay_channels import (
    Channel,
    ChannelEnded,
    ChannelHeld,
    ChannelLost,
    ChannelRefused,
    ChannelState,
    RelayEvent,
)
from qmigd.channels.tls import PeerSocket
from qmigd.errors import GuestGone, LocalError, QmigdError
from qmigd.interfaces import COPY, ICodec
from qmigd.transports.reasons import not_connected
from qmigd.transports.sockets import detach, quietly
from qmigd.transports.uri import MAX_UNIX_PATH, UnixAddress

__all__ = ["DestinationRelay", "SourceRelay"]

log = Logger()


class _Relay(ABC):
    """What the two sides have in common: one end comes, the other is got, in order."""

    def __init__(
        self,
        reactor: Any,
        run_dir: str | os.PathLike[str],
        on_event: Callable[[RelayEvent], None],
        codec: Callable[[], ICodec] | None,
        *,
        outward: str = COPY,
        inward: str = COPY,
    ) -> None:
        self._reactor = reactor
        self._on_event = on_event
        self._codec = codec
        self._outward = outward
        self._inward = inward
        self._hold = False
        self._aborted: str | None = None
        self._channels: list[Channel] = []
        self._queue: deque[Channel] = deque()
        self._working = False
        self._opening: Deferred[PeerSocket] | None = None
        self._stopped: list[Deferred[None]] = []
        path = os.path.join(run_dir, f"relay-{secrets.token_hex(4)}")
        if len(os.fsencode(path)) > MAX_UNIX_PATH:
            raise LocalError(
                f"The run directory {os.fspath(run_dir)} has too long a path: that of a "
                f"unix socket in it would have more than {MAX_UNIX_PATH} bytes."
            )
        #: What QEMU connects to or listens on.
        self.address = UnixAddress(path)

    # for the owner

    @property
    def hold(self) -> bool:
        """Keep QEMU's sockets open when the peer is lost, until :meth:`abort`.

        Off at first: in precopy QEMU must notice.  To be switched on before postcopy
        begins: from then on a source whose sockets close may run its guest again.  When it is
        switched off, QEMU notices what has happened meanwhile.
        """
        return self._hold

    @hold.setter
    def hold(self, hold: bool) -> None:
        self._hold = hold
        for channel in self._channels:
            if channel.pump is not None:
                channel.pump.hold = hold
            elif channel.lost and not hold:
                self._drop(channel, "the peer was lost")

    def channels(self) -> list[ChannelState]:
        """The channels that have begun, in the order in which they came."""
        return [channel.state() for channel in self._channels]

    def abort(self, reason: str) -> None:
        """Close both ends of every channel now, and take no more; harmless when repeated."""
        if self._aborted is not None:
            return
        self._aborted = reason
        self._queue.clear()
        if self._opening is not None:
            self._opening.cancel()
        for channel in self._channels:
            if channel.pump is not None:
                channel.pump.abort(reason)
            else:
                self._drop(channel, reason)

    def stop(self, reason: str = "the migration is over") -> Deferred[None]:
        """Abort, and wait until no socket, thread or file is left of the relay."""
        self.abort(reason)
        done: Deferred[None] = Deferred()
        self._stopped.append(done)
        self._check_stopped()
        return done

    # for the two sides

    @abstractmethod
    async def _other_end(self, channel: Channel) -> PeerSocket: ...

    @abstractmethod
    def _sockets(self, first: Any, second: Any) -> tuple[socket.socket, PeerSocket]:
        """Return the guest's and the peer's."""

    @abstractmethod
    def _failed(self, channel: Channel, reason: str) -> None:
        """The other end cannot be had."""

    def _begin(self, name: str, index: int, first: PeerSocket) -> None:
        channel = Channel(name, index, first)
        self._channels.append(channel)
        self._queue.append(channel)
        if not self._working:
            self._working = True
            Deferred.fromCoroutine(self._work())

    def _drop(self, channel: Channel, reason: str) -> None:
        """Close the one end that is there."""
        if channel.first is not None:
            channel.first.close()
            channel.first = None
            self._tell(ChannelEnded(channel.id, reason))

    def _tell(self, event: RelayEvent) -> None:
        try:
            self._on_event(event)
        except Exception:
            # What follows from the event must happen all the same.
            log.failure("the owner of a relay failed")
        self._check_stopped()

    # inside

    async def _work(self) -> None:
        """Get the other ends, one after the other.  Never raises."""
        while self._queue:
            channel = self._queue.popleft()
            reason = "qmigd itself failed; its log says where"
            try:
                self._opening = Deferred.fromCoroutine(self._other_end(channel))
                if self._aborted is not None:
                    # Whoever was asked for the other end has ended it all instead.
                    self._opening.cancel()
                second = await self._opening
            except CancelledError:
                reason = "it was cancelled"
            except QmigdError as error:
                reason = error.text
            except Exception:
                log.failure("a channel of a relay")
            else:
                self._have(channel, second)
                continue
            finally:
                self._opening = None
            if self._aborted is None:
                self._failed(channel, reason)
        self._working = False
        self._check_stopped()

    def _have(self, channel: Channel, second: PeerSocket) -> None:
        first, channel.first = channel.first, None
        if first is None:
            # Aborted meanwhile.
            second.close()
        else:
            self._join(channel, *self._sockets(first, second))

    def _join(self, channel: Channel, guest: socket.socket, wire: PeerSocket) -> None:
        try:
            channel.pump = Pump(
                f"{channel.name} {channel.index}",
                guest,
                wire,
                call=self._reactor.callFromThread,
                on_lost=lambda reason: self._tell(ChannelLost(channel.id, reason)),
                on_held=lambda: self._tell(ChannelHeld(channel.id, "the peer closed its end")),
                on_end=lambda reason: self._tell(ChannelEnded(channel.id, reason)),
                codec=self._codec,
                outward=self._outward,
                inward=self._inward,
                hold=self._hold,
            )
        except Exception:
            # From a codec's maker: the only code in there that is not ours.
            log.failure("the codec of a channel")
            reason = "its codec could not be made; the log says why"
            self._tell(ChannelLost(channel.id, reason))
            guest.close()
            wire.close()
            self._tell(ChannelEnded(channel.id, reason))
        else:
            channel.pump.start()

    def _idle(self) -> bool:
        return not self._working and all(
            channel.state().state == "ended" for channel in self._channels
        )

    def _check_stopped(self) -> None:
        if self._stopped and self._idle():
            # On the destination it is QEMU's, which may leave it.
            Path(self.address.path).unlink(missing_ok=True)
            waiting, self._stopped = self._stopped, []
            for done in waiting:
                done.callback(None)


class SourceRelay(_Relay):
    """Takes what the source's QEMU connects, and opens a channel to the peer for each."""

    def __init__(
        self,
        reactor: Any,
        run_dir: str | os.PathLike[str],
        channels: Sequence[tuple[str, int]],
        open_channel: Callable[[str, int], Awaitable[PeerSocket]],
        on_event: Callable[[RelayEvent], None],
        codec: Callable[[], ICodec] | None = None,
        mover: str = COPY,
    ) -> None:
        """
        :param run_dir: nobody else can enter it; as short a path as can be.
        :param channels: name and index of each, in the order in which QEMU connects.
        :param open_channel: opens one to the peer, and returns its socket once payload
            may flow; its errors are :class:`~qmigd.errors.QmigdError`.
        :param codec: makes what encodes and decodes, an object for each direction.
        :param mover: how the stream is moved to the peer, out of
            :data:`~qmigd.interfaces.MOVERS`; what comes back is little, and copied.
        :raises LocalError: ``run_dir`` has too long a path.
        """
        super().__init__(reactor, run_dir, on_event, codec, outward=mover)
        self._planned = deque(channels)
        self._open_channel = open_channel
        self._port: IListeningPort | None = None

    def listen(self) -> UnixAddress:
        """Begin; returns what QEMU is to ``migrate`` to.

        :raises LocalError: the socket cannot be made.
        """
        try:
            self._port = self._reactor.listenUNIX(
                self.address.path, quietly(lambda: _Taking(self._connected)), mode=0o600
            )
        except CannotListenError as error:
            raise LocalError(
                f"{self.address} cannot be listened on: {error.socketError}."
            ) from None
        return self.address

    def abort(self, reason: str) -> None:
        if self._port is not None and self._aborted is None:
            closing = maybeDeferred(self._port.stopListening)
            closing.addBoth(self._port_closed)
        super().abort(reason)

    def _port_closed(self, result: object) -> None:
        self._port = None
        self._check_stopped()

    def _idle(self) -> bool:
        return self._port is None and super()._idle()

    def _connected(self, sock: socket.socket) -> None:
        if self._aborted is not None:
            sock.close()
        elif not self._planned:
            sock.close()
            self._tell(
                ChannelRefused(
                    None,
                    f"the guest opened more than the {len(self._channels)} channels planned",
                )
            )
        else:
            self._begin(*self._planned.popleft(), sock)

    async def _other_end(self, channel: Channel) -> PeerSocket:
        return await self._open_channel(channel.name, channel.index)

    def _sockets(self, first: Any, second: Any) -> tuple[socket.socket, PeerSocket]:
        return first, second

    def _failed(self, channel: Channel, reason: str) -> None:
        channel.lost = True
        self._tell(ChannelLost(channel.id, reason))
        if not self._hold:
            self._drop(channel, reason)


class DestinationRelay(_Relay):
    """Takes the channels that the peer opened, and connects each to the destination's QEMU.

    QEMU is to be told ``migrate-incoming`` with :attr:`address` first.
    """

    def __init__(
        self,
        reactor: Any,
        run_dir: str | os.PathLike[str],
        on_event: Callable[[RelayEvent], None],
        codec: Callable[[], ICodec] | None = None,
        mover: str = COPY,
    ) -> None:
        """
        :param run_dir: nobody else can enter it; as short a path as can be.
        :param codec: makes what encodes and decodes, an object for each direction.
        :param mover: how the stream is moved to QEMU, out of
            :data:`~qmigd.interfaces.MOVERS`; what goes back is little, and copied.
        :raises LocalError: ``run_dir`` has too long a path.
        """
        super().__init__(reactor, run_dir, on_event, codec, inward=mover)

    def take(self, name: str, index: int, wire: PeerSocket) -> None:
        """A channel from the peer, ready for payload."""
        if self._aborted is not None:
            wire.close()
        else:
            self._begin(name, index, wire)

    async def _other_end(self, channel: Channel) -> PeerSocket:
        taking: Deferred[socket.socket] = Deferred()
        factory = quietly(lambda: _Taking(taking.callback))
        try:
            await self.address.client(self._reactor).connect(factory)
        except ConnectError as error:
            raise GuestGone(
                f"The guest's process does not take channel {channel.name} {channel.index}: "
                f"{not_connected(error)}"
            ) from None
        return await taking

    def _sockets(self, first: Any, second: Any) -> tuple[socket.socket, PeerSocket]:
        return second, first

    def _failed(self, channel: Channel, reason: str) -> None:
        self._drop(channel, reason)


class _Taking(Protocol):
    """Hands its connection's socket on before the reactor has read anything from it."""

    def __init__(self, take: Callable[[socket.socket], None]) -> None:
        self._take = take

    def connectionMade(self) -> None:
        self._take(detach(self.transport))
