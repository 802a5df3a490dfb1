"""The source's path, where QEMU makes a connection that it does not wait for by itself."""

from __future__ import annotations

import shutil
import socket
import tempfile
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from qmigd.errors import PeerGone
from qmigd.guests.qemu import QemuGuest
from qmigd.interfaces import HANDOVER, RELAY
from qmigd.migration.services import Deadlines, Services
from qmigd.migration.source_path import SourcePath
from qmigd.negotiation.plan import MAIN, Plan
from qmigd.transports.uri import TcpAddress
from tests.test_channels_pump import is_open

_PREEMPT = ("preempt", 0)


class UnawaitedTests(TestCase):
    """A relay to a peer that takes no channel."""

    def setUp(self) -> None:
        """A port at which nobody is."""
        self.run_dir = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.run_dir, ignore_errors=True)
        with socket.create_server(("127.0.0.1", 0)) as gone:
            self.peer = TcpAddress("127.0.0.1", gone.getsockname()[1])
        self.failed: Deferred[None] = Deferred()

    def unopened(self, *unawaited: str, way: str = RELAY) -> SourcePath:
        """Return a path with no way to the peer."""
        plan = Plan(way, channels=(MAIN, _PREEMPT) if way == RELAY else (MAIN,))
        services = SimpleNamespace(
            reactor=reactor, run_dir=self.run_dir, features={}, deadlines=Deadlines()
        )
        path = SourcePath(
            cast(Services, services),
            plan,
            str(uuid.uuid4()),
            b"secret",
            self.woken,
            self.peer,
            lambda **_: None,
            in_band=False,
            unawaited=frozenset(unawaited),
        )
        self.addCleanup(path.close)
        return path

    async def path(self, *unawaited: str) -> tuple[SourcePath, socket.socket, str]:
        """Return one whose main channel QEMU has connected."""
        path = self.unopened(*unawaited)
        uri = str(await path.open(None, {})).removeprefix("unix:")
        main = self.connect(uri)
        path.set_off(QemuGuest(reactor, "vm", "unix:/nonexistent/qmp"))
        await self.failed
        return path, main, uri

    def woken(self) -> None:
        if not self.failed.called:
            self.failed.callback(None)

    def connect(self, uri: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        self.addCleanup(sock.close)
        sock.connect(uri)
        return sock

    async def test_waited_for(self) -> None:
        """QEMU is told that the stream broke only once it has made that connection."""
        path, main, uri = await self.path("preempt")
        steady: list[Any] = []
        waiting = Deferred.fromCoroutine(path.steady()).addCallback(steady.append)
        turn: Deferred[None] = Deferred()
        cast(Any, reactor).callLater(0, turn.callback, None)
        await turn
        self.assertTrue(is_open(main))
        self.assertEqual(steady, [])
        preempt = self.connect(uri)
        await waiting
        self.assertEqual(await deferToThread(main.recv, 1), b"")
        self.assertEqual(await deferToThread(preempt.recv, 1), b"")

    async def test_owned_meanwhile(self) -> None:
        """Where the guest is the destination's by then, QEMU is told nothing."""
        path, main, uri = await self.path("preempt")
        path.hold()
        self.connect(uri)
        await path.steady()
        self.assertTrue(is_open(main))

    async def test_nothing_to_wait_for(self) -> None:
        """A QEMU that waits by itself is told at once."""
        path, main, _ = await self.path()
        self.assertEqual(await deferToThread(main.recv, 1), b"")
        await path.steady()

    async def test_known_beforehand(self) -> None:
        """A channel that could not be opened ahead of time fails the path before QEMU begins."""
        for way in (HANDOVER, RELAY):
            self.failed = Deferred()
            path = self.unopened("preempt", way=way)
            path.prepare()
            await self.failed
            with self.assertRaises(PeerGone):
                await path.open(None, {})
            self.assertEqual(list(self.run_dir.iterdir()), [])
