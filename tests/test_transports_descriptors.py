"""What a management app hands over: what it has to be, who asked for it, and what becomes of it."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import CancelledError
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import ArgumentError, MigrationError, NoChannel
from qmigd.transports.adopting import adopt
from qmigd.transports.descriptors import ChannelRequests, DescriptorAddress, FdAddress
from qmigd.transports.handed_over import checked, is_local
from qmigd.transports.sockets import tcp_pair

from . import test_transports_sockets

_ID = "9d5b0d3c-6e4e-4a8b-9d8e-0c6f5a1f7b11"


def ipv6_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        return socket.create_connection(server.getsockname()[:2]), server.accept()[0]


class CheckTests(SynchronousTestCase):
    """:func:`checked`."""

    def refused(self, descriptor: int) -> str:
        """Return what a descriptor is said to be; it has to be open still."""
        error = self.assertRaises(ArgumentError, checked, descriptor)
        os.fstat(descriptor)
        self.assertIn("needs a stream socket", error.text)
        return error.text.partition("and this is ")[2]

    def keep(self, *socks: socket.socket) -> socket.socket:
        for sock in socks:
            self.addCleanup(sock.close)
        return socks[0]

    def test_good(self) -> None:
        """A connected stream socket of any family comes back as it is."""
        for make in (socket.socketpair, tcp_pair, ipv6_pair):
            near, far = make()
            self.keep(far).sendall(b"waits")
            sock = self.keep(checked(near.detach()))
            self.assertEqual(far.family, sock.family)
            self.assertEqual(b"waits", sock.recv(100))
            sock.sendall(b"and back")
            self.assertEqual(b"and back", far.recv(100))

    def test_no_socket(self) -> None:
        """What is no socket is named."""
        read, write = os.pipe()
        path = self.mktemp()
        with tempfile.TemporaryFile() as file, open("/dev/null", "r+b") as null:
            kinds = {
                file.fileno(): "a file",
                null.fileno(): "a character device",
                read: "a pipe",
                write: "a pipe",
                os.open("/", os.O_RDONLY): "a directory",
                os.memfd_create("x"): "a file",
                os.eventfd(0): "no socket (anon_inode:[eventfd])",
            }
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(os.path.relpath(path))
                kinds[os.open(path, os.O_PATH)] = f"no socket ({os.path.realpath(path)})"
            for descriptor, kind in kinds.items():
                self.assertEqual(f"{kind}.", self.refused(descriptor))
            for descriptor in set(kinds) - {file.fileno(), null.fileno()}:
                os.close(descriptor)

    def test_wrong_socket(self) -> None:
        """So is a socket of another kind, or one that is not connected."""
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.assertEqual("a listening socket.", self.refused(listening.fileno()))
        for family in (socket.AF_INET, socket.AF_UNIX):
            with socket.socket(family) as sock:
                self.assertEqual("a socket that is not connected.", self.refused(sock.fileno()))
        for kind, said in (
            (socket.SOCK_DGRAM, "a datagram socket."),
            (socket.SOCK_SEQPACKET, "a packet socket."),
        ):
            near = self.keep(*socket.socketpair(socket.AF_UNIX, kind))
            self.assertEqual(said, self.refused(near.fileno()))

    def test_one_direction(self) -> None:
        """A socket that is closed in one direction is of no use either."""
        for make in (socket.socketpair, tcp_pair):
            for end, how, said in (
                (0, socket.SHUT_WR, "nothing can be sent any more"),
                (0, socket.SHUT_RD, "nothing can come any more"),
                (1, socket.SHUT_WR, "nothing can come any more"),
            ):
                ends = make()
                near = self.keep(*ends)
                ends[end].shutdown(how)
                self.assertIn(said, self.refused(near.fileno()))
            near, far = make()
            far.close()
            self.assertIn("the other end has closed it", self.refused(self.keep(near).fileno()))

    def test_local(self) -> None:
        """Loopback and unix sockets stay within the host."""
        for make in (socket.socketpair, tcp_pair, ipv6_pair):
            self.assertTrue(is_local(self.keep(*make())))


class RequestTests(SynchronousTestCase):
    """:class:`ChannelRequests`, as a source's address uses it."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.events: list[tuple[str, Mapping[str, Any]]] = []
        self.requests = ChannelRequests(
            self.clock, lambda name, data: self.events.append((name, data))
        )
        self.address = FdAddress().bind(self.requests, _ID, "vm", 5.0)

    def pair(self) -> tuple[socket.socket, socket.socket]:
        ends = socket.socketpair()
        for end in ends:
            self.addCleanup(end.close)
        return ends

    def is_closed(self, far: socket.socket) -> bool:
        return far.recv(1) == b""

    def test_asked_and_answered(self) -> None:
        """A request says what is wanted, and ends with what the app hands over."""
        asked = self.address.to("multifd", 3).ask()
        data = {"id": _ID, "guest": "vm", "role": "source", "channel": "multifd", "index": 3}
        self.assertEqual([("CHANNEL_REQUEST", {**data, "timeout": 5.0})], self.events)
        self.assertNoResult(asked)
        near, _ = self.pair()
        self.assertTrue(self.requests.answer(_ID, "multifd", 3, near))
        self.assertIs(near, self.successResultOf(asked))
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_asked_again(self) -> None:
        """The same channel can be asked for any number of times, one after the other."""
        for _ in range(3):
            asked = self.address.ask()
            self.failureResultOf(self.address.ask(), NoChannel)
            near, _far = self.pair()
            self.requests.answer(_ID, "control", 0, near)
            self.assertIs(near, self.successResultOf(asked))

    def test_deadline(self) -> None:
        """Nobody waits for longer than was said, and what comes later is refused."""
        asked = self.address.ask()
        self.clock.advance(4.9)
        self.assertNoResult(asked)
        self.clock.advance(0.1)
        error = self.failureResultOf(asked, NoChannel).value
        self.assertIn("for channel control 0 within 5 seconds", str(error))
        near, far = self.pair()
        self.assertRaises(MigrationError, self.requests.answer, _ID, "control", 0, near)
        near.close()
        self.assertTrue(self.is_closed(far))

    def test_taken_back(self) -> None:
        """A request that is cancelled, or whose migration ends, cannot be answered any more."""
        cancelled, withdrawn = self.address.ask(), self.address.to("main", 0).ask()
        cancelled.cancel()
        self.failureResultOf(cancelled, CancelledError)
        other = FdAddress().bind(self.requests, "other", "vm", 5.0).ask()
        self.requests.withdraw(_ID, MigrationError("that is it"))
        self.assertEqual("that is it", str(self.failureResultOf(withdrawn).value))
        for channel in ("control", "main"):
            near, _ = self.pair()
            self.assertRaises(MigrationError, self.requests.answer, _ID, channel, 0, near)
        self.assertNoResult(other)
        other.cancel()
        self.failureResultOf(other, CancelledError)

    def test_plan(self) -> None:
        """What is going to be asked for is told, and can be handed over before; once."""
        planned = [("main", 0), ("multifd", 0)]
        self.address.foresee(planned)
        error = self.assertRaises(
            MigrationError, self.requests.answer, _ID, "main", 0, self.pair()[0]
        )
        self.assertIn("no migration", error.text)
        self.address.plan(planned)
        channels = [{"name": "main", "index": 0}, {"name": "multifd", "index": 0}]
        data = {"id": _ID, "guest": "vm", "role": "source", "channels": channels}
        told = [("CHANNEL_PLAN", {**data, "settled": settled}) for settled in (False, True)]
        self.assertEqual(told, self.events)
        near, _ = self.pair()
        self.requests.answer(_ID, "main", 0, near)
        other, _ = self.pair()
        self.assertRaises(MigrationError, self.requests.answer, _ID, "main", 0, other)
        error = self.assertRaises(MigrationError, self.requests.answer, _ID, "multifd", 1, other)
        self.assertIn("it is to have main 0, multifd 0", error.text)
        self.assertIs(near, self.successResultOf(self.address.to("main", 0).ask()))
        self.assertEqual(2, len(self.events))
        asked = self.address.to("multifd", 0).ask()
        self.requests.answer(_ID, "multifd", 0, other)
        self.assertIs(other, self.successResultOf(asked))
        for channel in ("main", "multifd"):
            error = self.assertRaises(MigrationError, self.requests.answer, _ID, channel, 0, near)
            self.assertIn("was handed over already", error.text)
        self.address.plan(())
        error = self.assertRaises(MigrationError, self.requests.answer, _ID, "main", 0, near)
        self.assertIn("none but the control connection", error.text)

    def test_unclaimed(self) -> None:
        """What was handed over and never used is closed with the migration."""
        self.address.plan([("main", 0)])
        near, far = self.pair()
        self.requests.answer(_ID, "main", 0, near)
        self.requests.forget(_ID)
        self.requests.forget(_ID)
        self.assertTrue(self.is_closed(far))

    def test_destination(self) -> None:
        """A destination asks for all at once, and has no deadline of its own."""
        self.requests.plan(_ID, "vm", "destination", [("main", 0), ("preempt", 0)])
        self.assertEqual(
            [("CHANNEL_PLAN", None), ("CHANNEL_REQUEST", "main"), ("CHANNEL_REQUEST", "preempt")],
            [(name, data.get("channel")) for name, data in self.events],
        )
        self.assertNotIn("timeout", self.events[1][1])
        near, _ = self.pair()
        self.assertFalse(self.requests.answer(_ID, "preempt", 0, near))
        self.assertRaises(MigrationError, self.requests.answer, _ID, "preempt", 1, near)
        self.assertEqual([], self.clock.getDelayedCalls())

    def test_nobodys(self) -> None:
        """An address that belongs to no migration connects to nothing, and none is listened on."""
        self.assertRaises(ArgumentError, FdAddress().client(self.clock).connect, Factory())
        self.assertRaises(ArgumentError, FdAddress().server, self.clock)


class AdoptedTests(test_transports_sockets.ReactorTests):
    """A socket that is taken in can be read, written and let go of as any other."""

    def adopt(self, reactor: Any, sock: socket.socket, protocol: Protocol) -> None:
        adopt(reactor, sock, Factory.forProtocol(lambda: protocol), DescriptorAddress())


# A case for each reactor that this host has the libraries for.
globals().update(
    {
        name: case
        for name, case in AdoptedTests.makeTestCaseClasses().items()
        if not hasattr(case, "skip")
    }
)
