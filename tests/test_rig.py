"""The rig itself: it would be no proof of anything if it could not tell right from wrong."""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.rig import debian, qemus
from tests.rig.bootsector import PAGE, Inconsistent, Program, Window, check, image
from tests.rig.case import RigCase
from tests.rig.daemons import DaemonDied, free_ports, to_toml
from tests.rig.guest import Guest
from tests.rig.netns import Namespace
from tests.rig.proofs import compare_ram, counted_without_a_gap, only_one_runs

_SMALL = Program(pages=3)
_WORDS = _SMALL.pages * PAGE // 4


def _window(generation: int, boundary: int, program: Program = _SMALL) -> bytearray:
    """Return a window as the guest leaves it, with the boundary before that word."""
    words: list[int] = []
    for number in range(program.pages):
        for pair in range(PAGE // 8):
            at = (number * PAGE + pair * 8) // 4
            words += [generation - (at >= boundary), program.start + number * PAGE]
    return bytearray(struct.pack(f"<{len(words)}I", *words))


class ImageTests(SynchronousTestCase):
    def test_floppy(self) -> None:
        """The image is a floppy disk that a BIOS takes for bootable."""
        disk = image(_SMALL)
        self.assertEqual(len(disk), 1440 * 1024)
        self.assertEqual(disk[510:512], b"\x55\xaa")
        self.assertEqual(set(disk[512:]), {0})

    def test_impossible_programs(self) -> None:
        """A window outside of RAM's upper part and an impossible pace are refused."""
        for wrong in (
            {"start": 0x8000},
            {"start": (4 << 20) + 1},
            {"pages": 0},
            {"ticks_per_second": 18},
            {"ticks_per_second": 1001},
        ):
            self.assertRaises(ValueError, Program, **wrong)


class CheckTests(SynchronousTestCase):
    @given(st.integers(2, 2**32 - 1), st.integers(1, _WORDS))
    def test_right(self, generation: int, boundary: int) -> None:
        """One generation up to any word, and the one before from there on, is consistent."""
        found = check(_window(generation, boundary), _SMALL)
        self.assertEqual(found.generation, generation)
        # The words in between do not change, so that a boundary can be at either.
        self.assertIn(found.boundary - _SMALL.start - boundary * 4, (0, 4))

    @given(
        st.integers(2, 2**32 - 1),
        st.integers(1, _WORDS),
        st.integers(1, _WORDS - 1),
        st.integers(1, 2**32 - 1),
    )
    def test_wrong_word(self, generation: int, boundary: int, at: int, change: int) -> None:
        """A single other word is found, unless it makes a boundary elsewhere."""
        window = _window(generation, boundary)
        word = int.from_bytes(window[at * 4 : at * 4 + 4], "little") ^ change
        window[at * 4 : at * 4 + 4] = word.to_bytes(4, "little")
        if any(window == _window(generation, other) for other in (at, at + 1, at + 2)):
            check(window, _SMALL)
        else:
            self.assertRaises(Inconsistent, check, window, _SMALL)

    def test_wrong_pages(self) -> None:
        """A page that is lost, from long ago, or another page's is found."""
        right = _window(7, _WORDS)
        old = _window(5, _WORDS)
        one, two = slice(PAGE, 2 * PAGE), slice(2 * PAGE, 3 * PAGE)
        for name, page in (("lost", bytes(PAGE)), ("old", old[one]), ("swapped", right[two])):
            wrong = bytearray(right)
            wrong[one] = page
            error = self.assertRaises(Inconsistent, check, wrong, _SMALL)
            self.assertIn(f"{_SMALL.start + PAGE:#x}", str(error), name)

    def test_two_boundaries(self) -> None:
        """A page of the generation before, in front of the boundary, is found."""
        window = _window(7, _WORDS)
        window[PAGE : 2 * PAGE] = _window(6, _WORDS)[PAGE : 2 * PAGE]
        self.assertRaises(Inconsistent, check, window, _SMALL)

    def test_nothing_there(self) -> None:
        """A window that no guest has written, or half of one, is not consistent."""
        self.assertRaises(Inconsistent, check, bytes(_WORDS * 4), _SMALL)
        self.assertRaises(Inconsistent, check, _window(2, _WORDS)[:PAGE], _SMALL)


class GuestTests(RigCase):
    def test_counts(self) -> None:
        """The guest boots, counts without a gap, and its RAM is as it says."""
        guest = self.guest(qemus.require("7.2")).start()
        guest.wait_ticks(20)
        counted_without_a_gap(guest)
        first = guest.check_ram()
        guest.wait_ticks(2)
        second = guest.check_ram()
        self.assertGreater((second.generation, second.boundary), (first.generation, first.boundary))

    def test_idle(self) -> None:
        """An idle guest has filled its window once, and counts."""
        program = Program(pages_per_tick=0)
        guest = self.guest(qemus.require("7.2"), program=program).start()
        guest.wait_ticks(2)
        self.assertEqual(guest.check_ram(), Window(1, program.end))

    def test_stopped(self) -> None:
        """A guest that is stopped says nothing more, and goes on afterwards."""
        guest = self.guest(qemus.require("7.2"), "stopped").start()
        other = self.guest(qemus.require("7.2"), "other").start()
        with guest.stopped():
            only_one_runs(other, guest)
        self.assertRaises(AssertionError, only_one_runs, other, guest)

    def test_doctored_ram(self) -> None:
        """One bit changed in a real dump is found."""
        guest = self.guest(qemus.require("7.2")).start()
        with guest.stopped():
            dump = bytearray(guest.window())
        check(dump, guest.program)
        dump[5 * PAGE + 17] ^= 1
        self.assertRaises(Inconsistent, check, dump, guest.program)

    def test_death(self) -> None:
        """A QEMU that was killed is gone for everybody who asks."""
        guest = self.guest(qemus.require("7.2")).start()
        guest.kill()
        self.assertEqual(guest.status(), "gone")
        self.assertFalse(guest.alive)


class MoveTests(RigCase):
    """A plain migration between two QEMUs, without qmigd: what a good one looks like here."""

    def move(self, label: str) -> tuple[Guest, Guest]:
        """Move a guest, and return the source and the destination, neither running."""
        qemu = qemus.require(label)
        source = self.guest(qemu, "source").start()
        uri = f"tcp:127.0.0.1:{free_ports()[0]}"
        destination = self.guest(qemu, "destination", incoming=uri, paused=True).start()
        for guest in (source, destination):
            guest.set_capabilities("events", "return-path")
        source.qmp("migrate", uri=uri)
        for guest in (source, destination):
            self.assertEqual(guest.wait_migration("completed", "failed"), "completed")
        return source, destination

    def check_move(self, label: str) -> None:
        """Check that RAM has arrived byte for byte, and that the guest goes on counting."""
        source, destination = self.move(label)
        compare_ram(source, destination)
        destination.qmp("cont")
        only_one_runs(destination, source)
        counted_without_a_gap(source, destination)
        destination.check_ram()

    def test_7_2(self) -> None:
        """QEMU 7.2 moves a guest whole."""
        self.check_move("7.2")

    def test_10_0(self) -> None:
        """QEMU 10.0 moves a guest whole."""
        self.check_move("10.0")

    def test_11(self) -> None:
        """QEMU 11.x moves a guest whole."""
        self.check_move("11")

    def test_differences_are_found(self) -> None:
        """After a move the guests are the same, and no longer so once one has run on."""
        source, destination = self.move("7.2")
        compare_ram(source, destination)
        destination.qmp("cont")
        destination.wait_ticks(1)
        destination.qmp("stop")
        self.assertRaises(Inconsistent, compare_ram, source, destination)


class KeeperTests(SynchronousTestCase):
    def test_killed(self) -> None:
        """When the process that uses the rig is killed, nothing of the rig's is left."""
        qemus.require("7.2")
        script = (
            "import os, signal\n"
            "from tests.rig import qemus\n"
            "from tests.rig.guest import Guest\n"
            "guest = Guest(qemus.find('7.2')).start()\n"
            "children = open(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read()\n"
            "print(guest.directory, children, flush=True)\n"
            "input()\n"
        )
        victim = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        assert victim.stdin is not None and victim.stdout is not None
        directory, *children = victim.stdout.readline().split()
        self.assertEqual(len(children), 2, "QEMU and the keeper")
        ends = [os.pidfd_open(int(child)) for child in children]
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
        for end in ends:
            self.assertTrue(select.select([end], [], [], 60)[0])
            os.close(end)
        self.assertFalse(os.path.exists(directory))


class PortTests(SynchronousTestCase):
    def test_two_processes(self) -> None:
        """Two processes that use the rig at the same time never get the same port."""
        script = (
            "from tests.rig.daemons import free_ports\n"
            "print(*[port for _ in range(300) for port in free_ports(9)])\n"
        )
        ours = {port for _ in range(300) for port in free_ports(9)}
        other = subprocess.run(
            [sys.executable, "-c", script],
            stdout=subprocess.PIPE,
            check=True,
            cwd=Path(__file__).parents[1],
        )
        theirs = set(map(int, other.stdout.split()))
        self.assertGreater(len(theirs), 9)
        self.assertEqual(ours & theirs, set())


class DebianTests(SynchronousTestCase):
    def test_outage(self) -> None:
        """When the package source does not answer, the reason says so."""
        scratch = Path(self.mktemp()).absolute()
        closed = f"http://127.0.0.1:{free_ports()[0]}/debian"
        error = self.assertRaises(
            debian.Unavailable, debian.fetch, ["busybox"], ["sid"], scratch, closed
        )
        self.assertIn("the package source failed", str(error))


class DaemonConfigTests(SynchronousTestCase):
    def test_toml(self) -> None:
        """What goes into a daemon's configuration comes out of TOML's own reader."""
        config = {
            "daemon": {"listen": ["tcp:[::1]:1", 'a "quoted" \\ path'], "insecure": True},
            "policy": {"prefer": [], "deadline": 2.5},
            "guest": {"web 1": {"qmp": "unix:/tmp/ü"}, "db.x": {"launch": ["qemu", "-m", "64"]}},
        }
        self.assertEqual(tomllib.loads(to_toml(config)), config)


class DaemonTests(RigCase):
    def test_life(self) -> None:
        """A daemon answers once it is started, is gone once it is killed, and can come back."""
        daemon = self.daemon().start()
        version = daemon.execute("query-version")
        daemon.kill()
        self.assertRaises(DaemonDied, daemon.execute, "query-version")
        daemon.restart()
        self.assertEqual(daemon.execute("query-version"), version)
        daemon.stop()
        self.assertFalse(daemon.process.running)

    def test_wrong_configuration(self) -> None:
        """A daemon that does not start says why in the failure."""
        error = self.assertRaises(DaemonDied, self.daemon(colour="blue").start)
        self.assertIn("colour", str(error))


class LinkTests(RigCase):
    def connect(self, here: Namespace, there: Namespace) -> str:
        """Try to connect to a port where nobody listens, and say what became of it."""
        script = (
            "import socket, sys\n"
            "s = socket.socket()\n"
            "s.settimeout(0.5)\n"
            "try: s.connect((sys.argv[1], 9))\n"
            "except OSError as error: print(type(error).__name__)\n"
        )
        return subprocess.run(
            [*here.prefix, sys.executable, "-I", "-c", script, there.address],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    def test_cut(self) -> None:
        """Through a whole link the peer's refusal comes back; through a cut one, nothing does."""
        link = self.link()
        self.assertEqual(self.connect(link.left, link.right), "ConnectionRefusedError")
        link.cut()
        self.assertEqual(self.connect(link.left, link.right), "TimeoutError")
        self.assertEqual(self.connect(link.right, link.left), "TimeoutError")
        link.restore()
        self.assertEqual(self.connect(link.right, link.left), "ConnectionRefusedError")
