"""The control connection: a handshake machine on a Twisted transport.

The machine (:mod:`qmigd.handshake`) turns bytes into events; this module feeds it,
never reading what may be payload, sends what it has to say, and hands its events to
whoever waits for them.  Once the migration runs it also keeps the connection alive,
and finds out when the peer is not: every byte from the peer is a sign of life, and
both sides send a heartbeat when they have nothing else to say.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError, DNSLookupError
from twisted.internet.interfaces import IDelayedCall, IHalfCloseableProtocol, IReactorTime
from twisted.internet.protocol import Protocol
from twisted.internet.task import LoopingCall
from twisted.python.failure import Failure
from zope.interface import implementer

from ..channels.inband import InBand
from ..channels.secured import Secured, TlsSide
from ..errors import DeadlineError, PeerGone, ProtocolError, QmigdError, RemoteError, TlsError
from ..handshake.events import Event, Failed, Greeted, Heartbeat
from ..negotiation.allow import PeerNames
from ..transports.reasons import not_connected
from ..transports.sockets import detach, drained, limit_reads, quietly, tune_stream
from ..transports.uri import Reachable
from ..waiting import with_deadline

__all__ = ["HEARTBEATS", "Control", "connect_control"]

#: How many heartbeats are sent within the time after which a silent peer is lost.
HEARTBEATS = 4

#: Seconds that a refused peer has to read why and to close its side.
LINGER = 2.0

#: Bytes of what it still sends that are read, and dropped, at a time.
DROPPED = 65536

_OTHER = {"source": "destination", "destination": "source"}

E = TypeVar("E", bound=Event)


@implementer(IHalfCloseableProtocol)
class Control(Protocol):
    """One control connection, of either role.

    :ivar machine: the handshake machine; call :meth:`flush` after speaking to it.
    :ivar bytes: the machine's bytes on the connection, in clear or in TLS.
    :ivar failure: why the connection is of no use any more, or ``None``.
    :ivar tls_required: this side does not go on in clear with the peer.
    :ivar silent: the peer has not said a byte.
    """

    transport: Any

    def __init__(self, machine: Any, clock: IReactorTime, tls: TlsSide | None = None) -> None:
        """:param tls: what is done where the machine asks for TLS; ``None``: it will not."""
        self.machine = machine
        self.bytes: Secured | InBand = Secured(machine, tls)
        self.failure: QmigdError | None = None
        self.tls_required = False
        self.silent = True
        self._clock = clock
        self._events: deque[Event] = deque()
        self._waiter: Deferred[None] | None = None
        self._listener: Callable[[Event | None], None] | None = None
        self._heartbeats: LoopingCall | None = None
        self._heard = 0.0
        self._detached = False
        self._lingering: IDelayedCall | None = None
        self._error_said = False
        self._expiry: IDelayedCall | None = None

    def go_in_band(self, *, server: bool) -> None:
        """The handshake has its in-band form here; to be called before it begins.

        :param server: this side accepted the connection.
        """
        assert isinstance(self.bytes, Secured)
        self.bytes = InBand(self.bytes, server=server)

    @property
    def in_band(self) -> bool:
        """Whether the handshake has its in-band form here."""
        return isinstance(self.bytes, InBand)

    # Twisted's side

    def connectionMade(self) -> None:
        self.flush()
        limit_reads(self.transport, self.bytes.may_read)

    def dataReceived(self, data: bytes) -> None:
        if self._lingering is not None:
            return
        self.silent = False
        self._heard = self._clock.seconds()
        self._take_all(self.bytes.receive(data))
        if self._detached or self._lingering is not None:
            return
        self.flush()
        limit_reads(self.transport, self.bytes.may_read)
        if self.failure is not None:
            self._linger()

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.expect_within(None)
        self._stop_heartbeats()
        if self._lingering is not None and self._lingering.active():
            self._lingering.cancel()
        if not self._detached:
            self._take_all(self.bytes.eof())
            self._error_said = True
            self._fail(PeerGone("the peer closed the connection"))

    def readConnectionLost(self) -> None:
        """The peer has no more to say, but may still read why that was not enough."""
        if self._lingering is None:
            self._take_all(self.bytes.eof())
            self.flush()
        self.close()

    def writeConnectionLost(self) -> None:
        """This side's half is closed, by itself or because the peer is gone: nothing to do."""

    # what the owner calls

    @property
    def peer(self) -> PeerNames | None:
        """Whose certificate it came with; ``None``: it is in clear."""
        session = self.bytes.session
        return session.peer if session is not None and self.bytes.encrypted else None

    @property
    def peer_subject(self) -> str:
        """The subject of that certificate."""
        session = self.bytes.session
        return "" if session is None else session.certificate.subject.rfc4514_string()

    def flush(self) -> None:
        """Send what the machine has to say."""
        data = self.bytes.data_to_send()
        if data and self.transport is not None:
            self.transport.write(data)

    async def next(self, *kinds: type[E], deadline: float, what: str) -> E:
        """Wait for the next event, which has to be one of ``kinds``.

        :param deadline: in seconds.
        :param what: what is waited for, for the error.
        :raises QmigdError: the peer failed or is gone.
        :raises DeadlineError: nothing came in time.
        """
        if not self._events and self.failure is None:
            self._waiter = Deferred()
            await with_deadline(self._clock, self._waiter, deadline, what)
        # A peer that has gone may have said all before; what comes before an ERROR leads nowhere.
        if self._events and (self.failure is None or isinstance(self.failure, PeerGone)):
            event = self._events.popleft()
            if isinstance(event, kinds):
                return event
            raise ProtocolError(
                f"{type(event).__name__} came where {what} was expected",
                code="unexpected-message",
            )
        assert self.failure is not None
        raise self.failure

    async def greeted(self, deadline: float) -> Greeted:
        """Wait for the greeting, on the side that connected."""
        return await self.next(Greeted, deadline=deadline, what="the peer's greeting")

    def listen(self, listener: Callable[[Event | None], None]) -> None:
        """From now on hand events to ``listener`` as they come; ``None`` is the end."""
        self._listener = listener
        while self._events:
            listener(self._events.popleft())
        if self.failure is not None:
            listener(None)

    def stay_alive(self, deadline: float) -> None:
        """Send heartbeats, and give the peer up after ``deadline`` silent seconds."""
        self._heard = self._clock.seconds()
        self._heartbeats = LoopingCall(self._beat, deadline)
        self._heartbeats.clock = self._clock
        self._heartbeats.start(deadline / HEARTBEATS, now=False)

    async def take_socket(self) -> socket.socket:
        """Take the socket away from the reactor, once all that was said has been sent.

        Not a byte beyond what the machine wanted has been read from it.

        :raises PeerGone: the connection was lost before that.
        """
        self.flush()
        limit_reads(self.transport, 0)
        await drained(self.transport)
        self._detached = True
        self._stop_heartbeats()
        sock = detach(self.transport)
        tune_stream(sock)
        return sock

    def expect_within(self, seconds: float | None) -> None:
        """The peer has to be done with its part within ``seconds``; ``None``: no more."""
        if self._expiry is not None and self._expiry.active():
            self._expiry.cancel()
        self._expiry = None
        if seconds is not None:
            self._expiry = self._clock.callLater(seconds, self._expired, seconds)

    def _expired(self, seconds: float) -> None:
        self.refuse(DeadlineError(f"the handshake was not done within {seconds:g} seconds"))

    def abandon(self, error: QmigdError) -> None:
        """Give whoever waits for the peer this error instead."""
        self._fail(error)

    def refuse(self, error: QmigdError) -> None:
        """Send an ERROR, unless one of the two sides has sent one already, and close."""
        if not self._error_said and not self._detached:
            self._error_said = True
            self.machine.error(error.code, error.text)
            self.flush()
            self._fail(error)
            self._linger()
        else:
            self._fail(error)
            self.close()

    def said_all(self) -> None:
        """This side has said its last word: it sends no heartbeats and expects none."""
        self._stop_heartbeats()

    def close(self) -> None:
        self._stop_heartbeats()
        if self.transport is not None and not self._detached:
            self.transport.loseConnection()

    # inside

    def _linger(self) -> None:
        """Close, but let the peer read the ERROR first.

        A connection that is closed with bytes unread is reset, and what was sent last
        may be lost with it.  So only this side's half is closed, and what still comes
        is read and dropped, for a moment.
        """
        self._stop_heartbeats()
        if self._lingering is None and self.transport.connected:
            self.transport.loseWriteConnection()
            self._lingering = self._clock.callLater(LINGER, self.transport.abortConnection)
            limit_reads(self.transport, DROPPED)

    def _beat(self, deadline: float) -> None:
        silent = self._clock.seconds() - self._heard
        if silent >= deadline:
            self._fail(PeerGone(f"the peer has been silent for {silent:.0f} seconds"))
            if self.transport is not None:
                self.transport.abortConnection()
            return
        self.machine.heartbeat()
        self.flush()

    def _stop_heartbeats(self) -> None:
        if self._heartbeats is not None and self._heartbeats.running:
            self._heartbeats.stop()

    def _take_all(self, events: Iterable[Event]) -> None:
        """Take all that has come at once, before anybody who waits acts on any of it."""
        for event in events:
            self._take(event)
        if self._events:
            self._wake()

    def _take(self, event: Event) -> None:
        if isinstance(event, Heartbeat):
            return
        if isinstance(event, Failed):
            kind: type[QmigdError] = RemoteError if event.remote else ProtocolError
            if event.code == "peer-gone":
                kind = PeerGone
            text = event.text
            if event.remote and event.code != TlsError.code:  # which has words for that already
                # Where, which names and paths in it do not tell.
                text = f"the {_OTHER[self.machine.role]} says: {text}"
            self._error_said = True
            self._fail(kind(text, code=event.code))
            return
        if self._listener is not None:
            self._listener(event)
            return
        self._events.append(event)

    def _fail(self, error: QmigdError) -> None:
        if self.failure is not None:
            return
        self.failure = error
        self._stop_heartbeats()
        if self._listener is not None:
            self._listener(None)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None:
            waiter, self._waiter = self._waiter, None
            waiter.callback(None)


async def connect_control(
    reactor: Any,
    address: Reachable,
    machine: Any,
    deadline: float,
    tls: TlsSide | None = None,
    *,
    in_band: bool = False,
) -> Control:
    """Connect to a peer's port.

    :param tls: what is done where the machine asks for TLS.
    :param in_band: the handshake has its in-band form there.
    :raises PeerGone: nobody answers there; the text has the reason.
    """
    control = Control(machine, reactor, tls)
    if in_band:
        control.go_in_band(server=False)
    connecting = address.client(reactor).connect(quietly(lambda: control))
    try:
        await with_deadline(reactor, connecting, deadline, f"a connection to {address}")
    except (ConnectError, DNSLookupError, DeadlineError, ValueError) as error:
        # ValueError is what Twisted makes of a name that no host can have.
        why = not_connected(error)
        raise PeerGone(f"no qmigd can be reached at {address}: {why}") from None
    tune_stream(control.transport.getHandle())
    return control
