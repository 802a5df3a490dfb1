"""What breaks in the middle of a move: in each phase of precopy, and on each path.

The faults: the source's qmigd killed, the destination's qmigd killed, the destination's
QEMU killed, the network cut, and the user's cancel.  Whichever it is, and whenever it
comes: the guest runs on exactly one side, its RAM is right, its QEMU is set as it was
before, and a second try, with a fresh QEMU at the destination, succeeds.

Moves are so slow here that they do not end by themselves; phases are met by events.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.rig.daemons import Daemon, DaemonDied
from tests.rig.netns import Link
from tests.rig.news import ask_until, wait_until
from tests.rig.pair import NAME, SLOW, Pair, PairCase, start
from tests.rig.proofs import only_one_runs
from tests.rig.qmp import QmpError

#: Seconds after which a peer that is not heard of is lost, where that is waited for.
_SOON: Mapping[str, Any] = {
    "peer_deadline": 2.0,
    "handshake_deadline": 2.0,
    "guest_deadline": 2.0,
}

SOURCE_QMIGD = "source's qmigd killed"
DESTINATION_QMIGD = "destination's qmigd killed"
DESTINATION_QEMU = "destination's QEMU killed"
CUT = "network cut"
CANCEL = "cancel"


class FaultCase(PairCase):
    """How a fault is made, and what has to be true after it."""

    link_: Link | None = None

    def ready(self, source: str, destination: str, *, link: bool = False) -> Pair:
        """Start a pair whose guests are registered at run time.

        :param link: they stand on two hosts, with a network between them that can be cut.
        """
        options: dict[str, Any] = {}
        if link:
            self.link_ = self.link()
            options = {"link": self.link_, "here": _SOON, "there": _SOON}
        pair = self.pair(source, destination, **options)
        return pair.start_registering()

    def make(self, fault: str, pair: Pair) -> None:
        """Make it happen."""
        if fault == SOURCE_QMIGD:
            pair.here.kill()
        elif fault == DESTINATION_QMIGD:
            pair.there.kill()
        elif fault == DESTINATION_QEMU:
            pair.destination.kill()
        elif fault == CANCEL:
            pair.cancel()
        else:
            assert self.link_ is not None
            self.link_.cut()

    def after(self, fault: str, pair: Pair, *, told: bool = True) -> None:
        """Wait until everybody has noticed, and bring back what was killed or cut.

        :param told: the two daemons can still talk when the user cancels.
        """
        if fault == SOURCE_QMIGD:
            pair.failed(pair.there)
            pair.here.restart()
        else:
            self.assertTrue(pair.failed(pair.here))
            wanted = "cancelled" if fault == CANCEL else "failed"
            self.assertEqual(pair.entry(pair.here)["status"], wanted)
        if fault == DESTINATION_QMIGD:
            pair.there.restart()
        elif fault != SOURCE_QMIGD:
            pair.failed(pair.there)
        if fault == CANCEL and told:
            self.assertEqual(pair.entry(pair.there)["status"], "cancelled")
        if fault == CUT and self.link_ is not None:
            self.link_.restore()

    def released(self, path: str, source: str, destination: str, *, link: bool = False) -> Pair:
        """Move to where the source lets go; the destination's daemon sleeps, and has not heard."""
        pair = self.ready(source, destination, link=link)
        pair.begin(path, bandwidth=SLOW)
        pair.wait(pair.here, "active")
        pair.wait(pair.there, "active")
        pair.there.process.signal(signal.SIGSTOP)
        pair.set(max_bandwidth=1 << 30)
        pair.source.wait_migration("completed")
        ask_until(lambda: pair.entry(pair.here)["owner"] == "destination", "RELEASE to be sent")
        # That answer and RELEASE leave in one turn of the reactor, in whatever order.
        pair.entry(pair.here)
        self.assertEqual(pair.destination.status(), "paused")
        return pair

    def while_active(
        self, fault: str, path: str, source: str, destination: str, mode: str = "precopy"
    ) -> None:
        """It comes while RAM is being moved: the guest stays, and moves at the second try."""
        pair = self.ready(source, destination, link=fault == CUT)
        pair.begin(path, mode, bandwidth=SLOW)
        pair.wait(pair.here, "active")
        pair.wait(pair.there, "active")
        if fault == CANCEL:
            error = self.assertRaises(QmpError, pair.there.execute, "migrate-cancel", guest=NAME)
            self.assertIn("is on its way here", error.text)
        self.make(fault, pair)
        self.after(fault, pair, told=path != "baseline")
        self.stays(pair, path)

    def stays(self, pair: Pair, path: str) -> None:
        """The guest is still the source's, and moves at the second try."""
        pair.wait_settings(pair.source)
        pair.prove_stayed()
        self.try_again(pair, path, link=self.link_)


class Gate:
    """Stands between the two daemons, and keeps back what the destination says after its Greeting.

    :ivar uri: where the source is to go.
    """

    def __init__(self, there: Daemon) -> None:
        _, host, port = there.uri.split(":")
        self._peer = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            source = self._listener.accept()[0]
            destination = socket.create_connection(self._peer)
            self._sockets += [source, destination]
            source.sendall(destination.recv(4096))  # the Greeting comes in one piece
            while data := source.recv(4096):
                destination.sendall(data)
            destination.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Hang up on both."""
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


class NegotiatingTests(FaultCase):
    """While the two daemons negotiate: both have begun, and neither has finished."""

    def check(self, fault: str) -> None:
        pair = self.ready("7.2", "10.0")
        gate = Gate(pair.there)
        self.addCleanup(gate.close)
        pair.begin("direct", uri=gate.uri)
        pair.wait(pair.there, "setup")
        self.make(fault, pair)
        if fault in (DESTINATION_QMIGD, DESTINATION_QEMU):
            gate.close()
        self.after(fault, pair)
        if fault == DESTINATION_QEMU:
            self.stays(pair, "direct")
        else:
            self.untouched(pair)

    def untouched(self, pair: Pair) -> None:
        """The QEMU that waits is as good as fresh, and takes the guest in at the second try."""
        pair.wait_settings(pair.destination)
        self.assertEqual(pair.destination.status(), "inmigrate")
        self.assertEqual(pair.destination.migration(), "none")
        pair.prove_stayed()
        self.register(pair.here, pair.source)
        self.register(pair.there, pair.destination)
        pair.move("direct")
        pair.prove_moved()

    def test_source_qmigd(self) -> None:
        """The source's qmigd is killed."""
        self.check(SOURCE_QMIGD)

    def test_destination_qmigd(self) -> None:
        """The destination's qmigd is killed."""
        self.check(DESTINATION_QMIGD)

    def test_destination_qemu(self) -> None:
        """The destination's QEMU is killed."""
        self.check(DESTINATION_QEMU)

    def test_cut(self) -> None:
        """The network is cut while the destination waits for its QEMU's answers."""
        pair = self.ready("7.2", "10.0", link=True)
        pair.destination.process.signal(signal.SIGSTOP)
        pair.begin("direct")
        self.make(CUT, pair)
        self.assertTrue(pair.failed(pair.here))
        pair.destination.process.signal(signal.SIGCONT)
        assert self.link_ is not None
        self.link_.restore()
        self.untouched(pair)

    def test_cancel(self) -> None:
        """The user cancels."""
        self.check(CANCEL)


class SetupTests(FaultCase):
    """As soon as the source's QEMU has begun."""

    def check(
        self, fault: str, path: str, source: str, destination: str, mode: str = "precopy"
    ) -> None:
        pair = self.ready(source, destination, link=fault == CUT)
        pair.begin(path, mode, bandwidth=SLOW)
        pair.source.monitor.wait_event("MIGRATION", where=lambda data: data["status"] == "setup")
        self.make(fault, pair)
        self.after(fault, pair)
        if fault == CUT:
            # It may have hung in a connection that was cut, deaf to what qmigd told it then.
            wait_until(lambda: not pair.destination.alive, "the destination's QEMU to be ended")
        self.stays(pair, path)

    def test_source_qmigd(self) -> None:
        """The source's qmigd is killed."""
        self.check(SOURCE_QMIGD, "relay", "7.2", "7.2")

    def test_destination_qmigd(self) -> None:
        """The destination's qmigd is killed."""
        self.check(DESTINATION_QMIGD, "handover", "10.0", "7.2")

    def test_destination_qemu(self) -> None:
        """The destination's QEMU is killed."""
        self.check(DESTINATION_QEMU, "baseline", "7.2", "11")

    def test_cut(self) -> None:
        """The network is cut, with channels on their way; they come through when it is back."""
        self.check(CUT, "direct", "11", "11", "multifd-postcopy")

    def test_cut_relay(self) -> None:
        """The same with a channel that QEMU does not wait for, and would not outlive."""
        self.check(CUT, "relay", "11", "11", "preempt")

    def test_cancel(self) -> None:
        """The user cancels."""
        self.check(CANCEL, "relay", "10.0", "10.0", "preempt")


class SilenceTests(FaultCase):
    """The source's QEMU calls the destination's, and a firewall swallows the answers.

    It goes on calling although it was told to cancel, until the kernel gives up; here, until
    the firewall lets it hear that nobody is there any more.
    """

    def check(self, version: str, *, cancel: bool) -> None:
        pair = self.ready(version, version, link=True)
        assert self.link_ is not None
        ports = pair.there.config["daemon"]["direct-ports"]
        self.link_.drop_answers(ports)
        pair.begin("direct")
        if cancel:
            pair.source.wait_migration("setup")
            pair.cancel()
        reason = pair.failed(pair.here)
        self.assertIn("cancelled" if cancel else "--exclude direct", reason)
        self.assertIn("goes on waiting for it", pair.entry(pair.here)["step"])
        pair.failed(pair.there)
        self.link_.let_answers_in(ports)
        pair.wait_settings(pair.source)
        pair.prove_stayed()
        self.try_again(pair, "handover", link=self.link_)

    def test_cancelled_at_once(self) -> None:
        """QEMU 10.0 says that it has cancelled, and then does not begin another migration."""
        self.check("10.0", cancel=True)

    def test_cancelling(self) -> None:
        """QEMU 11, like 7.2, does not let its settings be changed before it is done."""
        self.check("11", cancel=False)


class ActiveTests(FaultCase):
    """While RAM is being moved, and the guest dirties it."""

    def test_source_qmigd_handover(self) -> None:
        """The source's qmigd is killed, which was out of the way of the bytes."""
        self.while_active(SOURCE_QMIGD, "handover", "7.2", "10.0")

    def test_source_qmigd_direct(self) -> None:
        """The same, between the QEMUs."""
        self.while_active(SOURCE_QMIGD, "direct", "11", "11")

    def test_source_qmigd_relay(self) -> None:
        """The source's qmigd is killed, and its relay with it."""
        self.while_active(SOURCE_QMIGD, "relay", "10.0", "7.2")

    def test_destination_qmigd_handover(self) -> None:
        """The destination's qmigd is killed, which was out of the way of the bytes."""
        self.while_active(DESTINATION_QMIGD, "handover", "11", "11")

    def test_destination_qmigd_direct(self) -> None:
        """The same, between the QEMUs."""
        self.while_active(DESTINATION_QMIGD, "direct", "7.2", "7.2")

    def test_destination_qmigd_relay(self) -> None:
        """The destination's qmigd is killed, and its relay with it."""
        self.while_active(DESTINATION_QMIGD, "relay", "7.2", "10.0")

    def test_destination_qemu_baseline(self) -> None:
        """The destination's QEMU is killed."""
        self.while_active(DESTINATION_QEMU, "baseline", "10.0", "10.0")

    def test_destination_qemu_handover(self) -> None:
        """The same on a socket that was handed over."""
        self.while_active(DESTINATION_QEMU, "handover", "7.2", "7.2")

    def test_destination_qemu_direct(self) -> None:
        """The same between the QEMUs."""
        self.while_active(DESTINATION_QEMU, "direct", "10.0", "11")

    def test_destination_qemu_relay(self) -> None:
        """The same behind the relays."""
        self.while_active(DESTINATION_QEMU, "relay", "11", "10.0")

    def test_cut_handover(self) -> None:
        """The network is cut under a socket that was handed over."""
        self.while_active(CUT, "handover", "10.0", "10.0")

    def test_cut_direct(self) -> None:
        """The same between the QEMUs."""
        self.while_active(CUT, "direct", "7.2", "7.2")

    def test_cut_relay(self) -> None:
        """The same between the relays."""
        self.while_active(CUT, "relay", "11", "11")

    def test_cancel_baseline(self) -> None:
        """The user cancels."""
        self.while_active(CANCEL, "baseline", "11", "11")

    def test_cancel_handover(self) -> None:
        """The same on a socket that was handed over."""
        self.while_active(CANCEL, "handover", "7.2", "7.2")

    def test_cancel_direct(self) -> None:
        """The same between the QEMUs."""
        self.while_active(CANCEL, "direct", "10.0", "10.0")

    def test_cancel_relay(self) -> None:
        """The same between the relays."""
        self.while_active(CANCEL, "relay", "7.2", "11")


class BaselineTests(FaultCase):
    """With no feature QEMU's stream does not need the daemons once it flows."""

    def test_source_qmigd(self) -> None:
        """The source's qmigd is killed: once it is back, it ends what it cannot watch over."""
        pair = self.ready("7.2", "10.0")
        pair.begin("baseline", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        pair.here.kill()
        pair.here.restart()
        pair.failed(pair.there)
        self.stays(pair, "baseline")

    def test_source_qmigd_at_the_end(self) -> None:
        """It is killed, and the guest has gone when it is back: it stays where it is now."""
        pair = self.ready("10.0", "7.2")
        pair.begin("baseline", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        pair.here.kill()
        pair.source.qmp("migrate-set-parameters", max_bandwidth=1 << 30)
        pair.source.wait_migration("completed")
        pair.here.restart()
        pair.wait_settings(pair.source)
        pair.prove_moved()

    def test_destination_qmigd(self) -> None:
        """The destination's qmigd is killed and comes back: the guest arrives all the same."""
        pair = self.ready("7.2", "7.2")
        pair.begin("baseline", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        # The source's stream may flow before the destination's QEMU has been given it.
        pair.destination.wait_migration("active")
        pair.there.kill()
        pair.there.launch()
        pair.set(max_bandwidth=1 << 30)
        self.assertEqual(pair.ended(pair.here)["status"], "completed")
        pair.destination.wait_running()
        pair.wait_settings(pair.destination)
        pair.prove_moved()

    def test_cut(self) -> None:
        """The network is cut: the source gives up what does not move any more."""
        pair = self.ready("10.0", "10.0", link=True)
        pair.begin("baseline", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        pair.wait(pair.there, "active")
        self.make(CUT, pair)
        self.assertIn("nothing has moved", pair.failed(pair.here))
        only_one_runs(pair.source, pair.destination)
        assert self.link_ is not None
        self.link_.restore()
        # Its QEMU cannot know that nothing will come any more; another one can be used.
        pair.destination.kill()
        pair.failed(pair.there)
        self.stays(pair, "baseline")


class BeforeReleaseTests(FaultCase):
    """QEMU has sent everything, and the source has not said yet that it lets the guest go."""

    def check(self, fault: str, path: str, source: str, destination: str) -> None:
        pair = self.ready(source, destination, link=fault == CUT)
        pair.begin(path, bandwidth=SLOW)
        pair.wait(pair.here, "active")
        # The source's daemon sleeps while its QEMU finishes.
        pair.here.process.signal(signal.SIGSTOP)
        pair.source.qmp("migrate-set-parameters", max_bandwidth=1 << 30)
        pair.source.wait_migration("completed")
        pair.destination.wait_migration("completed")
        self.assertEqual(pair.destination.status(), "paused")
        self.make(fault, pair)
        if fault in (CUT, DESTINATION_QEMU):
            pair.failed(pair.there)
            if self.link_ is not None:
                self.link_.restore()
        pair.here.process.signal(signal.SIGCONT)
        self.after(fault, pair)
        self.stays(pair, path)

    def test_source_qmigd(self) -> None:
        """The source's qmigd is killed: it was still its guest, and is."""
        self.check(SOURCE_QMIGD, "direct", "7.2", "7.2")

    def test_destination_qmigd(self) -> None:
        """The destination's qmigd is killed."""
        self.check(DESTINATION_QMIGD, "handover", "10.0", "10.0")

    def test_destination_qemu(self) -> None:
        """The destination's QEMU is killed."""
        self.check(DESTINATION_QEMU, "direct", "11", "11")

    def test_cut(self) -> None:
        """The network is cut."""
        self.check(CUT, "handover", "7.2", "11")


class ReleasedTests(FaultCase):
    """The source has let the guest go, and the destination has not heard it yet."""

    def test_source_qmigd(self) -> None:
        """The source's qmigd is killed: the guest runs at the destination."""
        pair = self.released("direct", "10.0", "10.0")
        pair.here.kill()
        pair.there.process.signal(signal.SIGCONT)
        self.assertEqual(pair.ended(pair.there)["status"], "completed")
        pair.here.restart()
        pair.wait_settings(pair.source)
        pair.prove_moved()

    def test_source_qmigd_first(self) -> None:
        """The same where it is back before the destination has woken up."""
        pair = self.released("handover", "7.2", "10.0")
        pair.here.kill()
        pair.here.restart()
        pair.there.process.signal(signal.SIGCONT)
        self.assertEqual(pair.ended(pair.there)["status"], "completed")
        pair.wait_settings(pair.source)
        pair.prove_moved()

    def test_destination_qmigd(self) -> None:
        """The destination's qmigd is killed: back again, it says that the guest never ran there."""
        pair = self.released("direct", "7.2", "7.2")
        pair.there.kill()
        pair.there.restart()
        self.assertTrue(pair.failed(pair.here))
        self.stays(pair, "direct")

    def test_destination_qemu(self) -> None:
        """The destination's QEMU is killed before it could run: the guest is the source's again."""
        pair = self.released("handover", "11", "11")
        pair.destination.kill()
        pair.there.process.signal(signal.SIGCONT)
        self.assertTrue(pair.failed(pair.here))
        pair.failed(pair.there)
        self.stays(pair, "handover")

    def test_cut(self) -> None:
        """The network is cut for a while: the source finds out that the guest has arrived."""
        pair = self.released("direct", "10.0", "11", link=True)
        self.make(CUT, pair)
        pair.there.process.signal(signal.SIGCONT)
        pair.destination.wait_ticks(1)
        assert self.link_ is not None
        self.link_.restore()
        pair.completed()
        pair.prove_moved()

    def test_cancel(self) -> None:
        """The user's cancel comes too late, and is told so."""
        pair = self.released("direct", "7.2", "7.2")
        error = self.assertRaises(QmpError, pair.cancel)
        self.assertIn("too late", error.text)
        pair.there.process.signal(signal.SIGCONT)
        pair.completed()
        pair.prove_moved()


class LastMomentTests(FaultCase):
    """Faults that race with the end of the move: whoever wins, one of the two has the guest."""

    def check(self, fault: str, path: str, source: str, destination: str) -> None:
        pair = self.ready(source, destination)
        pair.begin(path, bandwidth=SLOW)
        pair.wait(pair.here, "active")
        seen = len(pair.source.monitor.events)
        pair.set(max_bandwidth=1 << 30)
        pair.source.monitor.wait_event("STOP", since=seen)
        self.make(fault, pair)
        if fault == SOURCE_QMIGD:
            pair.ended(pair.there)
            pair.here.restart()
        else:
            if fault == DESTINATION_QMIGD:
                pair.there.restart()
            pair.ended(pair.here)
        self.one_side(pair, path)

    def one_side(self, pair: Pair, path: str) -> None:
        """Find out who has it, and see that it is all right there."""
        if pair.source.running():
            self.stays(pair, path)
        else:
            self.assertEqual(pair.source.status(), "postmigrate")
            pair.destination.wait_running()
            pair.wait_settings(pair.source)
            pair.wait_settings(pair.destination)
            pair.prove_moved()

    def test_source_qmigd(self) -> None:
        """The source's qmigd and its relay are killed."""
        self.check(SOURCE_QMIGD, "relay", "7.2", "7.2")

    def test_destination_qmigd(self) -> None:
        """The destination's qmigd and its relay are killed."""
        self.check(DESTINATION_QMIGD, "relay", "10.0", "10.0")

    def test_destination_qemu(self) -> None:
        """The destination's QEMU is killed, at the latest when it has just begun to load."""
        pair = self.ready("11", "11")
        pair.begin("relay", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        pair.wait(pair.there, "active")
        # It cannot load what it was sent, so it cannot have run.
        pair.destination.process.signal(signal.SIGSTOP)
        seen = len(pair.source.monitor.events)
        # However much is left, and at the low bandwidth: an iteration that sends more than fits
        # on the way to a QEMU that stands still would never come to its end.
        pair.set(downtime_limit=2_000_000)
        pair.source.monitor.wait_event("STOP", since=seen)
        pair.destination.kill()
        self.assertTrue(pair.failed(pair.here))
        pair.failed(pair.there)
        self.stays(pair, "relay")


class JournalTests(FaultCase):
    def test_both_daemons(self) -> None:
        """When both daemons were killed and are back, the guest is where it was, free to move."""
        pair = self.ready("7.2", "10.0")
        pair.begin("relay", "multifd", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        for daemon in (pair.here, pair.there):
            daemon.kill()
        start(pair.here, pair.there)
        self.stays(pair, "relay")

    def test_nothing_left(self) -> None:
        """A move leaves nothing behind in the state directories, whatever way it ended."""
        pair = self.ready("7.2", "7.2")
        pair.begin("relay", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        pair.here.kill()
        pair.here.restart()
        pair.failed(pair.there)
        self.stays(pair, "relay")
        for daemon in (pair.here, pair.there):
            state = daemon.config["daemon"]["state-dir"]
            left = [name for _, names, files in os.walk(state) for name in (*names, *files)]
            self.assertEqual(sorted(left), ["lock", "migrations", "programs", "run"], daemon.name)

    def test_no_journal(self) -> None:
        """Where a daemon cannot put down how far a move is, there is none."""
        pair = self.ready("7.2", "7.2")
        for daemon in (pair.there, pair.here):
            journal = Path(daemon.config["daemon"]["state-dir"]) / "migrations"
            journal.rmdir()
            pair.begin("handover")
            self.assertIn("cannot put down how far", pair.failed(pair.here))
            journal.mkdir()
        self.stays(pair, "handover")

    def test_second_daemon(self) -> None:
        """A second daemon on the same state does not start, and leaves the first one's move be."""
        pair = self.ready("7.2", "7.2")
        pair.begin("relay", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        state = Path(pair.here.config["daemon"]["state-dir"])
        self.assertEqual(stat.S_IMODE(state.stat().st_mode), 0o700)
        sockets = sorted(state.glob("run/relay-*"))
        self.assertTrue(sockets)
        second = self.daemon("second")
        second.config["daemon"]["state-dir"] = str(state)
        error = self.assertRaises(DaemonDied, second.start)
        self.assertIn("another daemon uses the state directory", str(error))
        self.assertEqual(sorted(state.glob("run/relay-*")), sockets)
        pair.set(max_bandwidth=1 << 30)
        pair.completed()
        pair.prove_moved()
