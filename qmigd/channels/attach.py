"""How a payload channel begins: opened on the source, claimed on the destination.

::

    source                                          destination
    open_channel() ----- TCP connection ----------> (greets)
                   ----- role header -------------> Attachments.claim()
                   <---- ATTACHED ----------------- Claim.hand_over()
    a Line                                          on_channel(name, index, a Line)

In a migration in TLS that begins right behind the greeting, and the rest is inside.

Until ATTACHED both ends of the connection are in the hands of a reactor; then both leave
it, with not one byte of payload read: the source sends none before ATTACHED, and the
destination has stopped reading when it says so.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectError, ConnectingCancelledError, DNSLookupError
from twisted.internet.interfaces import IReactorTime, IStreamClientEndpoint
from twisted.internet.protocol import Protocol as Connection
from twisted.python.failure import Failure

from qmigd.channels import kernel_tls
from qmigd.channels.inband import InBand
from qmigd.channels.secured import Secured
from qmigd.channels.tls import PeerSocket, TlsSession, TlsSocket
from qmigd.errors import (
    DeadlineError,
    MigrationError,
    PeerGone,
    ProtocolError,
    QmigdError,
    RemoteError,
)
from qmigd.negotiation.allow import PeerNames
from qmigd.transports.reasons import not_connected
from qmigd.transports.sockets import detach, drained, limit_reads, quietly, tune_stream
from qmigd.wire.role import RoleHeader

__all__ = ["Attachments", "Claim", "Line", "open_channel"]


@dataclass(frozen=True)
class Line:
    """A connection to the peer that carries a payload channel.

    :ivar sock: blocking; not a byte of payload has been read from it.
    :ivar session: the TLS that was begun on it, or ``None``: it is in clear, or the kernel
        has the TLS.
    """

    sock: socket.socket
    session: TlsSession | None = None

    def plain(self) -> PeerSocket:
        """Return what stream bytes are written to and read from; the line is used up.

        Where the session has kept its keys, the kernel goes on with it.

        :raises LocalError: the kernel does not; the connection is closed.
        """
        if self.session is None:
            return self.sock
        if not self.session.keeps_keys:
            return TlsSocket(self.sock, self.session)
        try:
            kernel_tls.install(self.sock, self.session.take_keys())
        except BaseException:
            self.sock.close()
            raise
        return self.sock


class _Failed(Protocol):
    """The last event of a handshake that is closed."""

    code: str
    text: str
    remote: bool


# The source's side.


def open_channel(
    clock: IReactorTime, endpoint: IStreamClientEndpoint, machine: Secured | InBand, deadline: float
) -> Deferred[Line]:
    """Open a payload channel to the peer.

    Cancelling closes the connection.

    :param endpoint: connects to the peer's port.
    :param machine: a :class:`qmigd.handshake.channel.ChannelHandshake` in there knows
        which channel it is, and proves it.
    :param deadline: in seconds, for the connection and for ATTACHED together.
    :return: fails
        with :class:`~qmigd.errors.PeerGone`, :class:`~qmigd.errors.RemoteError`,
        :class:`~qmigd.errors.ProtocolError` or :class:`~qmigd.errors.DeadlineError`.
    """

    def too_late(result: object, seconds: float) -> Failure:
        return Failure(
            DeadlineError(f"The peer did not accept a payload channel within {seconds:g} seconds.")
        )

    opening = Deferred.fromCoroutine(_open(endpoint, machine))
    return opening.addTimeout(deadline, clock, onTimeoutCancel=too_late)


async def _open(endpoint: IStreamClientEndpoint, machine: Secured | InBand) -> Line:
    opener = _Opener(machine)
    try:
        await endpoint.connect(quietly(lambda: opener))
    except (ConnectError, DNSLookupError) as error:
        why = not_connected(error)
        raise PeerGone(f"The peer cannot be reached for a payload channel: {why}") from None
    except ConnectingCancelledError:  # Twisted's word for it, where a name is looked up or called
        raise CancelledError from None
    sock = await opener.opened
    tune_stream(sock)
    return Line(sock, machine.session)


class _Opener(Connection):
    """A connection that asks to be a payload channel.

    :ivar opened: the socket, once it is one.
    """

    def __init__(self, machine: Secured | InBand) -> None:
        self.opened: Deferred[socket.socket] = Deferred(lambda _: self._abandon())
        self._machine = machine
        self._done = False

    def connectionMade(self) -> None:
        self._go_on()

    def dataReceived(self, data: bytes) -> None:
        self._heard(self._machine.receive(data))
        if not self._done:
            self._go_on()

    def connectionLost(self, reason: Any = None) -> None:
        if not self._done:
            self._heard(self._machine.eof())

    def _go_on(self) -> None:
        assert self.transport is not None
        self.transport.write(self._machine.data_to_send())
        limit_reads(self.transport, self._machine.wanted)

    def _heard(self, events: Sequence[object]) -> None:
        if self._machine.closed:
            self._done = True
            assert self.transport is not None
            self.transport.write(self._machine.data_to_send())
            self.transport.loseConnection()
            self.opened.errback(_error(cast(_Failed, events[-1])))
        elif events and not self._machine.wanted:
            # ATTACHED: what follows is payload, and the header that it answers is sent.
            self._done = True
            self.opened.callback(detach(self.transport))

    def _abandon(self) -> None:
        self._done = True
        if self.transport is not None:
            cast(Any, self.transport).abortConnection()


def _error(failed: _Failed) -> QmigdError:
    if failed.remote:
        return RemoteError(failed.text, code=failed.code)
    kind = PeerGone if failed.code == PeerGone.code else ProtocolError
    return kind(failed.text, code=failed.code)


# The destination's side.


@dataclass
class _Expected:
    secret: bytes = field(repr=False)
    peer: PeerNames | None
    channels: frozenset[tuple[str, int]]
    on_channel: Callable[[str, int, Line], None]
    taken: set[tuple[str, int]] = field(default_factory=set)


class Attachments:
    """Which migrations expect which channels; nobody else gets one."""

    def __init__(self) -> None:
        self._expected: dict[uuid.UUID, _Expected] = {}

    def expect(
        self,
        migration: uuid.UUID,
        secret: bytes,
        channels: Collection[tuple[str, int]],
        on_channel: Callable[[str, int, Line], None],
        peer: PeerNames | None = None,
    ) -> None:
        """Let a migration have its channels.

        :param secret: what the source has to prove that it knows.
        :param channels: name and index of each, to come in any order, each once.
        :param on_channel: gets name, index and the connection, which then is its.
        :param peer: whose certificate a channel has to come with; ``None``: in clear.
        :raises MigrationError: a migration of this id expects channels already.
        """
        if migration in self._expected:
            raise MigrationError(
                f"A migration with the id {migration} is under way already; begin a new one."
            )
        self._expected[migration] = _Expected(secret, peer, frozenset(channels), on_channel)

    def forget(self, migration: uuid.UUID) -> None:
        """Take no more channels for a migration; harmless when it expects none."""
        self._expected.pop(migration, None)

    def claim(self, role: RoleHeader, peer: PeerNames | None = None) -> Claim:
        """Take the channel that a connection asks for.

        :param peer: whose certificate the connection came with; ``None``: in clear.
        :raises ProtocolError: ``unknown-migration``, ``bad-proof``, ``not-secured``,
            ``unknown-channel`` or ``channel-taken``, looked at in that order: who cannot
            prove the secret learns nothing about the channels.
        """
        expected = self._expected.get(role.migration)
        if expected is None:
            raise ProtocolError(
                f"No migration {role.migration} expects channels here.", code="unknown-migration"
            )
        if not role.verify(expected.secret):
            raise ProtocolError(
                f"The role header does not prove the secret of migration {role.migration}.",
                code="bad-proof",
            )
        if peer != expected.peer:
            raise ProtocolError(
                f"The channels of migration {role.migration} have to come as its control "
                f"connection did: {_how(expected.peer)}. This one came {_how(peer)}.",
                code="not-secured",
            )
        channel = (role.channel, role.index)
        if channel not in expected.channels:
            raise ProtocolError(
                f"Migration {role.migration} has no channel {role.channel} {role.index}.",
                code="unknown-channel",
            )
        if channel in expected.taken:
            raise ProtocolError(
                f"Channel {role.channel} {role.index} of migration {role.migration} is taken.",
                code="channel-taken",
            )
        expected.taken.add(channel)
        return Claim(self, role.migration, expected, channel)

    def _is_expected(self, migration: uuid.UUID, expected: _Expected) -> bool:
        return self._expected.get(migration) is expected


def _how(peer: PeerNames | None) -> str:
    return f"in TLS, with the certificate of {peer}" if peer is not None else "without TLS"


class Claim:
    """A channel that one connection has taken.

    It ends in :meth:`deliver`, in :meth:`hand_over` or in :meth:`give_up`.
    """

    def __init__(
        self,
        attachments: Attachments,
        migration: uuid.UUID,
        expected: _Expected,
        channel: tuple[str, int],
    ) -> None:
        self._attachments = attachments
        self._migration = migration
        self._expected = expected
        self._channel = channel

    def hand_over(
        self, transport: Any, attached: bytes, session: TlsSession | None = None
    ) -> Deferred[None]:
        """Say ATTACHED on a connection, and deliver it.

        The connection's protocol gets its ``connectionLost`` on the way.

        :param transport: of the connection.
        :param attached: what is still to be sent on it, ATTACHED at its end.
        :param session: the TLS on the connection.
        :return: fails with :class:`~qmigd.errors.PeerGone` if the connection is lost
            before it has taken all that; the channel can be claimed again then.
        """
        # The peer may send payload the moment it reads ATTACHED.
        limit_reads(transport, 0)
        transport.write(attached)
        done = drained(transport)
        done.addCallbacks(lambda _: self.deliver(Line(detach(transport), session)), self._lost)
        return done

    def deliver(self, line: Line) -> None:
        """Give the connection to the migration, or close it if that was forgotten meanwhile."""
        if self._attachments._is_expected(self._migration, self._expected):
            tune_stream(line.sock)
            self._expected.on_channel(*self._channel, line)
        else:
            line.sock.close()

    def give_up(self) -> None:
        """The connection was lost: the channel can be claimed again."""
        self._expected.taken.discard(self._channel)

    def _lost(self, failure: Failure) -> Failure:
        self.give_up()
        return failure
