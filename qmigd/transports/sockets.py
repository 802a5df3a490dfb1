"""What qmigd asks of a socket that Twisted does not: reading exactly, letting go, tuning.

A connection begins in the reactor's hands, with a handshake, and then belongs to
somebody else: to QEMU, or to a relay's threads.  For that not a byte too many may be
read (:func:`limit_reads`), nothing may be left to write (:func:`drained`), and the
socket has to leave the reactor whole (:func:`detach`).
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IPullProducer
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

from qmigd.errors import LocalError, PeerGone

from .mptcp import IPPROTO_MPTCP
from .uri import network_of

__all__ = [
    "caller",
    "detach",
    "drained",
    "limit_reads",
    "quietly",
    "set_send_buffer",
    "tcp_pair",
    "tune_stream",
]

#: SO_SNDBUFFORCE of Linux, which the socket module does not name: SO_SNDBUF without
#: net.core.wmem_max as its limit, for who has CAP_NET_ADMIN.
_SO_SNDBUFFORCE: Final = 32

#: struct ucred (unix(7)): process, user, group.
_UCRED: Final = struct.Struct("3i")

# Keepalive for a connection on which nothing moves: a dead host is noticed after
# IDLE + COUNT * INTERVAL seconds, 90.  What is quicker than that is the control
# connection's business, which can tell an outage from an end.
_KEEPALIVE_IDLE: Final = 30
_KEEPALIVE_INTERVAL: Final = 10
_KEEPALIVE_COUNT: Final = 6


def quietly(make: Callable[[], Protocol]) -> Factory:
    """Return a factory of protocols whose coming and going is not worth a line in the log."""
    factory: Factory = Factory.forProtocol(make)
    factory.noisy = False
    return factory


def caller(transport: Any) -> str:
    """Return who has connected, for people: an address, or on a unix socket a process.

    :param transport: of a connection that was accepted.
    """
    at = network_of(transport.getPeer())
    if at is not None:
        return str(at)
    sock = transport.getHandle()
    try:
        pid, uid, _ = _UCRED.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        return f"unix:{sock.getsockname()} (process {pid} of user {uid})"
    except OSError:  # it has gone
        return "unix:"


def limit_reads(transport: Any, wanted: int) -> None:
    """Have a connection read ``wanted`` bytes at the most, or nothing until told again.

    To be called in ``connectionMade`` and at the end of each ``dataReceived``: what the
    transport does not read stays in the kernel, for whoever gets the socket.

    :param transport: of a TCP or unix connection.
    :param wanted: in bytes; 0: stop reading.
    """
    if wanted:
        # Twisted's tcp and unix transports read bufferSize bytes once for each event.
        transport.bufferSize = wanted
        transport.resumeProducing()
    else:
        transport.pauseProducing()


def detach(transport: Any) -> socket.socket:
    """Take the socket of a connection out of the reactor.

    The protocol gets its ``connectionLost``.  What was written and has not been sent
    is lost: wait for :func:`drained` first.

    :param transport: of a TCP or unix connection, not of one in TLS.
    :return: the socket, blocking.
    :raises LocalError: the transport is in TLS, so that its socket alone is of no use.
    """
    if getattr(transport, "TLS", False):
        raise LocalError("A connection in TLS cannot be handed over as a socket.")
    transport.stopReading()
    transport.stopWriting()
    sock = socket.socket(fileno=transport.getHandle().detach())
    transport.connectionLost(Failure(ConnectionDone("The socket was handed over.")))
    sock.setblocking(True)
    return sock


def drained(transport: Any) -> Deferred[None]:
    """Wait until the kernel has everything that was written.

    Fails with :class:`~qmigd.errors.PeerGone` if the connection is lost before that.
    """
    draining = _Draining(transport)
    transport.registerProducer(draining, False)
    return draining.done


@implementer(IPullProducer)
class _Draining:
    """Is asked for more once everything before it has gone."""

    def __init__(self, transport: Any) -> None:
        self.done: Deferred[None] = Deferred()
        self._transport = transport
        self._asked = False

    def resumeProducing(self) -> None:
        if not self._asked:
            # At registration, whatever there is to write; the next time it has gone.
            self._asked = True
            self._transport.startWriting()
            return
        self._transport.unregisterProducer()
        self.done.callback(None)

    def stopProducing(self) -> None:
        self.done.errback(PeerGone("The connection was lost while it was written to."))


def set_send_buffer(sock: socket.socket, size: int) -> int:
    """Ask for room for ``size`` bytes on their way out of a socket.

    :return: what the kernel gives, in bytes, by its own way of counting; without
        CAP_NET_ADMIN that is limited by net.core.wmem_max.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def tune_stream(sock: socket.socket) -> None:
    """Make a TCP connection send at once, and notice a dead host; others stay as they are.

    Its buffers are left to the kernel, which sizes them better than a constant.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    # Multipath TCP has got its options one by one: Linux 6.1 knows no times for keepalive.
    optional = (OSError,) if sock.proto == IPPROTO_MPTCP else ()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE),
        (socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL),
        (socket.TCP_KEEPCNT, _KEEPALIVE_COUNT),
    ):
        with contextlib.suppress(*optional):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a TCP connection over loopback, blocking and tuned as a relay's.

    :raises OSError: there is no loopback interface, or no descriptor left.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
    for end in (client, accepted):
        tune_stream(end)
    return client, accepted
