"""Programs that carry connections, in the real reactor."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any, cast

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase

from qmigd.errors import FeatureError, MigrationError, PeerGone, QmigdError
from qmigd.transports.leftovers import Leftovers
from qmigd.transports.programs import Programs
from qmigd.transports.sockets import detach
from tests.rig.processes import processes_with


class Collector(Protocol):
    """Collects what comes, until the end."""

    def __init__(self) -> None:
        self.data = b""
        self.lost: Deferred[bytes] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.data += data

    def connectionLost(self, reason: Failure | None = None) -> None:
        self.lost.callback(self.data)


class ProgramsTests(TestCase):
    def setUp(self) -> None:
        self.directory = Path(self.mktemp())
        self.leftovers = Leftovers(reactor, self.directory)
        # What has ended is forgotten.
        self.addCleanup(lambda: self.assertEqual(os.listdir(self.directory), []))

    def programs(self, script: str) -> Programs:
        argv = ("/bin/sh", "-c", script)
        made = Programs(reactor, argv, f"exec:{script}", "a migration", self.leftovers)
        self.addCleanup(lambda: Deferred.fromCoroutine(made.end(0.0)))
        return made

    async def connect(self, programs: Programs) -> Collector:
        factory = Factory.forProtocol(Collector)
        return cast(Collector, await programs.client(reactor).connect(factory))

    async def explained(self, programs: Programs, error: QmigdError) -> str:
        await programs.explain(error)
        return error.text

    async def test_both_ways(self) -> None:
        """Its standard input and output are one connection, of which each half ends by itself."""
        programs = self.programs("exec cat")
        one, other = await self.connect(programs), await self.connect(programs)
        for each in (one, other):
            transport = cast(Any, each.transport)
            transport.write(b"there and back")
            transport.loseWriteConnection()
            self.assertEqual(await each.lost, b"there and back")
        await programs.end()

    async def test_socket(self) -> None:
        """The socket can be taken out of the reactor, and carries on."""
        programs = self.programs("exec cat")
        with detach((await self.connect(programs)).transport) as sock:
            self.assertEqual(sock.family, socket.AF_UNIX)
            sock.sendall(b"more")
            self.assertEqual(sock.recv(4), b"more")
        await programs.end()

    async def test_cannot_start(self) -> None:
        """What cannot be started is a connection that cannot be made."""
        argv = ("/etc/passwd",)
        programs = Programs(reactor, argv, "exec:", "a migration", self.leftovers)
        with self.assertRaisesRegex(ConnectError, "'/etc/passwd' cannot be started: Permission"):
            await self.connect(programs)

    async def test_last_words(self) -> None:
        """An error gets the last lines of the one that failed, in printable characters."""
        programs = self.programs(r"printf 'a\nb\nc\033[1m\n\nd' >&2; exit 3")
        await (await self.connect(programs)).lost
        said = await self.explained(programs, PeerGone("It is gone."))
        self.assertTrue(said.startswith("It is gone; 'printf "), said)
        last = "b | c\N{REPLACEMENT CHARACTER}[1m | d"
        self.assertTrue(said.endswith(f"ended with exit code 3: {last}"), said)

    async def test_not_its_fault(self) -> None:
        """What has nothing to do with connections is left as it is."""
        programs = self.programs("echo Welcome >&2; exec cat")
        await self.connect(programs)
        error = FeatureError("multifd cannot be had.")
        self.assertEqual(await self.explained(programs, error), "multifd cannot be had.")

    async def test_group(self) -> None:
        """With it ends all of its group, whatever that does about SIGTERM."""
        word = f"98765.{os.getpid()}"
        programs = self.programs(f"trap '' TERM; sleep {word} & sleep {word} & echo; wait")
        connection = await self.connect(programs)
        while len(processes_with(f"sleep {word}")) < 3:  # the shell itself has it, too
            await _turn()
        cast(Any, connection.transport).loseConnection()
        await programs.end(0.0)
        self.assertEqual(processes_with(word), {})

    async def test_group_without_leader(self) -> None:
        """What the program has left behind in its group ends as well."""
        word = f"98766.{os.getpid()}"
        programs = self.programs(f"sleep {word} <&- >&- & exit 0")
        await (await self.connect(programs)).lost
        await programs.end()
        self.assertEqual(processes_with(word), {})

    async def test_ended_is_no_failure(self) -> None:
        """One that was told to end has not failed."""
        programs = self.programs("exec sleep 98767")
        await self.connect(programs)
        await programs.end(0.0)
        self.assertEqual(await self.explained(programs, MigrationError("No.")), "No.")

    async def test_endless_line(self) -> None:
        """One that never ends its line is heard piece by piece."""
        programs = self.programs("head -c 300000 /dev/zero | tr '\\0' x >&2; exit 1")
        await (await self.connect(programs)).lost
        said = await self.explained(programs, PeerGone("It is gone."))
        self.assertIn("exit code 1: ", said)
        self.assertLess(len(said), 1000)

    async def test_signal(self) -> None:
        """A signal is told by its number."""
        programs = self.programs("kill -HUP $$")
        await (await self.connect(programs)).lost
        said = await self.explained(programs, PeerGone("It is gone."))
        self.assertIn(f"ended with signal {int(signal.SIGHUP)}: it said nothing", said)


def _turn() -> Deferred[None]:
    """Let the reactor do something else."""
    done: Deferred[None] = Deferred()
    cast(Any, reactor).callLater(0, done.callback, None)
    return done
