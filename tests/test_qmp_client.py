"""The QMP client: what it says, what it waits for, and for how long."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IFileDescriptorReceiver, IReactorUNIX
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock, deferLater
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface import implementer

from qmigd.errors import ArgumentError, DeadlineError, GuestBusy, GuestError, GuestGone
from qmigd.qmp.client import COMMAND_DEADLINE, QMPClient, QMPDeadline, QMPRefusal
from qmigd.qmp.codec import Decoder
from qmigd.qmp.connecting import QUEUE_POLL, connect
from qmigd.waiting import together

#: How a qmigd greets.
GREETING: dict[str, Any] = {"QMP": {"version": {"qemu": {"major": 9}}, "capabilities": []}}
#: How a QEMU greets.
QEMU_GREETING: dict[str, Any] = {
    "QMP": {"version": {"qemu": {"major": 9}}, "capabilities": ["oob", "other"]}
}


class Gone(Exception):
    """Why a transport says that a connection was lost."""


class ClientTests(SynchronousTestCase):
    """A client over a transport in memory, with a clock in the test's hands."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.transport = StringTransport()
        self.client = QMPClient(self.clock, "unix:/qmp")
        self.client.makeConnection(self.transport)
        self.ready = Deferred.fromCoroutine(self.client.handshake(3.0))

    def say(self, *messages: Any) -> None:
        """Have QEMU send messages."""
        for message in messages:
            self.client.dataReceived(json.dumps(message).encode() + b"\r\n")

    def heard(self) -> list[Any]:
        """Return what QEMU was sent since the last time."""
        lines = self.transport.value().splitlines()
        self.transport.clear()
        return [json.loads(line) for line in lines]

    def settle(self) -> None:
        """Get the handshake over with."""
        self.say(GREETING)
        self.say({"return": {}, "id": self.heard()[0]["id"]})
        self.successResultOf(self.ready)

    def test_handshake(self) -> None:
        """After the greeting the client enables out-of-band commands, and nothing else."""
        self.assertEqual(self.heard(), [])
        self.say(QEMU_GREETING)
        (sent,) = self.heard()
        self.assertEqual(sent, {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
        self.successResultOf(self.ready)
        self.say({"return": {}})
        self.assertEqual(self.client.greeting, QEMU_GREETING["QMP"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_handshake_without_oob(self) -> None:
        """What is not offered is not enabled."""
        self.say({"QMP": {"version": {}, "capabilities": []}})
        self.assertNotIn("arguments", self.heard()[0])

    def test_answers_in_order(self) -> None:
        """A QEMU is told no id but out of band; an answer that came too late is nobody's."""
        self.say(QEMU_GREETING)
        first = self.client.execute_within(1.0, "first")
        second, aside = self.client.execute("second"), self.client.execute_oob("aside")
        third = self.client.execute("third")
        *others, out_of_band, last = self.heard()
        self.assertEqual([list(sent) for sent in (*others[1:], last)], [["execute"]] * 3)
        self.say({"return": {}}, {"return": "aside", "id": out_of_band["id"]})
        self.assertEqual(self.successResultOf(aside), "aside")
        self.clock.advance(1.0)
        self.failureResultOf(first, QMPDeadline)
        self.say({"return": "first"}, {"error": {"class": "GenericError", "desc": "no"}})
        self.assertEqual(self.failureResultOf(second, QMPRefusal).value.command, "second")
        self.assertNoResult(third)
        self.say({"return": "third"})
        self.assertEqual(self.successResultOf(third), "third")
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_handshake_refused(self) -> None:
        """Commands that went along fail with the reason for which there is no command mode."""
        self.say(GREETING)
        answer = self.client.execute("query-status")
        entering, _ = self.heard()
        error = {"class": "GenericError", "desc": "not today"}
        self.say({"error": error, "id": entering["id"]})
        self.assertIn("not today", str(self.failureResultOf(answer, GuestError).value))
        self.assertTrue(self.transport.disconnected)
        self.failureResultOf(self.client.execute("query-status"), GuestGone)

    def test_silence(self) -> None:
        """A socket that accepts and does not greet has another client, and is left alone."""
        self.clock.advance(2.99)
        self.assertNoResult(self.ready)
        self.clock.advance(0.01)
        error = self.failureResultOf(self.ready, GuestBusy).value
        self.assertIn("QMP socket of its own", str(error))
        self.assertTrue(self.transport.disconnected)

    def test_end_before_greeting(self) -> None:
        """A QEMU that ends before it greets is gone."""
        self.client.connectionLost()
        self.failureResultOf(self.ready, GuestGone)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_not_qmp(self) -> None:
        """Something else that answers there is told apart from a QEMU, by what it says."""
        self.client.dataReceived(b"\r\n220 mail.example ESMTP\r\nwelcome\r\n")
        error = self.failureResultOf(self.ready, GuestError).value
        self.assertIn("does not speak QMP: it begins with '220 mail.example ESMTP'", str(error))
        self.assertTrue(self.transport.disconnected)

    def test_bytes(self) -> None:
        """What is no text, and has no line's end, is shown all the same, in part."""
        self.client.dataReceived(b"\xff\x00" * 100)
        error = self.failureResultOf(self.ready, GuestError).value
        self.assertIn(r"it begins with '\xff\x00\xff", str(error))
        self.assertLess(len(str(error)), 400)

    def test_answers(self) -> None:
        """Each command has its own answer, in whatever order they come."""
        self.settle()
        one, other = self.client.execute("one"), self.client.execute_oob("other", a=[1])
        first, second = self.heard()
        self.assertEqual(first, {"execute": "one", "id": first["id"]})
        self.assertEqual(second["exec-oob"], "other")
        self.assertEqual(second["arguments"], {"a": [1]})
        self.say({"return": [2], "id": second["id"]}, {"return": {"b": 1}, "id": first["id"]})
        self.assertEqual(self.successResultOf(other), [2])
        self.assertEqual(self.successResultOf(one), {"b": 1})
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_refusal(self) -> None:
        """QEMU's words are in the error, and its class."""
        self.settle()
        done = self.client.execute("stop")
        error = {"class": "CommandNotFound", "desc": "No such thing"}
        self.say({"error": error, "id": self.heard()[0]["id"]})
        refusal = self.failureResultOf(done, QMPRefusal).value
        self.assertEqual(str(refusal), "the guest's process refused stop: No such thing")
        self.assertEqual((refusal.kind, refusal.desc), ("CommandNotFound", "No such thing"))
        self.assertIsInstance(refusal, GuestError)

    def test_deadline(self) -> None:
        """A command ends with an error when its time is over; a late answer is dropped."""
        self.settle()
        done = self.client.execute("stop")
        self.clock.advance(COMMAND_DEADLINE - 0.01)
        self.assertNoResult(done)
        self.clock.advance(0.01)
        failure = self.failureResultOf(done, DeadlineError)
        self.assertIsInstance(failure.value, GuestError)
        self.assertEqual(failure.value.code, "deadline")
        again = self.client.execute("cont")
        late, next_ = self.heard()
        self.say({"return": {"late": 1}, "id": late["id"]}, {"return": {}, "id": next_["id"]})
        self.assertEqual(self.successResultOf(again), {})

    def test_own_deadline(self) -> None:
        """A command can have more time than the others."""
        self.settle()
        done = self.client.execute_within(COMMAND_DEADLINE + 5, "migrate", uri="x")
        self.assertEqual(self.heard()[0]["arguments"], {"uri": "x"})
        self.clock.advance(COMMAND_DEADLINE + 4.9)
        self.assertNoResult(done)
        self.clock.advance(0.1)
        self.failureResultOf(done, DeadlineError)

    def test_cancelled(self) -> None:
        """Nobody waits any more, and the connection goes on."""
        self.settle()
        done = self.client.execute("stop")
        done.cancel()
        self.failureResultOf(done, CancelledError)
        self.say({"return": {}, "id": self.heard()[0]["id"]})
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_events(self) -> None:
        """Subscribers get name, data and time; one that fails does not harm the others."""
        self.settle()
        seen: list[Any] = []

        def bad(name: str, data: dict[str, Any], time: float) -> None:
            raise ZeroDivisionError

        self.client.subscribe(bad)
        end = self.client.subscribe(lambda *event: seen.append(event))
        stamp = {"seconds": 5, "microseconds": 250_000}
        self.say({"event": "STOP", "timestamp": stamp})
        self.say({"event": "MIGRATION", "data": {"status": "setup"}, "timestamp": stamp})
        end()
        self.say({"event": "RESUME", "timestamp": stamp})
        self.assertEqual(seen, [("STOP", {}, 5.25), ("MIGRATION", {"status": "setup"}, 5.25)])
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 3)

    def test_loss(self) -> None:
        """All that waits fails at once, and so does what comes after it."""
        self.settle()
        reasons: list[GuestGone] = []
        self.client.when_lost(reasons.append)
        waiting = [self.client.execute("one"), self.client.execute("two")]
        self.client.connectionLost()
        for done in (*waiting, self.client.execute("three")):
            self.failureResultOf(done, GuestGone)
        self.client.when_lost(reasons.append)
        self.assertEqual(len(reasons), 2)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_close(self) -> None:
        """Closing is a loss of one's own making, and may be repeated."""
        self.settle()
        done = self.client.execute("one")
        self.client.close()
        self.client.close()
        self.failureResultOf(done, GuestGone)
        self.assertTrue(self.transport.disconnected)
        self.client.connectionLost()

    def test_nonsense(self) -> None:
        """A QEMU that suddenly speaks in tongues is given up."""
        self.settle()
        done = self.client.execute("one")
        self.client.dataReceived(b"}}}\r\n")
        self.failureResultOf(done, GuestError)
        self.assertTrue(self.transport.disconnected)

    def test_answer_to_nothing(self) -> None:
        """A message that answers nothing is logged, and passed over."""
        self.settle()
        self.say({"error": {"class": "GenericError", "desc": "what?"}}, {"return": {}, "id": 99})
        self.assertEqual(self.flushLoggedErrors(), [])
        done = self.client.execute("one")
        self.say({"return": {}, "id": self.heard()[0]["id"]})
        self.successResultOf(done)

    def test_no_descriptors_over_tcp(self) -> None:
        """Only a unix socket carries descriptors."""
        self.settle()
        self.failureResultOf(self.client.execute_with_fd(0, "getfd", fdname="a"), ArgumentError)


@implementer(IFileDescriptorReceiver)
class Monitor(Protocol):
    """A QMP server that answers everything, and notes the descriptors that it got."""

    transport: Any

    def __init__(self, descriptors: list[int], commands: list[Any]) -> None:
        self._descriptors = descriptors
        self._commands = commands
        self._decoder = Decoder()

    def connectionMade(self) -> None:
        self.transport.write(json.dumps(GREETING).encode() + b"\n")

    def fileDescriptorReceived(self, descriptor: int) -> None:
        self._descriptors.append(descriptor)

    def dataReceived(self, data: bytes) -> None:
        for command in self._decoder.feed(data):
            assert isinstance(command, dict), command
            self._commands.append((command["execute"], len(self._descriptors)))
            answer = json.dumps({"return": {}, "id": command["id"]})
            self.transport.write(answer.encode() + b"\n")


class ConnectTests(TestCase):
    """Real sockets."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="qmp-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.path = self.directory / "qmp"

    async def failure(self, address: str, kind: type[Exception]) -> str:
        """Return the text of the error that connecting ends with."""
        try:
            await connect(reactor, address, greeting_deadline=0.05)
        except kind as error:
            return str(error)
        self.fail(f"{address} could be connected to")

    async def test_no_socket(self) -> None:
        """No file: no QEMU."""
        self.assertIn("there is no socket", await self.failure(f"unix:{self.path}", GuestGone))

    async def test_nobody_listens(self) -> None:
        """A socket file that a dead QEMU has left."""
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(os.fspath(self.path))
        text = await self.failure(f"unix:{self.path}", GuestGone)
        self.assertIn("nobody listens", text)

    async def test_silent(self) -> None:
        """The kernel accepts, and nobody greets: there is another client."""
        with socket.socket(socket.AF_UNIX) as silent:
            silent.bind(os.fspath(self.path))
            silent.listen(1)
            text = await self.failure(f"unix:{self.path}", GuestBusy)
        self.assertIn("one client at a time", text)

    async def test_too_many_clients(self) -> None:
        """Where not even the kernel has room for one more, the socket is taken as well."""
        with socket.socket(socket.AF_UNIX) as full:
            full.bind(os.fspath(self.path))
            full.listen(0)
            with socket.socket(socket.AF_UNIX) as waiting:
                waiting.connect(os.fspath(self.path))
                text = await self.failure(f"unix:{self.path}", GuestBusy)
                self.assertIn("one client at a time", text)

    async def test_room_again(self) -> None:
        """A client that waited for room is let in when there is some."""
        with socket.socket(socket.AF_UNIX) as full:
            full.bind(os.fspath(self.path))
            full.listen(0)
            with socket.socket(socket.AF_UNIX) as waiting:
                waiting.connect(os.fspath(self.path))
                connecting = connect(reactor, f"unix:{self.path}")
                # Only now is the place in the queue taken out of it.
                await deferLater(reactor, QUEUE_POLL)
                self.assertFalse(connecting.called)
                full.setblocking(False)
                full.accept()[0].close()
                factory: Any = Factory.forProtocol(lambda: Monitor([], []))
                port = reactor.adoptStreamPort(  # type: ignore[attr-defined]
                    full.fileno(), socket.AF_UNIX, factory
                )
                try:
                    client = await connecting
                    self.assertEqual(await client.execute("query-status"), {})
                    client.close()
                finally:
                    await port.stopListening()

    async def test_no_address(self) -> None:
        """What is no address is said to be none."""
        for address in ("", "unix:", "/path", "tcp:host", "tcp:host:port", "tcp::1", "vsock:1:2"):
            await self.failure(address, ArgumentError)

    async def test_descriptors(self) -> None:
        """Each descriptor comes with its own command, and stays the caller's."""
        descriptors: list[int] = []
        commands: list[Any] = []
        factory: Any = Factory.forProtocol(lambda: Monitor(descriptors, commands))
        port: Any = IReactorUNIX(reactor).listenUNIX(os.fspath(self.path), factory)
        try:
            client = await connect(reactor, f"unix:{self.path}")
            here, there = socket.socketpair()
            with here, there:

                async def give(name: str) -> None:
                    async with client.fd_turn:
                        given = client.execute_with_fd(there.fileno(), "getfd", fdname=name)
                        self.assertEqual(await given, {})

                await together(
                    [
                        Deferred.fromCoroutine(give("a")),
                        client.execute("query-status"),
                        Deferred.fromCoroutine(give("b")),
                    ]
                )
                self.assertEqual(len(descriptors), 2)
                got = [number for name, number in commands if name == "getfd"]
                self.assertEqual(got, [1, 2])
                for descriptor in descriptors:
                    os.write(descriptor, b"x")
                    os.close(descriptor)
                self.assertEqual(here.recv(2), b"xx")
            lost: Deferred[None] = Deferred()
            client.when_lost(lambda reason: lost.callback(None))
            client.close()
            await lost
        finally:
            await port.stopListening()
