"""The QMP server: its dialect, its order, its bounds, and a foreign client."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorUNIX
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.internet.utils import getProcessOutputAndValue
from twisted.trial.unittest import SynchronousTestCase, TestCase

from qmigd.errors import ArgumentError, CommandNotFound
from qmigd.qmp.codec import SERVER_LIMIT
from qmigd.qmp.descriptors import MAX_NAMED, MAX_UNNAMED, Descriptors
from qmigd.qmp.server import EVENT_BACKLOG, QUEUE, QMPServer


class ServerBase(SynchronousTestCase):
    """Clients over transports in memory; commands end when the test says so."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.clock.advance(1_700_000_000.25)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.slow: list[Deferred[Any]] = []
        self.taken: list[int] = []
        self.server = QMPServer(self.clock, self.dispatch, "1.2.3", "qmigd")

    async def dispatch(
        self, command: str, arguments: dict[str, Any], descriptors: Descriptors
    ) -> Any:
        self.calls.append((command, arguments))
        match command:
            case "echo":
                return arguments
            case "slow":
                self.slow.append(Deferred())
                return await self.slow[-1]
            case "nothing":
                return None
            case "getfd":
                descriptors.name(arguments["fdname"])
                return None
            case "take":
                self.taken.append(descriptors.take(arguments["fdname"]))
                return None
            case "wrong":
                raise ArgumentError("guest has to be a name", code="argument")
            case "broken":
                raise ZeroDivisionError
            case "unspeakable":
                return object()
        raise CommandNotFound(f"there is no command {command}")

    def client(self, *, ready: bool = True) -> tuple[Any, StringTransport]:
        """Connect a client, and return its server's side with its transport."""
        transport = StringTransport()
        protocol: Any = self.server.buildProtocol(None)
        protocol.makeConnection(transport)
        if ready:
            protocol.dataReceived(b'{"execute": "qmp_capabilities"}\n')
            transport.clear()
        return protocol, transport

    def heard(self, transport: StringTransport) -> list[Any]:
        """Return what a client was sent since the last time."""
        lines = transport.value().splitlines()
        transport.clear()
        return [json.loads(line) for line in lines]

    def ask(self, *commands: Any, ready: bool = True) -> list[Any]:
        """Return what a new client gets for these."""
        protocol, transport = self.client(ready=ready)
        transport.clear()
        for command in commands:
            data = command if isinstance(command, bytes) else json.dumps(command).encode()
            protocol.dataReceived(data + b"\n")
        return self.heard(transport)


class ServerTests(ServerBase):
    """The dialect, and its bounds."""

    def test_greeting(self) -> None:
        """A client is greeted as QEMU does it."""
        _, transport = self.client(ready=False)
        version = {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "qmigd"}
        self.assertEqual(self.heard(transport), [{"QMP": {"version": version, "capabilities": []}}])

    def test_negotiation(self) -> None:
        """Nothing but qmp_capabilities comes first, and that only once."""
        answers = self.ask(
            {"execute": "echo", "id": 1},
            {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": 2},
            {"execute": "qmp_capabilities", "arguments": {"disable": []}, "id": 3},
            {"execute": "qmp_capabilities", "arguments": {"enable": []}, "id": 4},
            {"execute": "qmp_capabilities", "id": 5},
            {"execute": "echo", "id": 6},
            ready=False,
        )
        self.assertEqual([answer["id"] for answer in answers], [1, 2, 3, 4, 5, 6])
        classes = [answer.get("error", {}).get("class") for answer in answers]
        wanted = ["CommandNotFound", "GenericError", "GenericError", None, "CommandNotFound", None]
        self.assertEqual(classes, wanted)
        self.assertEqual(self.calls, [("echo", {})])

    def test_answers(self) -> None:
        """What a command returns comes back with the id it had, whatever that is."""
        answers = self.ask(
            {"execute": "echo", "arguments": {"a": [None]}, "id": {"any": "thing"}},
            {"execute": "nothing"},
        )
        wanted: list[Any] = [{"return": {"a": [None]}, "id": {"any": "thing"}}, {"return": {}}]
        self.assertEqual(answers, wanted)

    def test_errors(self) -> None:
        """An error has a class, a sentence, and qmigd's code for a program."""
        wrong, unknown = self.ask({"execute": "wrong", "id": 1}, {"execute": "no-such"})
        error = {
            "class": "GenericError",
            "desc": "guest has to be a name",
            "data": {"code": "argument"},
        }
        self.assertEqual(wrong, {"error": error, "id": 1})
        self.assertEqual(unknown["error"]["class"], "CommandNotFound")

    def test_faults(self) -> None:
        """A fault in qmigd is logged, answered with a sentence, and nothing more."""
        answers = self.ask({"execute": "broken"}, {"execute": "unspeakable"}, {"execute": "echo"})
        for answer in answers[:2]:
            self.assertIn("its log", answer["error"]["desc"])
            self.assertEqual(answer["error"]["data"], {"code": "internal"})
        self.assertEqual(answers[2], {"return": {}})
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError, TypeError)), 2)

    def test_nonsense(self) -> None:
        """Each thing that is no command is answered with what is wrong about it."""
        nonsense: list[Any] = [
            b"nonsense", b'{"execute": }', [], {}, {"execute": 1}, {"execute": "echo", "x": 1},
            {"execute": "echo", "arguments": []}, {"exec-oob": "echo"},
        ]  # fmt: skip
        answers = self.ask(*nonsense, {"execute": "echo"})
        self.assertEqual(len(answers), len(nonsense) + 1)
        for answer in answers[:-1]:
            self.assertEqual(answer["error"]["class"], "GenericError")
        self.assertEqual(answers[-1], {"return": {}})

    def test_too_long(self) -> None:
        """A message beyond the limit is answered, and the connection ends."""
        protocol, transport = self.client()
        protocol.dataReceived(b'{"execute": "' + b"x" * SERVER_LIMIT)
        self.assertIn("longer", self.heard(transport)[0]["error"]["desc"])
        self.assertTrue(transport.disconnecting)

    def test_order(self) -> None:
        """One client's commands are run one after another; other clients do not wait."""
        protocol, transport = self.client()
        protocol.dataReceived(b'{"execute": "slow", "id": 1} {"execute": "echo", "id": 2}')
        self.assertEqual(self.heard(transport), [])
        self.assertEqual(self.ask({"execute": "echo"}), [{"return": {}}])
        self.slow[0].callback("done")
        wanted: list[Any] = [{"return": "done", "id": 1}, {"return": {}, "id": 2}]
        self.assertEqual(self.heard(transport), wanted)

    def test_client_that_does_not_wait(self) -> None:
        """With too many commands that wait, no more is read, until they have been run."""
        protocol, transport = self.client()
        protocol.dataReceived(b'{"execute": "slow"}' * QUEUE)
        self.assertEqual(transport.producerState, "producing")
        protocol.dataReceived(b'{"execute": "slow"}')
        self.assertEqual(transport.producerState, "paused")
        self.slow[0].callback(None)
        self.assertEqual(transport.producerState, "producing")
        self.assertEqual(len(self.slow), 2)

    def test_thousands_at_once(self) -> None:
        """However many commands come in one piece, all are answered."""
        protocol, transport = self.client()
        protocol.dataReceived(b'{"execute": "echo"}' * 5000)
        self.assertEqual(len(self.heard(transport)), 5000)

    def test_client_that_does_not_read(self) -> None:
        """No command is begun, and nothing read, while a client does not read its answers."""
        protocol, transport = self.client()
        protocol.pauseProducing()
        protocol.dataReceived(b'{"execute": "echo"}')
        self.assertEqual(transport.producerState, "paused")
        self.server.event("LATER", {})
        self.assertEqual((self.calls, self.heard(transport)), ([], []))
        protocol.resumeProducing()
        self.assertEqual([next(iter(one)) for one in self.heard(transport)], ["event", "return"])
        self.assertEqual(transport.producerState, "producing")

    def test_client_that_never_reads(self) -> None:
        """One that lets a mebibyte of events pile up is let go, and the others are not."""
        protocol, transport = self.client()
        other, other_transport = self.client()
        protocol.pauseProducing()
        data = {"filler": "x" * 1000}
        for _ in range(EVENT_BACKLOG // 1000 + 1):
            self.server.event("NOISE", data)
        self.assertTrue(transport.disconnected)
        self.assertFalse(other_transport.disconnected)
        protocol.connectionLost()
        self.server.event("NOISE", data)
        self.assertEqual(self.server.clients, {other})

    def test_events(self) -> None:
        """Everybody in command mode gets them, stamped, in the order they happened."""
        _, negotiating = self.client(ready=False)
        transports = [self.client()[1] for _ in range(2)]
        negotiating.clear()
        self.server.event("MIGRATION", {"status": "active"})
        stamp = {"seconds": 1_700_000_000, "microseconds": 250_000}
        event = {"event": "MIGRATION", "data": {"status": "active"}, "timestamp": stamp}
        for transport in transports:
            self.assertEqual(self.heard(transport), [event])
        self.assertEqual(self.heard(negotiating), [])

    def test_client_that_leaves(self) -> None:
        """A command goes on to its end although nobody waits for the answer."""
        protocol, transport = self.client()
        protocol.dataReceived(b'{"execute": "slow"} {"execute": "echo"}')
        protocol.connectionLost()
        self.slow[0].callback(None)
        self.assertEqual(self.heard(transport), [])
        self.assertEqual([name for name, _ in self.calls], ["slow"])
        self.assertEqual(self.server.clients, set())

    def test_close(self) -> None:
        """All clients are let go."""
        _, transport = self.client()
        self.server.close()
        self.assertTrue(transport.disconnecting)


class DescriptorTests(ServerBase):
    """Descriptors that come with messages; here they are ends of pipes."""

    def send(self, client: Any, *commands: dict[str, Any]) -> int:
        """Send a descriptor and commands, and return what shows whether it is still open."""
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        os.set_blocking(read, False)
        client.fileDescriptorReceived(write)
        for command in commands:
            client.dataReceived(json.dumps(command).encode())
        return read

    def is_open(self, read: int) -> bool:
        """Whether the other end of a pipe is."""
        try:
            return os.read(read, 1) != b""
        except BlockingIOError:
            return True

    def getfd(self, name: str) -> dict[str, Any]:
        return {"execute": "getfd", "arguments": {"fdname": name}}

    def take(self, name: str) -> dict[str, Any]:
        return {"execute": "take", "arguments": {"fdname": name}}

    def test_named_and_taken(self) -> None:
        """Getfd names a descriptor, and the command that takes it has it for its own."""
        client, transport = self.client()
        read = self.send(client, self.getfd("a"), self.take("a"), self.take("a"))
        named, taken, again = self.heard(transport)
        self.assertEqual([{"return": {}}] * 2, [named, taken])
        self.assertIn("No file descriptor is called 'a'", again["error"]["desc"])
        (descriptor,) = self.taken
        self.assertFalse(os.get_inheritable(descriptor))
        client.connectionLost()
        self.assertTrue(self.is_open(read))
        os.close(descriptor)
        self.assertFalse(self.is_open(read))

    def test_in_order(self) -> None:
        """Several that come before their commands are named in the order in which they came."""
        client, _ = self.client()
        first, second = self.send(client), self.send(client)
        client.dataReceived(json.dumps(self.getfd("a")).encode())
        client.dataReceived(json.dumps(self.getfd("b")).encode())
        client.dataReceived(json.dumps(self.take("b")).encode())
        os.close(self.taken[0])
        self.assertEqual([True, False], [self.is_open(first), self.is_open(second)])
        client.connectionLost()
        self.assertFalse(self.is_open(first))

    def test_closed_with_the_client(self) -> None:
        """What nobody has taken is closed when the client goes, named or not."""
        client, _ = self.client()
        reads = [self.send(client, self.getfd("a")), self.send(client)]
        self.assertEqual([True, True], list(map(self.is_open, reads)))
        client.connectionLost()
        self.assertEqual([False, False], list(map(self.is_open, reads)))

    def test_name_again(self) -> None:
        """A descriptor that had the name before is closed."""
        client, _ = self.client()
        first, second = self.send(client, self.getfd("a")), self.send(client, self.getfd("a"))
        self.assertEqual([False, True], [self.is_open(first), self.is_open(second)])
        client.connectionLost()

    def test_refused(self) -> None:
        """A descriptor that cannot be named is closed; a getfd without one is told so."""
        client, transport = self.client()
        for name in ("", "1a"):
            self.assertFalse(self.is_open(self.send(client, self.getfd(name))))
            self.assertIn("digit", self.heard(transport)[0]["error"]["desc"])
        client.dataReceived(json.dumps(self.getfd("a")).encode())
        self.assertIn("No file descriptor has come", self.heard(transport)[0]["error"]["desc"])
        client.connectionLost()

    def test_not_shared(self) -> None:
        """One client's descriptors are not another's."""
        client, _ = self.client()
        self.send(client, self.getfd("a"))
        other, transport = self.client()
        other.dataReceived(json.dumps(self.take("a")).encode())
        self.assertIn("on this connection", self.heard(transport)[0]["error"]["desc"])
        client.connectionLost()

    def test_bounds(self) -> None:
        """A client can have so many at once, and loses the connection if it sends without end."""
        client, transport = self.client()
        reads = [self.send(client, self.getfd(f"a{n}")) for n in range(MAX_NAMED + 1)]
        self.assertIn("closefd", self.heard(transport)[-1]["error"]["desc"])
        self.assertFalse(self.is_open(reads[-1]))
        reads += [self.send(client) for _ in range(MAX_UNNAMED)]
        self.assertFalse(transport.disconnecting)
        reads.append(self.send(client))
        self.assertTrue(transport.disconnecting)
        self.assertIn("without a getfd", self.heard(transport)[0]["error"]["desc"])
        client.connectionLost()
        self.assertFalse(any(map(self.is_open, reads)))


#: Drives the server with the qemu.qmp library, and prints what it saw.
FOREIGN = """
import asyncio, json, sys
from qemu.qmp import EventListener, QMPClient
from qemu.qmp.qmp_client import ExecuteError

async def main():
    client = QMPClient("test")
    listener = EventListener(names=["HELLO"])
    client.register_listener(listener)
    await client.connect(sys.argv[1])
    greeting = client.greeting.QMP
    echoed = await client.execute("echo", {"text": "h\\u00e9llo"})
    await client.execute("announce")
    event = await listener.get()
    errors = []
    for command in ("wrong", "no-such"):
        try:
            await client.execute(command)
        except ExecuteError as error:
            errors.append([error.error_class, str(error)])
    await client.disconnect()
    seen = [greeting.version["qemu"], echoed, event["data"], "timestamp" in event, errors]
    print(json.dumps(seen))

asyncio.run(main())
"""


class ForeignClientTests(TestCase):
    """The library that QEMU's own tools use, unmodified."""

    async def test_qemu_qmp(self) -> None:
        """It is greeted, gets answers, errors with their class, and events."""
        server: QMPServer

        async def dispatch(
            command: str, arguments: dict[str, Any], descriptors: Descriptors
        ) -> Any:
            if command == "echo":
                return arguments
            if command == "announce":
                server.event("HELLO", {"a": 1})
                return None
            if command == "wrong":
                raise ArgumentError("that was wrong")
            raise CommandNotFound("there is none such")

        server = QMPServer(reactor, dispatch, "1.2.3")
        directory = Path(tempfile.mkdtemp(prefix="qmp-"))
        path = os.fspath(directory / "monitor")
        port: Any = IReactorUNIX(reactor).listenUNIX(path, server)
        try:
            out, err, code = await getProcessOutputAndValue(
                sys.executable, ["-c", FOREIGN, path], os.environ
            )
        finally:
            await port.stopListening()
            directory.rmdir()
        self.assertEqual(code, 0, err.decode())
        seen = json.loads(out)
        wanted = [
            {"major": 1, "minor": 2, "micro": 3},
            {"text": "h\u00e9llo"},
            {"a": 1},
            True,
            [["GenericError", "that was wrong"], ["CommandNotFound", "there is none such"]],
        ]
        self.assertEqual(seen, wanted)
