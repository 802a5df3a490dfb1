"""The management socket: commands over QMP, and who may open it."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from qmigd import __version__
from qmigd.api import COMMANDS
from qmigd.daemon.monitor import Monitor
from qmigd.errors import ConfigError, GuestNotFound
from qmigd.qmp.client import QMPClient, QMPRefusal
from qmigd.qmp.connecting import connect

from .management import ManagementTestCase, Scripted


class CommandTests(ManagementTestCase):
    async def connect(self) -> QMPClient:
        client = await connect(self.reactor, self.socket)
        gone: Deferred[None] = Deferred()
        client.when_lost(lambda reason: gone.callback(None))

        def close() -> Deferred[None]:
            client.close()
            return gone

        self.addCleanup(close)
        return client

    async def refused(self, client: QMPClient, name: str, **arguments: Any) -> QMPRefusal:
        return await self.raised(QMPRefusal, client.execute(name, **arguments))

    async def test_greeting(self) -> None:
        """The greeting has qmigd's version where QEMU has its own."""
        client = await self.connect()
        major, minor, micro = (int(part) for part in __version__.split("."))
        self.assertEqual(
            {
                "qemu": {"major": major, "minor": minor, "micro": micro},
                "package": f"qmigd {__version__}",
            },
            client.greeting["version"],
        )

    async def test_command(self) -> None:
        """A command reaches its handler with its arguments, and its answer the client."""
        self.operations.answers["migrate"] = {"id": "x"}
        client = await self.connect()
        answer = await client.execute("migrate", guest="g", uri="tcp:h:1", prefer=["multifd"])
        self.assertEqual({"id": "x"}, answer)
        self.assertEqual(
            [("migrate", {"guest": "g", "uri": "tcp:h:1", "prefer": ["multifd"]})],
            self.operations.calls,
        )

    async def test_nothing(self) -> None:
        """A handler that returns nothing is answered with the empty object, as QEMU does."""
        client = await self.connect()
        self.assertEqual({}, await client.execute("migrate-cancel", guest="g"))

    async def test_wrong_argument(self) -> None:
        """A wrong argument is refused with its name before the handler is called."""
        client = await self.connect()
        error = await self.refused(client, "migrate-cancel", gest="g")
        self.assertEqual("migrate-cancel has no argument 'gest'; did you mean 'guest'?", error.desc)
        self.assertEqual([], self.operations.calls)

    async def test_unknown_command(self) -> None:
        """An unknown command has QMP's own error class, and the nearest names."""
        client = await self.connect()
        error = await self.refused(client, "query-guest")
        self.assertEqual("CommandNotFound", error.kind)
        self.assertEqual("There is no command 'query-guest'; did you mean 'query-guests'?",
                         error.desc)  # fmt: skip

    async def test_error(self) -> None:
        """What a handler raises is told the client in its own words."""
        self.operations.answers["migrate-cancel"] = GuestNotFound("There is no guest 'g'.")
        client = await self.connect()
        error = await self.refused(client, "migrate-cancel", guest="g")
        self.assertEqual("There is no guest 'g'.", error.desc)

    async def test_events(self) -> None:
        """An event reaches every client."""
        heard: list[Deferred[tuple[str, dict[str, Any]]]] = []

        def listen(client: QMPClient) -> None:
            one: Deferred[tuple[str, dict[str, Any]]] = Deferred()
            heard.append(one)
            client.subscribe(lambda name, data, at: one.callback((name, data)))

        for client in (await self.connect(), await self.connect()):
            listen(client)
            # it has been heard, and is in command mode
            self.operations.answers["query-guests"] = []
            await client.execute("query-guests")
        self.monitor.event("MIGRATION_PASS", {"id": "x", "guest": "g", "pass": 2})
        for one in heard:
            self.assertEqual(("MIGRATION_PASS", {"id": "x", "guest": "g", "pass": 2}), await one)


class SocketTests(ManagementTestCase):
    def mode(self, path: str) -> int:
        return stat.S_IMODE(os.stat(path).st_mode)

    async def test_private(self) -> None:
        """Nobody but the daemon's user can open the socket."""
        self.assertEqual(0o600, self.mode(self.path))

    async def test_directory(self) -> None:
        """A directory that is not there is made, for the daemon's user alone."""
        monitor = Monitor(self.reactor, f"{self.directory}/a/b/q.sock", Scripted())
        await monitor.start()
        self.assertEqual(0o700, self.mode(f"{self.directory}/a/b"))
        await monitor.stop()
        self.assertEqual([], os.listdir(f"{self.directory}/a/b"))

    async def test_second_daemon(self) -> None:
        """Where a daemon answers, a second one does not start, and the first goes on."""
        second = Monitor(self.reactor, self.path, Scripted())
        error = await self.raised(ConfigError, second.start())
        self.assertTrue(error.text.startswith(f"Another daemon answers on {self.path}."))
        client = await connect(self.reactor, self.socket)
        client.close()

    async def test_stale(self) -> None:
        """A socket that a dead daemon left behind is replaced."""
        path = f"{self.directory}/stale.sock"
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(path)
        monitor = Monitor(self.reactor, path, Scripted())
        await monitor.start()
        client = await connect(self.reactor, f"unix:{path}")
        client.close()
        await monitor.stop()
        self.assertNotIn("stale.sock", os.listdir(self.directory))

    async def test_no_socket(self) -> None:
        """A file that is no socket is never removed."""
        file = Path(self.directory, "file")
        file.write_text("precious")
        monitor = Monitor(self.reactor, str(file), Scripted())
        error = await self.raised(ConfigError, monitor.start())
        self.assertIn("is no socket, and is left alone", error.text)
        self.assertEqual("precious", file.read_text())

    async def test_no_directory(self) -> None:
        """A directory that cannot be made is named, with what to do about it."""
        monitor = Monitor(self.reactor, "/proc/qmigd/q.sock", Scripted())
        error = await self.raised(ConfigError, monitor.start())
        self.assertIn("directory /proc/qmigd cannot be made", error.text)
        self.assertIn("'monitor' in [daemon]", error.text)


class HandlerTests(SynchronousTestCase):
    def test_every_command_has_a_handler(self) -> None:
        """A daemon that cannot do all that is declared does not come into being."""

        class Half:
            async def query_version(self) -> dict[str, Any]:
                return {}

        error = self.assertRaises(TypeError, Monitor, object(), "/x", Half())
        missing = next(name for name in COMMANDS if name != "query-version")
        self.assertEqual(f"Half has no handler for the command '{missing}'", str(error))
