"""qmigctl as a process, against a management socket with scripted answers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ProcessDone
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from qmigd import __version__
from qmigd.cli.options import SUBCOMMANDS, Exit
from qmigd.errors import GuestNotFound

from .management import MIGRATION, ManagementTestCase, Scripted, entry

ROOT = Path(__file__).parents[1]

GUEST = {
    "name": "web1", "backend": "qemu", "qmp": "unix:/q", "launch": False,
    "configured": True, "state": "running",
}  # fmt: skip


class Running(ProcessProtocol):
    """A process whose output is kept."""

    def __init__(self) -> None:
        self.out = self.err = b""
        self.ended: Deferred[int] = Deferred()

    def outReceived(self, data: bytes) -> None:
        self.out += data

    def errReceived(self, data: bytes) -> None:
        self.err += data

    def processEnded(self, reason: Failure) -> None:
        value: Any = reason.value
        self.ended.callback(0 if reason.check(ProcessDone) else value.exitCode)


class QmigctlTestCase(ManagementTestCase):
    def spawn(
        self,
        *arguments: str,
        tty: bool = False,
        socket: str | None = None,
        descriptors: Mapping[int, str | int] | None = None,
    ) -> Running:
        """Start qmigctl; ``descriptors`` are its files, as in ``spawnProcess``."""
        process = Running()
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "error",
            "QMIGD_SOCKET": socket or self.socket,
            "TERM": "xterm",
            "COLUMNS": "80",
        }
        command = [sys.executable, "-c", "from qmigd.cli.main import main; main()", *arguments]
        process.transport = self.reactor.spawnProcess(
            process, sys.executable, command, env, usePTY=tty, childFDs=descriptors
        )
        return process

    async def run_(self, *arguments: str, socket: str | None = None) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr."""
        process = self.spawn(*arguments, socket=socket)
        code = await process.ended
        return code, process.out.decode(), process.err.decode()


class ListTests(QmigctlTestCase):
    async def test_guests(self) -> None:
        """A list is printed as a table, or with --json as the daemon gave it."""
        answer = [GUEST]
        self.operations.answers["query-guests"] = answer
        self.assertEqual(
            (0, "GUEST  STATE    QMP\nweb1   running  unix:/q\n", ""), await self.run_("guests")
        )
        code, out, err = await self.run_("guests", "--json")
        self.assertEqual((0, answer, ""), (code, json.loads(out), err))
        code, out, err = await self.run_("--json", "guests")
        self.assertEqual((0, answer, ""), (code, json.loads(out), err))

    async def test_added(self) -> None:
        """A guest that is registered is shown as it is, or why it cannot be looked at."""
        self.operations.answers["guest-add"] = GUEST
        self.assertEqual(
            (0, "web1 is registered; it is running.\n", ""),
            await self.run_("guest-add", "web1", "unix:/q"),
        )
        gone = {**GUEST, "state": "unreachable", "reason": "cannot reach a guest on unix:/q: gone"}
        self.operations.answers["guest-add"] = gone
        self.assertEqual(
            (
                0,
                "web1 is registered, but unreachable: cannot reach a guest on unix:/q: gone\n",
                "",
            ),
            await self.run_("guest-add", "web1", "unix:/q"),
        )

    async def test_socket(self) -> None:
        """The socket can be named before and after the command, as a URI or as a path."""
        self.operations.answers["query-guests"] = []
        for arguments in (
            ("--socket", self.socket, "guests"),
            ("guests", "--socket", self.path),
        ):
            code, _, err = await self.run_(*arguments, socket="unix:/nowhere")
            self.assertEqual((0, ""), (code, err))

    async def test_arguments(self) -> None:
        """Each subcommand gives its command, with the arguments where they belong."""
        self.operations.answers.update(
            {
                "query-features": {"features": []},
                "query-tunables": [],
                "query-migrate": [],
                "migrate": {"id": MIGRATION},
                "save": {"id": MIGRATION},
                "restore": {"id": MIGRATION},
                "guest-add": GUEST,
            }
        )
        for words, command, arguments in (
            ("features", "query-features", {}),
            ("features g", "query-features", {"guest": "g"}),
            ("features g tcp:h", "query-features", {"guest": "g", "uri": "tcp:h"}),
            ("tunables g", "query-tunables", {"guest": "g"}),
            ("status", "query-migrate", {}),
            ("status g", "query-migrate", {"guest": "g"}),
            ("postcopy g", "migrate-start-postcopy", {"guest": "g"}),
            ("cancel g", "migrate-cancel", {"guest": "g"}),
            ("set g a=1 b=x=y", "migrate-set-parameters",
             {"guest": "g", "tunables": {"a": "1", "b": "x=y"}}),
            ("guest-add n unix:/q", "guest-add", {"name": "n", "qmp": "unix:/q"}),
            ("guest-remove n", "guest-remove", {"name": "n"}),
            ("migrate g tcp:h --detach", "migrate", {"guest": "g", "uri": "tcp:h"}),
            (
                "migrate --tunable a=1 --tunable b= --prefer p --prefer q --require r "
                "--exclude e --detach g tcp:h",
                "migrate",
                {"guest": "g", "uri": "tcp:h", "tunables": {"a": "1", "b": ""},
                 "prefer": ["p", "q"], "require": ["r"], "exclude": ["e"]},
            ),
            ("save g /f --detach", "save", {"guest": "g", "file": "/f"}),
            (
                "save g /d/../f --detach --format zstd --live --continue --replace --no-checksum "
                "--tunable a=1",
                "save",
                {"guest": "g", "file": "/f", "format": "zstd", "live": True, "after": "continue",
                 "replace": True, "checksum": False, "tunables": {"a": "1"}},
            ),
            ("save g f --after quit --detach", "save",
             {"guest": "g", "file": os.path.abspath("f"), "after": "quit"}),
            ("restore g /f --detach --no-verify --tunable a=1", "restore",
             {"guest": "g", "file": "/f", "verify": False, "tunables": {"a": "1"}}),
        ):  # fmt: skip
            code, out, err = await self.run_(*words.split())
            self.assertEqual((0, "", True), (code, err, out.endswith("\n")), words)
            self.assertEqual((command, arguments), self.operations.calls[-1])
        self.assertEqual(
            set(SUBCOMMANDS) - {"guests"},
            {"features", "tunables", "status", "postcopy", "cancel", "set", "guest-add",
             "guest-remove", "migrate", "restore", "save"},
        )  # fmt: skip


class ErrorTests(QmigctlTestCase):
    async def test_refused(self) -> None:
        """What the daemon refuses is one sentence on stderr, and exit code 2."""
        self.operations.answers["migrate-cancel"] = GuestNotFound("There is no guest 'g'.")
        self.assertEqual(
            (Exit.REFUSED, "", "qmigctl: There is no guest 'g'.\n"), await self.run_("cancel", "g")
        )

    async def test_refused_json(self) -> None:
        """With --json it is an object on stdout, with the error's code."""
        self.operations.answers["migrate-cancel"] = GuestNotFound("There is no guest 'g'.")
        code, out, err = await self.run_("cancel", "g", "--json")
        self.assertEqual((Exit.REFUSED, ""), (code, err))
        self.assertEqual(
            {"error": {"class": "guest-not-found", "desc": "There is no guest 'g'."}},
            json.loads(out),
        )

    async def test_usage(self) -> None:
        """A wrong command line is one sentence that says where to read on, and exit code 2."""
        self.assertEqual(
            (Exit.REFUSED, "", "qmigctl: There is no command 'migrat'; did you mean 'migrate'? "
             "See 'qmigctl help'.\n"),
            await self.run_("migrat"),
        )  # fmt: skip
        for words, sentence in (
            ("help zzz", "There is no command 'zzz'."),
            ("set g a=1 a=2", "The tunable 'a' is given twice."),
            (
                "--socket tcp:h:1 guests",
                "'tcp:h:1' is no management socket; it must be unix:/path.",
            ),
        ):
            self.assertEqual(
                (Exit.REFUSED, "", f"qmigctl: {sentence}\n"), await self.run_(*words.split())
            )
        code, out, err = await self.run_("guests", "x", "--json")
        self.assertEqual((Exit.REFUSED, ""), (code, err))
        self.assertEqual("usage", json.loads(out)["error"]["class"])
        self.assertEqual([], self.operations.calls)

    async def test_unreachable(self) -> None:
        """A socket that is not there, or that nobody listens on, is exit code 3 with the reason."""
        code, out, err = await self.run_("guests", "--socket", f"unix:{self.directory}/none")
        self.assertEqual((Exit.UNREACHABLE, ""), (code, out))
        self.assertIn(f"qmigctl: There is no socket {self.directory}/none: qmigd does not", err)
        code, out, err = await self.run_("guests", "--socket", self.directory)
        self.assertEqual((Exit.UNREACHABLE, ""), (code, out))
        self.assertIn(f"qmigctl: {self.directory} is no socket", err)
        await self.monitor.stop()
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(self.path)
        code, out, err = await self.run_("guests")
        self.assertEqual((Exit.UNREACHABLE, ""), (code, out))
        self.assertIn(f"qmigctl: Nobody listens on {self.path}: qmigd has ended", err)
        code, out, err = await self.run_("guests", "--json")
        self.assertEqual((Exit.UNREACHABLE, ""), (code, err))
        self.assertEqual("unreachable", json.loads(out)["error"]["class"])

    async def test_daemon_ends(self) -> None:
        """A daemon that ends before it has answered is exit code 3."""
        self.operations.answers["query-guests"] = self.vanish
        code, out, err = await self.run_("guests")
        self.assertEqual(
            (
                Exit.UNREACHABLE,
                "",
                "qmigctl: qmigd closed the connection before it had answered.\n",
            ),
            (code, out, err),
        )

    def vanish(self, **arguments: Any) -> Deferred[Any]:
        for client in list(self.monitor._server.clients):
            client.transport.abortConnection()
        return Deferred()


class MigrateTests(QmigctlTestCase):
    def script(self, *entries: dict[str, Any]) -> None:
        self.operations.answers["migrate"] = {"id": MIGRATION}
        self.operations.answers["query-migrate"] = Scripted.Sequence([one] for one in entries)

    completed = entry(
        "completed", step="done", ended=1003.2, **{"total-time": 3200, "downtime": 41}
    )

    async def test_plain(self) -> None:
        """Without a terminal there is a line for each change, and the summary; only text."""
        self.script(entry("setup", step="negotiating", ram={}), entry(), self.completed)
        code, out, err = await self.run_("migrate", "web1", "tcp:host-b")
        self.assertEqual((Exit.OK, ""), (code, err))
        lines = out.splitlines()
        self.assertEqual("web1: setup, negotiating", lines[0])
        self.assertIn("web1: active, moving RAM; pass 2; 3.0 GiB sent; 1.0 GiB left", lines[1])
        self.assertEqual("web1: completed, done; pass 2; 3.0 GiB sent; 1.0 GiB left; 1.0 GiB/s",
                         lines[2])  # fmt: skip
        self.assertEqual(
            "web1 moved to tcp:host-b:16516 in 3.2 s, stood still for 41 ms.", lines[3]
        )
        self.assertIn("  path      direct: the destination offers ports", lines)
        self.assertIn("  left out  postcopy-preempt: QEMU 7.2 lacks it", lines)
        self.assertNotIn("\x1b", out)
        self.assertEqual(("query-migrate", {"id": MIGRATION}), self.operations.calls[-1])

    async def test_json(self) -> None:
        """With --json there is one object at the end: the last entry of query-migrate."""
        self.script(entry(), self.completed)
        code, out, err = await self.run_("migrate", "web1", "tcp:host-b", "--json")
        self.assertEqual((Exit.OK, ""), (code, err))
        self.assertEqual(self.completed, json.loads(out))

    async def test_detach(self) -> None:
        """With --detach it returns at once, and says how to follow; with --json the id."""
        self.script(entry())
        code, out, err = await self.run_("migrate", "web1", "tcp:host-b", "--detach")
        self.assertEqual((Exit.OK, ""), (code, err))
        self.assertIn("'qmigctl status --watch web1'", out)
        code, out, err = await self.run_("migrate", "web1", "tcp:host-b", "--detach", "--json")
        self.assertEqual({"id": MIGRATION}, json.loads(out))
        self.assertNotIn("query-migrate", [name for name, _ in self.operations.calls])

    async def test_failed(self) -> None:
        """A failure is exit code 1 with the reason; with --json the entry has it."""
        failed = entry(
            "failed",
            step="failed",
            ended=1.0,
            owner="source",
            error={"class": "peer-gone", "desc": "The peer was lost."},
        )
        self.script(failed)
        code, out, err = await self.run_("migrate", "web1", "tcp:host-b")
        self.assertEqual(Exit.FAILED, code)
        self.assertEqual("qmigctl: The migration of web1 failed: The peer was lost.\n", err)
        code, out, err = await self.run_("migrate", "web1", "tcp:host-b", "--json")
        self.assertEqual((Exit.FAILED, failed, ""), (code, json.loads(out), err))

    async def test_failed_after_the_guest_had_passed(self) -> None:
        """A failure after the guest had passed to the destination has a code of its own."""
        self.script(
            entry("failed", ended=1.0, owner="destination", error={"class": "x", "desc": "Lost."})
        )
        code, _, _ = await self.run_("migrate", "web1", "tcp:host-b")
        self.assertEqual(Exit.PASSED_ON, code)

    async def test_cancelled(self) -> None:
        """A migration that was cancelled is exit code 4."""
        self.script(entry("cancelled", ended=1.0))
        code, _, err = await self.run_("migrate", "web1", "tcp:host-b")
        self.assertEqual(Exit.CANCELLED, code)
        self.assertEqual("qmigctl: The migration of web1 was cancelled.\n", err)

    async def test_daemon_lost(self) -> None:
        """Where the daemon is lost meanwhile, nothing is claimed: exit code 5."""
        self.script(entry())
        self.operations.answers["query-migrate"] = self.lose
        code, _, err = await self.run_("migrate", "web1", "tcp:host-b")
        self.assertEqual(Exit.UNKNOWN, code)
        self.assertIn("what became of the migration of web1 is not known", err)

    def lose(self, **arguments: Any) -> Deferred[Any]:
        for client in list(self.monitor._server.clients):
            client.transport.abortConnection()
        return Deferred()

    async def test_interrupt(self) -> None:
        """Ctrl-C ends the watching and not the migration, and says what to do next."""
        self.script(entry())
        process = self.spawn("migrate", "web1", "tcp:host-b")
        await self.operations.called("query-migrate")
        process.transport.signalProcess(signal.SIGINT)  # type: ignore[union-attr]
        self.assertEqual(Exit.UNKNOWN, await process.ended)
        self.assertEqual(
            "qmigctl: No longer watching; the migration of web1 goes on. Watch it with 'qmigctl "
            "status --watch web1', or stop it with 'qmigctl cancel web1'.\n",
            process.err.decode(),
        )
        self.assertNotIn("migrate-cancel", [name for name, _ in self.operations.calls])

    async def test_interrupt_too_early(self) -> None:
        """Ctrl-C before the daemon has answered claims nothing."""
        waiting: Deferred[None] = Deferred()
        self.operations.answers["migrate"] = lambda **arguments: (
            waiting.callback(None) or Deferred()  # type: ignore[func-returns-value]
        )
        process = self.spawn("migrate", "web1", "tcp:host-b")
        await waiting
        process.transport.signalProcess(signal.SIGINT)  # type: ignore[union-attr]
        self.assertEqual(Exit.UNKNOWN, await process.ended)
        self.assertIn(b"Interrupted before qmigd had answered", process.err)

    async def test_status_watch(self) -> None:
        """Status --watch follows the migration that runs, to the same end and exit code."""
        self.operations.answers["query-migrate"] = Scripted.Sequence(
            [[entry("failed", id="old", ended=1.0), entry()], [self.completed]]
        )
        code, out, err = await self.run_("status", "--watch", "web1")
        self.assertEqual((Exit.OK, ""), (code, err))
        self.assertIn("web1 moved to tcp:host-b:16516", out)
        self.operations.answers["query-migrate"] = []
        self.assertEqual(
            (Exit.REFUSED, "", "qmigctl: There is no migration of web1 to watch.\n"),
            await self.run_("status", "--watch", "web1"),
        )

    async def test_terminal(self) -> None:
        """On a terminal there is a bar while it runs, and the summary at the end."""
        self.script(entry("setup", step="negotiating", ram={}), entry(), self.completed)
        process = self.spawn("migrate", "web1", "tcp:host-b", tty=True)
        self.assertEqual(Exit.OK, await process.ended)
        text = process.out.decode()
        self.assertIn("\x1b", text)
        self.assertIn("75%", text)
        last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()
        self.assertIn("web1 moved to tcp:host-b:16516 in 3.2 s, stood still for 41 ms.", last)
        self.assertTrue(text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor is back")

    async def test_terminal_interrupt(self) -> None:
        """Ctrl-C on a terminal gives the cursor back."""
        self.script(entry())
        process = self.spawn("migrate", "web1", "tcp:host-b", tty=True)
        await self.operations.called("query-migrate", 2)
        process.transport.write(b"\x03")  # type: ignore[union-attr]
        self.assertEqual(Exit.UNKNOWN, await process.ended)
        text = process.out.decode()
        self.assertIn("qmigctl: No longer watching", text)
        self.assertTrue(text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l"), "the cursor is back")

    async def test_output_gone(self) -> None:
        """Whoever closes the output early gets no traceback."""
        self.script(entry())
        process = self.spawn("migrate", "web1", "tcp:host-b")
        process.transport.closeStdout()  # type: ignore[union-attr]
        self.assertEqual((Exit.UNKNOWN, b""), (await process.ended, process.err))


class OutputTests(QmigctlTestCase):
    """Standard output and error that are closed, full, or read by nobody."""

    async def check(self, words: str, out: int | None, err: int | None = None) -> tuple[int, str]:
        """Run it with these files; returns exit code and what came on stderr."""
        descriptors: dict[int, str | int] = {0: "w", 2: "r"}
        if out is not None:
            descriptors[1] = out
        if err is not None:
            descriptors[2] = err
        process = self.spawn(*words.split(), descriptors=descriptors)
        return await process.ended, process.err.decode()

    async def test_closed(self) -> None:
        """Nobody wants to have the output: the exit code is that of what was done."""
        self.operations.answers["query-guests"] = [GUEST]
        for words, expected in (
            ("guests", (Exit.OK, "")),
            ("help", (Exit.OK, "")),
            ("frob", (Exit.REFUSED, "qmigctl: There is no command 'frob'. See 'qmigctl help'.\n")),
        ):
            self.assertEqual(expected, await self.check(words, None), words)
        process = self.spawn("frob", descriptors={})
        self.assertEqual(Exit.REFUSED, await process.ended)

    async def test_full(self) -> None:
        """What cannot be written is said on stderr, and no success; a full stderr is none's."""
        self.operations.answers["query-guests"] = [GUEST]
        said = "qmigctl: The output could not be written: No space left on device.\n"
        with open("/dev/full", "wb") as full:
            for words in ("guests", "--version"):
                found = await self.check(words, full.fileno())
                self.assertEqual((Exit.UNKNOWN, said), found, words)
            found = await self.check("frob", full.fileno(), full.fileno())
            self.assertEqual((Exit.REFUSED, ""), found)
            # An error is more worth being said than that.
            code, text = await self.check("frob --json", full.fileno())
            self.assertEqual(Exit.REFUSED, code)
            self.assertIn("There is no command 'frob'", text)

    async def test_unread(self) -> None:
        """A reader that has gone, as ``head`` does, is told nothing."""
        self.operations.answers["query-guests"] = [GUEST]
        reader, writer = os.pipe()
        os.close(reader)
        for words in ("guests --json", "help"):
            self.assertEqual((Exit.UNKNOWN, ""), await self.check(words, writer), words)
        os.close(writer)


class HelpTests(QmigctlTestCase):
    async def test_help(self) -> None:
        """Help and version are printed without a daemon."""
        await self.monitor.stop()
        code, out, err = await self.run_("--help")
        self.assertEqual((0, ""), (code, err))
        self.assertIn("usage: qmigctl ", out)
        self.assertEqual((0, out, ""), await self.run_("help"))
        code, out, err = await self.run_("help", "migrate")
        self.assertEqual((0, ""), (code, err))
        self.assertIn("usage: qmigctl migrate ", out)
        self.assertEqual((0, f"qmigctl {__version__}\n", ""), await self.run_("--version"))
