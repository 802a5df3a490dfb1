"""Reading exactly, letting go and tuning, on real sockets in every reactor there is."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from twisted.internet.protocol import Factory, Protocol
from twisted.internet.test.reactormixins import ReactorBuilder
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import LocalError, PeerGone
from qmigd.transports.sockets import detach, drained, limit_reads, set_send_buffer, tune_stream


def pair(family: int) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, the second one as a server accepts it."""
    if family == socket.AF_UNIX:
        return socket.socketpair(family)
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        return client, server.accept()[0]


class Reader(Protocol):
    """Reads pieces of the sizes wanted, then lets go of the socket."""

    def __init__(self, sizes: list[int], done: Any) -> None:
        self.sizes = sizes
        self.done = done
        self.pieces: list[bytes] = []
        self.lost = 0

    def connectionMade(self) -> None:
        limit_reads(self.transport, self.sizes[0])

    def dataReceived(self, data: bytes) -> None:
        self.pieces.append(data)
        self.sizes[0] -= len(data)
        if not self.sizes[0]:
            del self.sizes[0]
        if self.sizes:
            limit_reads(self.transport, self.sizes[0])
        else:
            self.done(detach(self.transport))

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.lost += 1


if TYPE_CHECKING:

    class _Builder(ReactorBuilder, SynchronousTestCase):
        """What the builder makes of its subclasses."""
else:
    _Builder = ReactorBuilder


class ReactorTests(_Builder):
    """What has to hold in every reactor: epoll, poll, select, asyncio."""

    def adopt(self, reactor: Any, sock: socket.socket, protocol: Protocol) -> None:
        """Give the reactor a connection."""
        sock.setblocking(False)
        reactor.adoptStreamConnection(
            sock.fileno(), sock.family, Factory.forProtocol(lambda: protocol)
        )
        sock.close()

    def read_exactly(self, family: int) -> None:
        reactor = self.buildReactor()
        theirs, ours = pair(family)
        self.addCleanup(theirs.close)
        taken: list[socket.socket] = []

        def done(sock: socket.socket) -> None:
            taken.append(sock)
            reactor.stop()

        reader = Reader([12, 1, 300], done)
        # Header and payload in one segment.
        theirs.sendall(bytes(313) + b"payload")
        self.adopt(reactor, ours, reader)
        self.runReactor(reactor)

        sock = taken[0]
        self.addCleanup(sock.close)
        self.assertEqual([len(piece) for piece in reader.pieces], [12, 1, 300])
        self.assertEqual(reader.lost, 1)
        self.assertTrue(sock.getblocking())
        self.assertEqual(sock.recv(100), b"payload")
        # Neither side was shut on the way.
        theirs.sendall(b"more")
        self.assertEqual(sock.recv(100), b"more")
        sock.sendall(b"back")
        self.assertEqual(theirs.recv(100), b"back")
        self.assertFalse([each for each in reactor.getReaders() if isinstance(each, Reader)])

    def test_exactly_tcp(self) -> None:
        """Not a byte more than wanted leaves a TCP connection; the rest is the new owner's."""
        self.read_exactly(socket.AF_INET)

    def test_exactly_unix(self) -> None:
        """Not a byte more than wanted leaves a unix connection either."""
        self.read_exactly(socket.AF_UNIX)

    def test_reads_nothing(self) -> None:
        """Where 0 bytes are wanted, what comes stays in the kernel."""
        reactor = self.buildReactor()
        theirs, ours = pair(socket.AF_INET)
        self.addCleanup(theirs.close)
        taken: list[socket.socket] = []

        class Idle(Protocol):
            def connectionMade(self) -> None:
                limit_reads(self.transport, 0)
                # Later than the reactor would have read.
                reactor.callLater(0, reactor.callLater, 0, self.let_go)

            def dataReceived(self, data: bytes) -> None:
                raise AssertionError("read")

            def let_go(self) -> None:
                taken.append(detach(self.transport))
                reactor.stop()

        theirs.sendall(b"payload")
        self.adopt(reactor, ours, Idle())
        self.runReactor(reactor)
        self.addCleanup(taken[0].close)
        self.assertEqual(taken[0].recv(100), b"payload")

    def test_drained(self) -> None:
        """All that was written is in the kernel once it is drained, and can be detached."""
        reactor = self.buildReactor()
        theirs, ours = pair(socket.AF_UNIX)
        taken: list[socket.socket] = []
        got = bytearray()
        size = 1 << 20

        class Writer(Protocol):
            def connectionMade(self) -> None:
                assert self.transport is not None
                self.transport.write(bytes(size))
                drained(self.transport).addCallback(self.let_go)

            def let_go(self, result: None) -> None:
                taken.append(detach(self.transport))
                taken[0].sendall(b"payload")
                taken[0].close()

        class Collector(Protocol):
            def dataReceived(self, data: bytes) -> None:
                got.extend(data)

            def connectionLost(self, reason: Failure | None = None) -> None:
                reactor.stop()

        self.adopt(reactor, ours, Writer())
        self.adopt(reactor, theirs, Collector())
        self.runReactor(reactor)
        self.assertEqual(len(got), size + len(b"payload"))
        self.assertTrue(got.endswith(b"\0payload"))

    def test_drained_at_once(self) -> None:
        """A connection that nothing was written to is drained."""
        reactor = self.buildReactor()
        theirs, ours = pair(socket.AF_UNIX)
        self.addCleanup(theirs.close)

        class Writer(Protocol):
            def connectionMade(self) -> None:
                drained(self.transport).addCallback(lambda _: reactor.stop())

        self.adopt(reactor, ours, Writer())
        self.runReactor(reactor)

    def test_lost_before_drained(self) -> None:
        """A connection that is lost with something left to write says so."""
        reactor = self.buildReactor()
        theirs, ours = pair(socket.AF_UNIX)
        failures: list[Failure] = []

        class Writer(Protocol):
            def connectionMade(self) -> None:
                assert self.transport is not None
                self.transport.write(bytes(1 << 20))
                waiting = drained(self.transport)
                waiting.addErrback(failures.append)
                waiting.addCallback(lambda _: reactor.stop())
                theirs.close()

        self.adopt(reactor, ours, Writer())
        self.runReactor(reactor)
        self.assertIsInstance(failures[0].value, PeerGone)


# A case for each reactor that this host has the libraries for.
globals().update(
    {
        name: case
        for name, case in ReactorTests.makeTestCaseClasses().items()
        if not hasattr(case, "skip")
    }
)


class SocketTests(SynchronousTestCase):
    """What is asked of a socket by itself."""

    def test_tls_stays(self) -> None:
        """A connection in TLS is not taken apart."""

        class Transport:
            TLS = True

        self.assertRaises(LocalError, detach, Transport())

    def test_send_buffer(self) -> None:
        """The room asked for is there, within what the kernel allows."""
        left, right = pair(socket.AF_UNIX)
        self.addCleanup(left.close)
        self.addCleanup(right.close)
        before = left.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self.assertGreaterEqual(set_send_buffer(left, 64 << 10), 64 << 10)
        self.assertGreaterEqual(set_send_buffer(left, 4 << 20), before)

    def test_tune(self) -> None:
        """A TCP connection sends at once and is kept alive; a unix one needs nothing."""
        left, right = pair(socket.AF_INET)
        self.addCleanup(left.close)
        self.addCleanup(right.close)
        tune_stream(left)
        self.assertTrue(left.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        self.assertTrue(left.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        for sock in pair(socket.AF_UNIX):
            tune_stream(sock)
            sock.close()
