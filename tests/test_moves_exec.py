"""Guests moved through programs: ``exec:`` at the source, ``qmigctl connect`` at the far end."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from tests.rig import ssh
from tests.rig.certificates import Authority
from tests.rig.daemons import free_ports
from tests.rig.news import ask_until, wait_until
from tests.rig.pair import NAME, SLOW, Pair, PairCase
from tests.rig.process import Process, temporary_directory
from tests.rig.processes import processes_with
from tests.rig.qmp import QmpError

_QMIGCTL = os.path.join(os.path.dirname(sys.executable), "qmigctl")


class ExecCase(PairCase):
    """A destination that listens on a unix socket only."""

    def exec_pair(self, *labels: str, **options: Any) -> Pair:
        self.directory = Path(temporary_directory())
        self.addCleanup(shutil.rmtree, self.directory)
        self.peer = self.directory / "peer"
        there = {"listen": [f"unix:{self.peer}"], **options.pop("there", {})}
        return self.pair(*labels, there=there, **options).start()

    @property
    def far_end(self) -> list[str]:
        return [_QMIGCTL, "connect", str(self.peer)]

    @property
    def uri(self) -> str:
        return f"exec:{shlex.join(self.far_end)}"

    def nothing_left(self, word: str = "") -> None:
        """Check that no program is left of those that were run."""
        self.assertEqual(processes_with(word or str(self.directory)), {})


class PathTests(ExecCase):
    """Each path that programs can carry, with each QEMU."""

    def check(self, pair: Pair, path: str, mode: str, **more: Any) -> dict[str, Any]:
        entry = pair.move(path, mode, uri=self.uri, **more)
        pair.prove_moved()
        self.nothing_left()
        return entry["plan"]

    def test_handover(self) -> None:
        """QEMU 7.2 takes its end of a pair of unix sockets, and gives it up for postcopy."""
        self.check(self.exec_pair("7.2", "10.0"), "handover", "postcopy")

    def test_handover_newer(self) -> None:
        """So do QEMU 10.0 and 11."""
        self.check(self.exec_pair("10.0", "11"), "handover", "precopy")

    def test_handover_newest(self) -> None:
        """And in postcopy."""
        self.check(self.exec_pair("11"), "handover", "postcopy")

    def test_relay(self) -> None:
        """A program for each of several channels; why not another path is said."""
        pair = self.exec_pair("10.0", policy={"prefer": ["multifd"]})
        asked = pair.here.execute("query-features", guest=NAME, uri=self.uri)
        self.assertEqual((asked["path"], asked["peer"]), ("relay", self.uri))
        self.assertIn("not direct: a program carries the connections", asked["path-reason"])
        self.nothing_left()
        plan = self.check(pair, "relay", "multifd")
        self.assertGreater(len(plan["channels"]), 2)

    def test_baseline(self) -> None:
        """With no feature the program of the control connection carries the stream."""
        self.check(self.exec_pair("7.2"), "baseline", "precopy")

    def test_in_band(self) -> None:
        """The handshake's other form goes through programs as well."""
        pair = self.exec_pair("7.2")
        pair.there.config["daemon"]["listen"] = [f"in-band:unix:{self.peer}"]
        pair.there.restart()
        pair.move("relay", "multifd", uri=f"in-band:{self.uri}")
        pair.prove_moved()
        self.nothing_left()

    def test_tls(self) -> None:
        """TLS goes through programs as through anything else, for the name that was given."""
        authority = Authority(self.mktemp())
        pair = self.exec_pair("7.2")
        for daemon, name in ((pair.here, "hosta.example"), (pair.there, "hostb.example")):
            daemon.config["tls"] = authority.host(name).table()
            daemon.restart()
        entry = pair.move("relay", uri=self.uri, tls_hostname="hostb.example")
        self.assertIn("tls", entry["plan"]["features"])
        self.assertIn("it goes over tcp only", _reason(entry, "zero-copy-send"))
        self.nothing_left()


def _reason(entry: dict[str, Any], feature: str) -> str:
    return next(
        str(left["reason"]) for left in entry["plan"]["left-out"] if left["name"] == feature
    )


class SshTests(ExecCase):
    """The real thing: every channel through ssh, and nothing else."""

    def server(self, restricted: str = "") -> ssh.Ssh:
        """Start a server; it logs who logs in.

        :param restricted: the only command that it carries out.
        """
        ssh.require()
        directory = Path(self.mktemp()).absolute()
        directory.mkdir()
        prepared = ssh.prepare(directory)
        self.client = str(directory / "client")
        if restricted:
            authorized = directory / "authorized"
            authorized.write_text(f'restrict,command="{restricted}" {authorized.read_text()}')
        self.log = directory / "log"
        argv = [*prepared.server, "-o", "LogLevel=INFO"]
        server = Process.start(argv, log=str(self.log))
        self.addCleanup(server.close)
        wait_until(lambda: "Server listening" in self.said(), self.said)
        return prepared

    def said(self) -> str:
        """Return what the server has logged."""
        return self.log.read_text() if self.log.exists() else ""

    def move(self, pair: Pair, path: str, mode: str, **how: Any) -> tuple[int, dict[str, Any]]:
        """Move a guest; returns how often somebody has logged in, and the plan."""
        entry = pair.move(path, mode, **how)
        pair.prove_moved()
        self.nothing_left()
        self.nothing_left(self.client)
        return self.said().count("Accepted publickey"), entry["plan"]

    def test_one_handshake(self) -> None:
        """With ControlMaster there is one handshake of ssh's, however many channels there are."""
        pair = self.exec_pair("10.0")
        argv = self.shared()
        logins, plan = self.move(pair, "relay", "multifd", uri="exec:", argv=argv)
        self.assertGreater(len(plan["channels"]), 2)
        self.assertEqual(logins, 1)

    def shared(self) -> list[str]:
        """Start a server; returns the program that has one connection with it for all."""
        control = f"{temporary_directory()}/%C"
        # Which fails where something is left in there.
        self.addCleanup(os.rmdir, os.path.dirname(control))
        shared = ("-o", "ControlMaster=auto", "-o", f"ControlPath={control}")
        return [*self.server().client, *shared, ssh.HOST, *self.far_end]

    def test_killed(self) -> None:
        """The connection is that of the control connection's program: nobody ends that early.

        The source's daemon is killed in postcopy, and back again; the QEMUs get to the end.
        """
        pair = self.exec_pair("10.0")
        slow = {"max-postcopy-bandwidth": 1 << 20}
        how: dict[str, Any] = {"uri": "exec:", "argv": self.shared(), "tunables": slow}
        pair.begin("handover", "postcopy", bandwidth=SLOW, **how)
        pair.postcopy()
        pair.wait(pair.here, "postcopy-active")
        pair.destination.wait_running()
        pair.here.kill()
        pair.here.start()
        wait_until(lambda: "put back when that has ended" in pair.here.log, lambda: pair.here.log)
        pair.source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
        pair.source.wait_migration("completed")
        self.assertEqual(pair.ended(pair.there)["status"], "completed")
        pair.wait_settings(pair.source)
        ask_until(lambda: not processes_with(self.client), "the programs to end")
        pair.prove_moved()

    def test_restricted(self) -> None:
        """Without it there is one for each connection; the key may be good for this alone."""
        pair = self.exec_pair("10.0")
        server = self.server(restricted=shlex.join(self.far_end))
        uri = f"exec:{shlex.join([*server.client, ssh.HOST])}"
        logins, plan = self.move(pair, "relay", "multifd", uri=uri)
        self.assertEqual(logins, 1 + len(plan["channels"]))

    def test_forwarded(self) -> None:
        """Ssh may go on to a port by itself, which does not make the port the QEMUs'."""
        there = {"listen": [f"tcp:127.0.0.1:{free_ports()[0]}"]}
        pair = self.exec_pair("7.2", there=there, policy={"prefer": ["multifd"]})
        to = pair.there.uri.removeprefix("tcp:")
        uri = f"exec:{shlex.join([*self.server().client, '-W', to, ssh.HOST])}"
        asked = pair.here.execute("query-features", guest=NAME, uri=uri)
        self.assertIn("not direct: a program carries", asked["path-reason"])
        self.move(pair, "handover", "precopy", uri=uri)


class FailureTests(ExecCase):
    """Programs that fail: the guest goes on at the source, and the error says what they said."""

    def check(self, pair: Pair, uri: str, *said: str, **arguments: Any) -> str:
        pair.begin("relay", uri=uri, **arguments)
        error = pair.failed(pair.here)
        for words in said:
            self.assertIn(words, error)
        pair.prove_stayed()
        return error

    def test_cannot_be_used(self) -> None:
        """One that is not there, fails with words or without, or ends; then the right one."""
        pair = self.exec_pair("7.2")
        missing = "the program '/no/such' cannot be started: No such file or directory"
        self.check(pair, "exec:", missing, argv=["/no/such", "hostb"])
        script = "echo Unknown host hostb >&2; echo Giving up >&2; exit 255"
        self.check(
            pair,
            f"exec:{script}",
            f"'{script}' ended with exit code 255: Unknown host hostb | Giving up",
        )
        self.assertIn(": Unknown host hostb\n", pair.here.log)
        self.check(pair, "exec:kill -9 $$", "ended with signal 9: it said nothing")
        self.check(pair, "exec:true", "'true' ended with exit code 0: it said nothing")
        self.check(pair, "exec:echo SSH-2.0-OpenSSH", "b'SSH-2.0-Open' came")
        nowhere = f"{_QMIGCTL} connect /nowhere"
        self.check(pair, f"exec:{nowhere}", "ended with exit code 3: qmigctl: There is no socket")
        pair.move("relay", uri=self.uri)
        pair.prove_moved()

    def test_silent(self) -> None:
        """One that carries nothing is ended at the deadline, with all that it has started."""
        pair = self.exec_pair("7.2", here={"handshake-deadline": 0.5})
        word = f"98765.{os.getpid()}"
        script = f"echo Waiting >&2; trap '' TERM; sleep {word} & sleep {word}; sleep {word}"
        error = self.check(pair, f"exec:{script}", "has not greeted within 0.5 seconds")
        self.assertIn("says: Waiting", error)
        self.nothing_left(word)

    def test_killed(self) -> None:
        """One that is killed in the middle of a move."""
        pair = self.exec_pair("10.0")
        pair.begin("relay", "multifd", uri=self.uri, bandwidth=SLOW)
        pair.wait_pass(1)
        for process in processes_with(str(self.peer)):
            os.kill(process, signal.SIGKILL)
        self.assertIn("ended with signal 9", pair.failed(pair.here))
        pair.prove_stayed()
        self.nothing_left(str(self.peer))

    def test_cancelled(self) -> None:
        """A move that is cancelled leaves none."""
        pair = self.exec_pair("7.2")
        pair.begin("relay", uri=self.uri, bandwidth=SLOW)
        pair.wait_pass(1)
        pair.cancel()
        self.assertEqual(pair.ended(pair.here)["status"], "cancelled")
        self.nothing_left(str(self.peer))
        pair.prove_stayed()

    def test_stopped(self) -> None:
        """A daemon that is stopped, or was killed and is back, leaves none; the guest goes on."""
        word = f"98769.{os.getpid()}"
        for end in ("stop", "kill"):
            pair = self.exec_pair("7.2")
            # It does not care for the end of its input, nor for SIGTERM.
            script = f"trap '' TERM; {shlex.join(self.far_end)}; sleep {word}; :"
            pair.begin("relay", uri=f"exec:{script}", bandwidth=SLOW)
            pair.wait_pass(1)
            getattr(pair.here, end)()
            self.assertEqual(end == "kill", bool(processes_with(word)))
            pair.here.start()
            ask_until(lambda: not processes_with(word), "the programs to end")
            pair.source.wait_running()
            pair.source.check_ram()
            pair.wait_settings(pair.source)

    def test_handed_over(self) -> None:
        """A program whose connection is QEMU's goes on without the daemon, as QEMU does."""
        pair = self.exec_pair("7.2")
        pair.begin("baseline", uri=self.uri, bandwidth=SLOW)
        pair.wait_pass(1)
        pair.here.stop()
        self.assertTrue(processes_with(str(self.peer)))
        pair.source.qmp("migrate-set-parameters", {"max-bandwidth": 1 << 30})
        wait_until(pair.destination.running, "the guest to arrive")
        ask_until(lambda: not processes_with(str(self.peer)), "the program to end")
        pair.destination.check_ram()


class GivenUpTests(ExecCase):
    """Postcopy whose program does not carry anything any more, and that the user gives up."""

    def test_goes_on(self) -> None:
        """It is left to the QEMUs, with the program: should that go on, they get to the end."""
        deadlines = {"peer_deadline": 1.0, "guest_deadline": 1.0}
        pair = self.exec_pair("10.0", here=deadlines, there=deadlines)
        slow = {"max-postcopy-bandwidth": 1 << 20}
        how: dict[str, Any] = {"uri": "exec:", "argv": self.far_end, "tunables": slow}
        pair.begin("handover", "postcopy", bandwidth=SLOW, **how)
        pair.postcopy()
        pair.wait(pair.here, "postcopy-active")
        pair.destination.wait_running()
        both = list(processes_with(str(self.peer)))
        self.assertEqual(len(both), 2)
        for process in both:
            os.kill(process, signal.SIGSTOP)
        with self.assertRaises(QmpError) as refused:
            pair.cancel()
        self.assertIn("too late", refused.exception.text)
        ask_until(
            lambda: "'migrate-cancel' gives it up" in pair.entry(pair.here)["step"],
            lambda: f"the stall to be told: {pair.entry(pair.here)}",
        )
        pair.cancel()
        self.assertIn("the user has given it up", pair.failed(pair.here))
        # Both are there, since the one may go through the other.
        self.assertEqual(list(processes_with(str(self.peer))), both)
        for process in both:
            os.kill(process, signal.SIGCONT)
        pair.source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
        pair.source.wait_migration("completed")
        self.assertEqual(pair.ended(pair.there)["status"], "completed")
        pair.wait_settings(pair.source)
        ask_until(lambda: not processes_with(str(self.peer)), "the programs to end")
        pair.prove_moved()


class DoorTests(ExecCase):
    """The unix socket of a destination."""

    def test_group(self) -> None:
        """It is the daemon's user's, and a group's where one is named."""
        pair = self.exec_pair("7.2", there={"listen-group": "daemon"})
        status = self.peer.stat()
        self.assertEqual((status.st_mode & 0o777, status.st_gid), (0o660, 1))
        del pair.there.config["daemon"]["listen-group"]
        pair.there.restart()
        self.assertEqual(self.peer.stat().st_mode & 0o777, 0o600)

    def test_left_behind(self) -> None:
        """What a daemon that was killed has left is no obstacle to the next one."""
        pair = self.exec_pair("7.2")
        pair.there.kill()
        self.assertTrue(self.peer.is_socket())
        pair.there.start()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.peer))
            self.assertTrue(sock.recv(12).startswith(b"QEMU-MIGRATE"))


class ReleasedTests(ExecCase):
    """The source has let the guest go, and has to find out what became of it."""

    def released(self) -> Pair:
        """Bring a move there; the destination's daemon is asleep, and has not heard it yet."""
        pair = self.exec_pair("10.0")
        pair.begin("handover", uri=self.uri, bandwidth=SLOW)
        for daemon in (pair.here, pair.there):
            pair.wait(daemon, "active")
        pair.there.process.signal(signal.SIGSTOP)
        pair.set(max_bandwidth=1 << 30)
        pair.source.wait_migration("completed")
        ask_until(lambda: pair.entry(pair.here)["owner"] == "destination", "RELEASE to be sent")
        return pair

    def test_program(self) -> None:
        """The control connection's program is killed: another one asks.

        RELEASE may have been in the hands of the one that was killed; the answer tells.
        """
        pair = self.released()
        for process in processes_with(str(self.peer)):
            os.kill(process, signal.SIGKILL)
        pair.there.process.signal(signal.SIGCONT)
        if pair.ended(pair.here)["status"] == "completed":
            pair.prove_moved()
        else:
            pair.failed(pair.there)
            pair.prove_stayed()
        self.nothing_left()

    def test_daemon(self) -> None:
        """The source's daemon is killed: back again, it asks through the same program."""
        pair = self.released()
        pair.here.kill()
        pair.here.start()
        pair.there.process.signal(signal.SIGCONT)
        # On a unix socket the destination may notice the end before it has read RELEASE.
        if pair.ended(pair.there)["status"] == "completed":
            pair.wait_settings(pair.source)
            pair.prove_moved()
        else:
            pair.source.wait_running()
            pair.wait_settings(pair.source)
            pair.prove_stayed()
        ask_until(lambda: not processes_with(str(self.peer)), "the programs to end")
