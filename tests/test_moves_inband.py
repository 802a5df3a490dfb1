"""Whole moves with the handshake in its in-band form, and what QEMUs that do not know it do."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import struct
from typing import Any

from qmigd.wire.inband import OPENING, frame
from tests.rig.daemons import Daemon, free_ports
from tests.rig.news import ask_until, wait_until
from tests.rig.pair import PairCase, start
from tests.rig.proofs import counted_without_a_gap, only_one_runs
from tests.rig.proxy import Recorder
from tests.test_faults_postcopy import KilledCase, SplitBrainCase
from tests.test_faults_precopy import CANCEL, CUT, DESTINATION_QEMU, DESTINATION_QMIGD, FaultCase
from tests.test_moves_journeys import JourneyCase
from tests.test_moves_mptcp import MptcpCase, require_mptcp
from tests.test_moves_tls import RefusedCase, TlsCase
from tests.test_moves_zero_copy import ZeroCopyCase

#: How what a destination says begins: MIG_RP_MSG_FEATURES.
_ANSWER = b"FE"


class JourneyTests(JourneyCase):
    """The journeys of the first form, in this one."""

    in_band = True

    def test_baseline(self) -> None:
        """QEMU's stream follows on the control connection, bare and from its own beginning."""
        self.journey("baseline", "precopy", by=("7.2", "10.0"))

    def test_handover(self) -> None:
        """The channel that is handed over begins in-band, and is QEMU's from there."""
        self.journey("handover", "postcopy", by=("10.0", "10.0"))

    def test_direct(self) -> None:
        """Where the QEMUs connect to each other, it is the control connection alone."""
        self.journey("direct", "multifd", by=("11", "11"))

    def test_relay(self) -> None:
        """Every channel of a relay begins in-band."""
        self.journey("relay", "preempt", by=("7.2", "7.2"))


class FaultTests(FaultCase):
    """Faults of the first form, in this one."""

    in_band = True

    def test_asks(self) -> None:
        """The source's qmigd is killed behind RELEASE; the next one asks, in the same form."""
        pair = self.released("direct", "10.0", "10.0")
        pair.here.kill()
        pair.there.process.signal(signal.SIGCONT)
        self.assertEqual(pair.ended(pair.there)["status"], "completed")
        pair.here.restart()
        pair.wait_settings(pair.source)
        pair.prove_moved()
        self.assertIn("the guest is the destination's", pair.here.log)
        self.assertNotIn("no answer from", pair.here.log)

    def test_cancel(self) -> None:
        """The user cancels: the guest goes on where it is, and moves at the second try."""
        self.while_active(CANCEL, "direct", "11", "11")

    def test_cut(self) -> None:
        """The network is cut, and both sides miss the HEARTBEATs in their framing."""
        self.while_active(CUT, "relay", "10.0", "10.0", "multifd")

    def test_destination_qmigd(self) -> None:
        """The destination's qmigd is killed, with the other end of every framed connection."""
        self.while_active(DESTINATION_QMIGD, "relay", "7.2", "7.2", "preempt")

    def test_destination_qemu(self) -> None:
        """The destination's QEMU is killed, and its qmigd says so in its framing."""
        self.while_active(DESTINATION_QEMU, "handover", "11", "11", "postcopy")


class PostcopyFaultTests(KilledCase):
    """What breaks after the guest has been let go of."""

    in_band = True

    def test_source_qmigd(self) -> None:
        """The source's qmigd is killed, and the next one asks."""
        self.source_qmigd("handover", "7.2", "10.0")

    def test_destination_qmigd(self) -> None:
        """The destination's qmigd is killed, and the next one is asked."""
        self.destination_qmigd("handover", "10.0", "11")

    def test_relay(self) -> None:
        """With a relay the stream is lost as well."""
        self.relayed("11", source=False)


class SplitBrainTests(SplitBrainCase):
    """The connection breaks at the very end of postcopy."""

    in_band = True

    def test_relay(self) -> None:
        """The source does not run again."""
        self.under_qmigd("relay", "10.0")


class MptcpTests(MptcpCase):
    """Multipath TCP carries the framing, and what follows it."""

    in_band = True

    def setUp(self) -> None:
        require_mptcp()

    def test_relay(self) -> None:
        """Every channel of a relay is one."""
        self.move("7.2", path="relay", mode="multifd", least=4)


class RefusedInTlsTests(RefusedCase):
    """TLS that does not come about, within the framing."""

    in_band = True

    def test_foreign(self) -> None:
        """A source of another CA."""
        self.foreign()


class InTlsTests(TlsCase):
    """TLS, which goes inside the framing up to where payload begins."""

    in_band = True

    def test_relay(self) -> None:
        """All of it is in TLS but the two openings; every connection looks like QEMU's."""
        pair = self.secure_pair("7.2", "10.0").start()
        wire = Recorder(pair.there.uri)
        self.addCleanup(wire.close)
        plan = pair.move("relay", "multifd", uri=f"in-band:{wire.uri}")["plan"]
        pair.prove_moved()
        self.assertIn("tls", plan["features"])
        self.assertEqual(1 + len(plan["channels"]), len(wire.connections))
        for there, back in wire.connections:
            self.assertEqual(OPENING, there[: len(OPENING)])
            self.assertEqual(_ANSWER, back[:2])
            for readable in (b"QEMU-CHANNEL", b"ram-blocks", b"pc.ram"):
                self.assertNotIn(readable, there)
                self.assertNotIn(readable, back)

    def test_direct(self) -> None:
        """The QEMUs do it themselves; their certificates' names are agreed on in-band."""
        pair = self.secure_pair("10.0").start()
        plan = pair.move("direct", "multifd")["plan"]
        pair.prove_moved()
        self.assertIn("tls", plan["features"])


class MoverTests(ZeroCopyCase):
    """Without copying, from behind ATTACHED on."""

    in_band = True

    def test_splice(self) -> None:
        """What the framing left in the socket is spliced."""
        self.journey("splice", "multifd")


class RefusedTests(PairCase):
    """Who speaks another form, or none: nothing moves, and somebody is told why."""

    def logged(self, daemon: Daemon, text: str) -> None:
        wait_until(lambda: re.search(text, daemon.log), lambda: f"{text!r} in\n{daemon.log}")

    def test_forms(self) -> None:
        """One side in the one form, and the other in the other."""
        port, other = free_ports(2)
        listen = [f"tcp:127.0.0.1:{port}", f"in-band:tcp:127.0.0.1:{other}"]
        pair = self.pair("7.2", there={"listen": listen}, here={"handshake_deadline": 0.5})
        pair.start()
        pair.begin("direct", uri=f"in-band:tcp:127.0.0.1:{port}")
        self.assertIn("leave out 'in-band:'", pair.failed(pair.here))
        with socket.create_server(("127.0.0.1", 0)) as silent:
            pair.begin("direct", uri=f"in-band:tcp:127.0.0.1:{silent.getsockname()[1]}")
            self.assertIn("greeting did not come within 0.5 seconds", pair.failed(pair.here))
        pair.begin("", require=[], exclude=[], uri=f"tcp:127.0.0.1:{other}")
        self.assertIn("has not greeted within 0.5 seconds", pair.failed(pair.here))
        pair.prove_stayed()
        # One daemon can listen for both.
        pair.move("direct", uri=listen[1])
        pair.prove_moved()

    def test_from_qemu(self) -> None:
        """QEMU's own stream, to a port for this form: the log says what is for that."""
        source, destination = self.two_guests("11", "7.2")
        guests = {"vm": {"qmp": f"unix:{destination.qmp_path}"}}
        uri = f"tcp:127.0.0.1:{free_ports()[0]}"
        daemon = self.daemon(guests=guests, listen=[f"in-band:{uri}"])
        start(source, destination, daemon)
        source.set_capabilities("events", "return-path")
        source.qmp("migrate", uri=uri)
        self.assertEqual("failed", source.wait_migration("completed", "failed"))
        self.logged(daemon, r"A QEMU alone does not: 'legacy-listen' is for that")
        source.wait_running()
        only_one_runs(source, destination, ticks=5)
        self.assertEqual("inmigrate", destination.status())

    def to_qemu(self, label: str, reason: str) -> None:
        """Send a guest, in-band, to a QEMU that waits for its stream: it does not know FEATURES."""
        uri = f"tcp:127.0.0.1:{free_ports()[0]}"
        source = self.noisy_guest("7.2", "source")
        destination = self.noisy_guest(label, "destination", incoming=uri)
        daemon = self.daemon(guests={"vm": {"qmp": f"unix:{source.qmp_path}"}})
        start(source, destination, daemon)
        begun = daemon.execute("migrate", guest="vm", uri=f"in-band:{uri}", legacy="allow")

        def ended() -> dict[str, Any]:
            (entry,) = daemon.execute("query-migrate", id=begun["id"])
            return entry if "ended" in entry else {}

        entry = ask_until(ended, lambda: f"the end of the migration; {daemon.log}")
        self.assertEqual(("failed", "peer-gone"), (entry["status"], entry["error"]["class"]))
        only_one_runs(source, destination, ticks=5)
        counted_without_a_gap(source)
        destination.process.wait()
        self.assertIn(reason, destination.log)

    def test_to_7_2(self) -> None:
        """QEMU 7.2 wants to know the machine first: it ends, and nothing has moved."""
        self.to_qemu("7.2", "Configuration section missing")

    def test_to_10_0(self) -> None:
        """So does 10.0."""
        self.to_qemu("10.0", "Configuration section missing")

    def test_to_11(self) -> None:
        """So does 11."""
        self.to_qemu("11", "Configuration section missing")


class PlacesTests(PairCase):
    """Where else in QEMU's stream it would have to stand, and why it does not."""

    def ended(self, label: str, stream: bytes) -> str:
        """Give a QEMU a stream; returns what it has said at its end."""
        port = free_ports()[0]
        waiting = self.noisy_guest(label, label, incoming=f"tcp:127.0.0.1:{port}").start()
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(stream)
            with contextlib.suppress(OSError):
                while stranger.recv(100):
                    pass
        waiting.process.wait()
        return waiting.log

    def test_behind_the_configuration(self) -> None:
        """Behind the machine's name QEMU knows commands, but not this one, and ends as well."""
        machine = b"pc-i440fx-7.2"
        configuration = b"\7" + struct.pack(">I", len(machine)) + machine
        stream = OPENING[:8] + configuration + OPENING[8:] + frame(b"Reply", by_source=True)
        for label in ("7.2", "10.0", "11"):
            self.assertIn("MIG_CMD 0x4645 unknown (len 0x5)", self.ended(label, stream))

    def test_on_the_return_path(self) -> None:
        """A source's QEMU that gets FEATURES on its return path fails, and goes on."""
        for label in ("7.2", "10.0", "11"):
            with socket.create_server(("127.0.0.1", 0)) as server:
                source = self.noisy_guest(label, f"source {label}").start()
                source.set_capabilities("events", "return-path")
                source.qmp("migrate-set-parameters", max_bandwidth=1 << 30)
                source.qmp("migrate", uri=f"tcp:127.0.0.1:{server.getsockname()[1]}")
                with server.accept()[0] as connection, contextlib.suppress(ConnectionResetError):
                    connection.settimeout(60)
                    connection.sendall(frame(b"Greeting", by_source=False))
                    while connection.recv(1 << 20):
                        pass
                self.assertEqual("failed", source.wait_migration("completed", "failed"))
                source.wait_running()
                source.wait_ticks(2)
                self.assertIn("invalid message 0x4645", source.log)
