"""QEMUs that qmigd starts itself."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from twisted.internet import reactor
from twisted.internet.defer import Deferred

from qmigd.errors import GuestBusy, GuestError, GuestGone
from qmigd.guests.launch import Launcher
from qmigd.guests.qemu import QemuGuest
from tests.rig.case import RigCase
from tests.rig.qemus import require


class LaunchTests(RigCase):
    def setUp(self) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="qmigd-"))
        self.addCleanup(shutil.rmtree, self.state)

    def launcher(self, argv: Sequence[str] | None = None, deadline: float = 30.0) -> Launcher:
        """Make a launcher for a small QEMU, or for another program."""
        if argv is None:
            argv = [*require("7.2").argv, "-M", "none", "-nodefaults", "-display", "none"]
        return Launcher(reactor, "guest", argv, self.state, deadline=deadline)

    async def attached(self, launcher: Launcher) -> QemuGuest:
        guest = QemuGuest(reactor, "guest", launcher.qmp)
        await guest.attach()
        return guest

    async def quit(self, launcher: Launcher) -> None:
        """End the QEMU, and see that its end has been noticed and nothing is left of it."""
        guest = await self.attached(launcher)
        await guest.quit()
        process = launcher._process
        assert process is not None
        await process.end(30)
        self.assertFalse(await launcher.running())

    async def error(self, launcher: Launcher, kind: type[Exception]) -> str:
        """Return the text of the error that starting ends with."""
        try:
            await launcher.start()
        except kind as error:
            return str(error)
        self.fail("it started")

    async def test_start(self) -> None:
        """It waits for a migration, in a session of its own, and can be started again."""
        launcher = self.launcher()
        self.assertFalse(await launcher.running())
        for _ in range(2):
            await launcher.start()
            self.assertTrue(await launcher.running())
            guest = await self.attached(launcher)
            self.assertEqual(await guest.query_status(), "inmigrate")
            process = launcher._process
            assert process is not None and process._child is not None
            pid = process._child.pid
            self.assertEqual(os.getsid(pid), pid)
            # Asked for its end and started again at once: the old one's end is waited for.
            await guest.quit()
        await launcher.start()
        await self.quit(launcher)

    async def test_no_zombie(self) -> None:
        """What has ended is waited for."""
        launcher = self.launcher()
        await launcher.start()
        process = launcher._process
        assert process is not None and process._child is not None
        os.kill(process._child.pid, signal.SIGKILL)
        await process.end(30)
        self.assertEqual(process._child.returncode, -signal.SIGKILL)
        self.assertRaises(ChildProcessError, os.waitpid, process._child.pid, os.WNOHANG)

    async def test_an_earlier_life(self) -> None:
        """One that another life of the daemon started is found by its socket."""
        earlier = self.launcher()
        await earlier.start()
        later = self.launcher()
        self.assertTrue(await later.running())
        guest = await self.attached(later)
        self.assertTrue(await later.running())
        await guest.quit()
        await later.start()
        await self.quit(later)

    async def test_busy(self) -> None:
        """One that runs and does not end is not started a second time."""
        launcher = self.launcher(deadline=0.05)
        await self.launcher().start()
        self.assertTrue(await launcher.running())
        self.assertIn("still running", await self.error(launcher, GuestBusy))
        await self.quit(launcher)

    async def test_no_program(self) -> None:
        """A program that there is not is named."""
        text = await self.error(self.launcher(["/no/such/qemu"]), GuestError)
        self.assertIn("/no/such/qemu", text)

    async def test_dies_at_once(self) -> None:
        """The last of what it printed is in the error, and all of it in the log."""
        launcher = self.launcher([*require("7.2").argv, "-M", "no-such-machine"])
        text = await self.error(launcher, GuestGone)
        self.assertIn("exit code 1", text)
        self.assertIn("unsupported machine type", text)
        self.assertIn("unsupported machine type", launcher.log.read_text())
        self.assertEqual(launcher.log.stat().st_mode & 0o777, 0o600)

    async def test_dies_without_a_word(self) -> None:
        """Then the error says where its words would be."""
        text = await self.error(self.launcher(["/bin/false"]), GuestGone)
        self.assertIn("printed nothing", text)

    async def test_never_opens_its_socket(self) -> None:
        """It has a deadline, and is not left behind."""
        argv = [sys.executable, "-c", "import signal; signal.pause()"]
        launcher = self.launcher(argv, deadline=0.05)
        self.assertIn("did not open", await self.error(launcher, GuestError))
        process = launcher._process
        assert process is not None
        await process.end(30)
        self.assertIn("signal 9", process.outcome)

    async def test_cancelled(self) -> None:
        """One that nobody waits for any more is not left behind."""
        launcher = self.launcher([sys.executable, "-c", "import signal; signal.pause()"])
        starting = Deferred.fromCoroutine(launcher.start())
        starting.addErrback(lambda failure: None)
        starting.cancel()
        process = launcher._process
        assert process is not None
        await process.end(30)

    async def test_a_comma_in_the_path(self) -> None:
        """QEMU's options are no obstacle to it."""
        self.state = self.state / "a,b=c"
        self.state.mkdir()
        launcher = self.launcher()
        await launcher.start()
        await self.quit(launcher)

    def test_too_long_a_path(self) -> None:
        """A unix socket's path has a limit, and the error says what to do."""
        self.state = self.state / ("x" * 100)
        error = self.assertRaises(GuestError, self.launcher, ["qemu"])
        self.assertIn("shorter state-dir", str(error))
