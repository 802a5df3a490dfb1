"""How payload channels are opened, claimed and refused."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase, TestCase

from qmigd.channels.attach import Attachments, Claim, Line, open_channel
from qmigd.channels.secured import Secured
from qmigd.errors import DeadlineError, MigrationError, PeerGone, ProtocolError, RemoteError
from qmigd.handshake.channel import ChannelHandshake
from qmigd.handshake.destination import DestinationHandshake
from qmigd.handshake.events import ChannelOpened
from qmigd.transports.sockets import limit_reads
from qmigd.wire.greeting import Greeting
from qmigd.wire.messages import Attached
from qmigd.wire.role import SECRET_SIZE, RoleHeader

ID = uuid.UUID(int=7)
SECRET = b"s" * SECRET_SIZE


def unwanted(name: str, index: int, line: Line) -> None:
    """A channel that should not have been given."""
    raise AssertionError(name)


class DestinationPort(Protocol):
    """The destination's port, as far as payload channels go."""

    transport: Any

    def __init__(self, attachments: Attachments) -> None:
        self.attachments = attachments
        self.machine = DestinationHandshake([])

    def connectionMade(self) -> None:
        self.transport.write(self.machine.data_to_send())
        limit_reads(self.transport, self.machine.wanted)

    def dataReceived(self, data: bytes) -> None:
        claim: Claim | None = None
        for event in self.machine.receive(data):
            if isinstance(event, ChannelOpened):
                try:
                    claim = self.attachments.claim(event.role)
                except ProtocolError as error:
                    self.machine.error(error.code, error.text)
                else:
                    self.machine.attached()
        if claim is not None:
            claim.hand_over(self.transport, self.machine.data_to_send())
            return
        self.transport.write(self.machine.data_to_send())
        if self.machine.closed:
            self.transport.loseConnection()
        else:
            limit_reads(self.transport, self.machine.wanted)


class DestinationFactory(Factory):
    """Makes them."""

    noisy = False

    def __init__(self, attachments: Attachments) -> None:
        self.attachments = attachments

    def buildProtocol(self, addr: IAddress | None) -> DestinationPort:
        return DestinationPort(self.attachments)


class ClaimTests(SynchronousTestCase):
    """:meth:`Attachments.claim`."""

    def setUp(self) -> None:
        """One migration with three channels."""
        self.attachments = Attachments()
        self.delivered: list[tuple[str, int, socket.socket]] = []
        self.attachments.expect(
            ID,
            SECRET,
            [("main", 0), ("multifd", 0), ("multifd", 1)],
            lambda *channel: self.delivered.append(channel),
        )

    def claim(self, channel: str, index: int, migration: uuid.UUID = ID) -> Claim:
        """Ask with the right proof."""
        return self.attachments.claim(RoleHeader(migration, channel, index).prove(SECRET))

    def test_delivered(self) -> None:
        """A claimed channel's socket goes to its migration, by name and index."""
        left, right = socket.socketpair()
        self.addCleanup(left.close)
        self.addCleanup(right.close)
        self.claim("multifd", 1).deliver(Line(left))
        self.assertEqual(self.delivered, [("multifd", 1, Line(left))])

    def assert_refused(self, role: RoleHeader, code: str) -> None:
        """It is refused with this code, and takes nothing from anybody."""
        error = self.assertRaises(ProtocolError, self.attachments.claim, role)
        self.assertEqual(error.code, code)
        self.assertTrue(error.text.endswith("."))

    def test_refused(self) -> None:
        """Who is not expected gets nothing, with the code of the reason."""
        self.assert_refused(
            RoleHeader(uuid.UUID(int=8), "main", 0).prove(SECRET), "unknown-migration"
        )
        self.assert_refused(RoleHeader(ID, "main", 1).prove(SECRET), "unknown-channel")
        self.assert_refused(RoleHeader(ID, "preempt", 0).prove(SECRET), "unknown-channel")
        self.assert_refused(RoleHeader(ID, "main", 0).prove(b"x" * SECRET_SIZE), "bad-proof")
        # Without the secret nothing can be learned of the channels.
        self.assert_refused(RoleHeader(ID, "preempt", 0).prove(b""), "bad-proof")
        # And the channel is still there for who has it.
        self.claim("main", 0)

    def test_proof_of_another_channel(self) -> None:
        """A proof is good for the channel that it was made for, and no other."""
        proof = RoleHeader(ID, "multifd", 0).prove(SECRET).proof
        self.assert_refused(RoleHeader(ID, "multifd", 1, proof), "bad-proof")

    def test_taken(self) -> None:
        """A channel is given once, unless its connection was lost before it was."""
        claim = self.claim("main", 0)
        self.assert_refused(RoleHeader(ID, "main", 0).prove(SECRET), "channel-taken")
        claim.give_up()
        self.claim("main", 0)

    def test_same_migration_twice(self) -> None:
        """An id that is in use cannot be used again, until it is forgotten."""
        self.assertRaises(
            MigrationError, self.attachments.expect, ID, SECRET, [("main", 0)], unwanted
        )
        self.attachments.forget(ID)
        self.attachments.forget(ID)
        self.attachments.expect(ID, SECRET, [("main", 0)], unwanted)

    def test_forgotten(self) -> None:
        """A forgotten migration gets no channel, not even one that was claimed before."""
        claim = self.claim("main", 0)
        self.attachments.forget(ID)
        left, right = socket.socketpair()
        self.addCleanup(right.close)
        claim.deliver(Line(left))
        self.assertEqual(self.delivered, [])
        self.assertEqual(right.recv(1), b"")
        self.assert_refused(RoleHeader(ID, "main", 0).prove(SECRET), "unknown-migration")

    def test_lost_before_delivery(self) -> None:
        """A connection lost before it has ATTACHED gives its channel back."""
        claim = self.claim("main", 0)
        transport = StringTransport()
        transport.disconnected = True
        # A transport that is lost already stops its producer at once.
        self.patch(
            transport, "registerProducer", lambda producer, streaming: producer.stopProducing()
        )
        self.failureResultOf(claim.hand_over(transport, b"ATTACHED"), PeerGone)
        self.claim("main", 0)


class OpenTests(TestCase):
    """:func:`open_channel`, against a port of the test's own."""

    def setUp(self) -> None:
        """Nobody is expected yet."""
        self.attachments = Attachments()

    async def listen(self, factory: Factory) -> TCP4ClientEndpoint:
        """Serve, and return what connects."""
        tcp: Any = reactor
        port = tcp.listenTCP(0, factory, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        address = port.getHost()
        assert isinstance(address, IPv4Address)
        return TCP4ClientEndpoint(reactor, address.host, address.port)

    def machine(self, channel: str = "main", secret: bytes = SECRET) -> Secured:
        """A channel's handshake."""
        return Secured(ChannelHandshake(RoleHeader(ID, channel, 0), secret), None)

    async def say(self, data: bytes, close: bool = False) -> TCP4ClientEndpoint:
        """A port that says the same to everybody, without looking."""
        self.closed: Deferred[None] = Deferred()
        closed = self.closed

        class Says(Protocol):
            transport: Any

            def connectionMade(self) -> None:
                self.transport.write(data)
                if close:
                    self.transport.loseConnection()

            def connectionLost(self, reason: Failure | None = None) -> None:
                closed.callback(None)

        return await self.listen(Factory.forProtocol(Says))

    async def open(self, endpoint: TCP4ClientEndpoint, **options: Any) -> socket.socket:
        """Open a channel; it is closed at the end."""
        sock = (await open_channel(Clock(), endpoint, self.machine(**options), 10)).sock
        self.addCleanup(sock.close)
        return sock

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the reactor run until it holds."""
        calls: Any = reactor
        while not condition():
            turn: Deferred[None] = Deferred()
            calls.callLater(0, turn.callback, None)
            await turn

    async def test_both_sides(self) -> None:
        """Both sides get a socket, with every byte of the payload still in it."""
        delivered: Deferred[socket.socket] = Deferred()
        self.attachments.expect(
            ID, SECRET, [("main", 0)], lambda name, index, line: delivered.callback(line.sock)
        )
        endpoint = await self.listen(DestinationFactory(self.attachments))
        near = await self.open(endpoint)
        far = await delivered
        self.addCleanup(far.close)
        for writer, reader in ((near, far), (far, near)):
            self.assertTrue(reader.getblocking())
            writer.sendall(b"payload")
            self.assertEqual(await deferToThread(reader.recv, 100), b"payload")
            self.assertTrue(writer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            self.assertTrue(writer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    async def test_payload_behind_attached(self) -> None:
        """Payload in the same segment as ATTACHED is all the new owner's."""
        greeting = Greeting((1,), ("some", "features")).encode()
        with socket.create_server(("127.0.0.1", 0)) as server:
            endpoint = TCP4ClientEndpoint(reactor, *server.getsockname())
            opening = open_channel(Clock(), endpoint, self.machine(), 10)

            def serve() -> bytes:
                peer, _ = server.accept()
                with peer:
                    peer.sendall(greeting)
                    header = peer.recv(1000)
                    peer.sendall(Attached().encode() + b"payload")
                    return header

            header = await deferToThread(serve)
        sock = (await opening).sock
        self.addCleanup(sock.close)
        self.assertEqual(header, RoleHeader(ID, "main", 0).prove(SECRET).encode())
        self.assertEqual(await deferToThread(sock.recv, 100), b"payload")
        self.assertEqual(await deferToThread(sock.recv, 100), b"")

    async def test_refused(self) -> None:
        """The destination's reason arrives, as the peer's."""
        self.attachments.expect(ID, SECRET, [("main", 0)], unwanted)
        endpoint = await self.listen(DestinationFactory(self.attachments))
        for options, code in (
            ({"secret": b"x" * SECRET_SIZE}, "bad-proof"),
            ({"channel": "preempt"}, "unknown-channel"),
        ):
            with self.assertRaises(RemoteError) as caught:
                await self.open(endpoint, **options)
            self.assertEqual(caught.exception.code, code)

    async def test_not_a_qmigd(self) -> None:
        """What is no greeting is the peer's mistake, found here, and ends the connection."""
        endpoint = await self.say(b"SSH-2.0-OpenSSH_9.2p1\r\n")
        with self.assertRaises(ProtocolError) as caught:
            await self.open(endpoint)
        self.assertEqual(caught.exception.code, "bad-magic")
        await self.closed

    async def test_closed(self) -> None:
        """A peer that closes in the middle is gone."""
        endpoint = await self.say(Greeting((1,), ()).encode()[:-1], close=True)
        with self.assertRaises(PeerGone):
            await self.open(endpoint)

    async def test_unreachable(self) -> None:
        """Where nobody listens the peer is gone, with the system's reason."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            endpoint = TCP4ClientEndpoint(reactor, *server.getsockname())
        with self.assertRaises(PeerGone) as caught:
            await self.open(endpoint)
        self.assertIn("nobody listens there", caught.exception.text)

    async def test_too_late(self) -> None:
        """A peer that is silent gets no longer than the deadline, and is closed."""
        clock = Clock()
        endpoint = await self.say(Greeting((1,), ()).encode())
        machine = self.machine()
        opening = open_channel(clock, endpoint, machine, 10)
        await self.until(lambda: machine.machine.state == "asking")
        clock.advance(9.9)
        self.assertNoResult(opening)
        clock.advance(0.1)
        with self.assertRaises(DeadlineError) as caught:
            await opening
        self.assertIn("within 10 seconds", caught.exception.text)
        await self.closed

    async def test_cancelled(self) -> None:
        """Who is no longer interested closes the connection by cancelling."""
        clock = Clock()
        endpoint = await self.say(b"QEMU")
        machine = self.machine()
        opening = open_channel(clock, endpoint, machine, 10)
        await self.until(lambda: machine.wanted < 12)
        opening.cancel()
        with self.assertRaises(CancelledError):
            await opening
        await self.closed
        self.assertEqual(clock.getDelayedCalls(), [])
