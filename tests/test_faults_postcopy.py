"""What breaks once postcopy has begun: the guest is the destination's then, for good.

QEMU 10.0 and newer let a source's guest run again when the connection breaks at the end of
postcopy, while it runs at the destination.  That is shown here with QEMU alone, and
then, for each path, that it does not happen under qmigd.
"""

from __future__ import annotations

import signal
from typing import Any

from tests.rig.bootsector import PAGE, Program
from tests.rig.daemons import free_ports
from tests.rig.guest import MACHINE, Guest
from tests.rig.news import ask_until
from tests.rig.pair import SLOW, Pair, PairCase, same_ram, settings_of
from tests.rig.proofs import counted_without_a_gap, only_one_runs
from tests.rig.proxy import Deaf, Proxy
from tests.rig.qmp import QmpError

#: A small window, so that what is left for postcopy is little; it is dirtied faster than
#: it is sent, and precopy does not end by itself.
_SMALL = Program(pages=256)
_ENDLESS = {"downtime-limit": 1, "max-bandwidth": 5 << 20}

#: Bytes a second in postcopy: as good as nothing.
_CRAWL = {"max-postcopy-bandwidth": 1 << 12}

#: Of which three make up the time that a stream may stand still.
_SHORT = {"peer_deadline": 1.0, "guest_deadline": 1.0}

_DEADLINES = {**_SHORT, "handshake_deadline": 2.0}


def _remaining(source: Guest) -> int:
    return int(source.qmp("query-migrate").get("ram", {}).get("remaining", -1))


class PostcopyCase(PairCase):
    def proxied(self, pair: Pair) -> tuple[Proxy, str]:
        """Have all payload channels in the test's hand; returns where to migrate to as well."""
        proxy = Proxy(int(pair.there.uri.rpartition(":")[2]), but_first=True)
        self.addCleanup(proxy.close)
        return proxy, f"{'in-band:' if self.in_band else ''}{proxy.uri}"


class SplitBrainCase(PostcopyCase):
    """The connection breaks when all is sent and the destination's last word is still to come."""

    def provoke(self, source: Guest, destination: Guest, proxy: Proxy) -> None:
        """Break it there, once postcopy has begun."""
        source.wait_migration("postcopy-active")
        proxy.hold()
        source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
        destination.wait_migration("completed")
        self.assertEqual(source.migration(), "postcopy-active")
        self.assertEqual(_remaining(source), 0)
        proxy.drop()

    def alone(self, label: str) -> None:
        """Show it with QEMU alone: afterwards the guest runs twice."""
        source, destination = self.two_guests(label, program=_SMALL)
        port = free_ports()[0]
        destination._incoming = f"tcp:127.0.0.1:{port}"
        for guest in (destination, source):
            guest.start()
            guest.set_capabilities("events", "return-path", "postcopy-ram")
        proxy = Proxy(port)
        self.addCleanup(proxy.close)
        source.qmp("migrate-set-parameters", {**_ENDLESS, **_CRAWL})
        source.qmp("migrate", uri=proxy.uri)
        source.monitor.wait_event("MIGRATION_PASS", where=lambda data: data["pass"] >= 2)
        source.qmp("migrate-start-postcopy")
        self.provoke(source, destination, proxy)
        source.wait_running()
        destination.wait_ticks(3)
        source.wait_ticks(3)
        self.assertTrue(source.running() and destination.running(), "both")

    def under_qmigd(self, path: str, label: str) -> None:
        """The same break under qmigd: the source does not run again, the destination does."""
        pair = self.pair(label, program=_SMALL, here=_DEADLINES, there=_DEADLINES).start()
        proxy, uri = self.proxied(pair)
        self.to_postcopy(pair, path, uri=uri)
        self.provoke(pair.source, pair.destination, proxy)
        pair.ended(pair.here)
        self.assertNotEqual(pair.source.status(), "running")
        only_one_runs(pair.destination, pair.source)
        counted_without_a_gap(pair.source, pair.destination)
        with pair.destination.stopped():
            same_ram(pair.source, pair.destination)
        if label != "7.2":  # which hangs there: its source cannot even be told to go on
            self.check_cont_by_hand(pair)

    def to_postcopy(self, pair: Pair, path: str, **options: Any) -> None:
        """Begin a move and switch to postcopy, with a little that is still to be sent."""
        pair.begin(path, "postcopy", bandwidth=5 << 20, tunables={**_ENDLESS, **_CRAWL}, **options)
        ask_until(
            lambda: 0 < _remaining(pair.source) < 2 * _SMALL.pages * PAGE, "the first pass to end"
        )
        pair.here.execute("migrate-start-postcopy", guest="vm")

    def check_cont_by_hand(self, pair: Pair) -> None:
        """Where the destination is lost for good, a person can let the guest go on here."""
        pair.destination.kill()
        if pair.source.status() != "running":
            pair.source.qmp("cont")
        pair.source.wait_running()
        pair.source.wait_ticks(3)
        pair.source.check_ram()

    def direct(self, label: str) -> None:
        """Between the QEMUs it is the destination's end that breaks the connection."""
        pair = self.pair(label, program=_SMALL, here=_DEADLINES, there=_DEADLINES).start()
        self.to_postcopy(pair, "direct")
        pair.source.wait_migration("postcopy-active")
        # A guest that has not run there yet would go on here: 10.0 says so before it is loaded.
        pair.destination.wait_running()
        # Its last word cannot come any more, and then the connection breaks.
        pair.destination.process.signal(signal.SIGSTOP)
        pair.source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
        ask_until(
            lambda: _remaining(pair.source) == 0, lambda: f"{pair.source.qmp('query-migrate')}"
        )
        pair.destination.kill()
        entry = pair.ended(pair.here)
        self.assertEqual(entry["status"], "failed")
        self.assertIn("cont", entry["step"])
        self.assertNotEqual(pair.source.status(), "running")
        self.check_cont_by_hand(pair)


class SplitBrainTests(SplitBrainCase):
    """With QEMU alone, and on each path under qmigd."""

    def test_alone_10_0(self) -> None:
        """QEMU 10.0 alone lets the guest run on both hosts."""
        self.alone("10.0")

    def test_alone_11(self) -> None:
        """So does QEMU 11."""
        self.alone("11")

    def test_handover_10_0(self) -> None:
        """A socket that was handed over, between 10.0s."""
        self.under_qmigd("handover", "10.0")

    def test_handover_11(self) -> None:
        """A socket that was handed over, between 11s."""
        self.under_qmigd("handover", "11")

    def test_relay_10_0(self) -> None:
        """Relays, between 10.0s."""
        self.under_qmigd("relay", "10.0")

    def test_relay_11(self) -> None:
        """Relays, between 11s."""
        self.under_qmigd("relay", "11")

    def test_handover_7_2(self) -> None:
        """A socket that was handed over, between 7.2s, which hang there by themselves."""
        self.under_qmigd("handover", "7.2")

    def test_direct_10_0(self) -> None:
        """Direct, between 10.0s."""
        self.direct("10.0")

    def test_direct_11(self) -> None:
        """Direct, between 11s."""
        self.direct("11")


class KilledCase(PairCase):
    """Somebody is killed while postcopy is under way."""

    def under_way(self, path: str, source: str, destination: str, mode: str = "postcopy") -> Pair:
        """Bring a move into the middle of postcopy."""
        pair = self.pair(source, destination, here=_DEADLINES, there=_DEADLINES).start()
        slow = {"max-postcopy-bandwidth": 1 << 20}
        pair.begin(path, mode, bandwidth=4 << 20, tunables=slow)
        pair.postcopy()
        pair.wait(pair.here, "postcopy-active")
        pair.destination.wait_running()
        return pair

    def finish(self, pair: Pair) -> None:
        pair.source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)

    def source_qmigd(self, path: str, source: str, destination: str) -> None:
        """The source's qmigd is killed: the QEMUs finish by themselves."""
        pair = self.under_way(path, source, destination)
        pair.here.kill()
        self.finish(pair)
        self.assertEqual(pair.ended(pair.there)["status"], "completed")
        pair.source.wait_migration("completed")
        pair.here.restart()
        pair.wait_settings(pair.source)
        pair.prove_moved()

    def destination_qmigd(self, path: str, source: str, destination: str) -> None:
        """The destination's qmigd is killed: the QEMUs finish by themselves, and it sees that."""
        pair = self.under_way(path, source, destination)
        pair.there.kill()
        pair.there.restart()
        self.finish(pair)
        self.assertEqual(pair.ended(pair.here)["status"], "completed")
        pair.wait_settings(pair.destination)
        pair.prove_moved()

    def relayed(self, label: str, *, source: bool) -> None:
        """With a relay the stream is lost as well, and with it what had not arrived."""
        pair = self.under_way("relay", label, label)
        (pair.here if source else pair.there).kill()
        pair.ended(pair.there if source else pair.here)
        (pair.here if source else pair.there).restart()
        self.assertNotEqual(pair.source.status(), "running")
        self.assertNotEqual(pair.source.migration(), "completed")
        # What is missing there is still here: nothing was ended, and nothing runs twice.
        self.assertTrue(pair.source.alive and pair.destination.alive)
        before = len(pair.source.lines)
        pair.destination.kill()
        pair.source.wait_migration("failed", "postcopy-paused", "completed")
        self.assertEqual(len(pair.source.lines), before)

    def destination_qemu(self, path: str, label: str) -> None:
        """The destination's QEMU is killed: nobody but a person lets the guest run here."""
        pair = self.under_way(path, label, label)
        pair.destination.kill()
        entry = pair.ended(pair.here)
        self.assertEqual(entry["status"], "failed")
        self.assertTrue(entry["error"]["desc"])
        self.assertEqual(entry["owner"], "destination")
        self.assertNotEqual(pair.source.status(), "running")
        self.assertTrue(pair.source.alive)


class KilledTests(KilledCase):
    """Each of the four, on each path."""

    def test_source_qmigd_handover(self) -> None:
        """The source's qmigd, on a socket that was handed over."""
        self.source_qmigd("handover", "7.2", "10.0")

    def test_source_qmigd_direct(self) -> None:
        """The source's qmigd, between the QEMUs."""
        self.source_qmigd("direct", "11", "11")

    def test_destination_qmigd_handover(self) -> None:
        """The destination's qmigd, on a socket that was handed over."""
        self.destination_qmigd("handover", "10.0", "11")

    def test_destination_qmigd_direct(self) -> None:
        """The destination's qmigd, between the QEMUs."""
        self.destination_qmigd("direct", "7.2", "7.2")

    def test_source_qmigd_relay(self) -> None:
        """The source's qmigd and its relay: the source does not run."""
        self.relayed("10.0", source=True)

    def test_destination_qmigd_relay(self) -> None:
        """The destination's qmigd and its relay: the source does not run."""
        self.relayed("11", source=False)

    def test_destination_qemu_handover(self) -> None:
        """The destination's QEMU, on a socket that was handed over."""
        self.destination_qemu("handover", "11")

    def test_destination_qemu_direct(self) -> None:
        """The destination's QEMU, between the QEMUs."""
        self.destination_qemu("direct", "7.2")

    def test_destination_qemu_relay(self) -> None:
        """The destination's QEMU, behind the relays."""
        self.destination_qemu("relay", "10.0")

    def test_cancel(self) -> None:
        """The user's cancel is refused on every path, and the move goes on."""
        for path in ("handover", "relay"):
            pair = self.under_way(path, "10.0", "7.2")
            error = self.assertRaises(QmpError, pair.cancel)
            self.assertIn("too late", error.text)
            self.finish(pair)
            pair.completed()
            pair.prove_moved()


class LateTests(PostcopyCase):
    """Postcopy that comes to an end late, because nothing moves or it broke."""

    def half_way(self, pair: Pair, path: str, **where: str) -> None:
        """Bring a move into the middle of postcopy."""
        slow = {"max-postcopy-bandwidth": 1 << 20}
        pair.begin(path, "postcopy", bandwidth=4 << 20, tunables=slow, **where)
        pair.postcopy()
        pair.wait(pair.here, "postcopy-active")
        pair.destination.wait_running()

    def stands_still(self, pair: Pair) -> None:
        """Wait until the source's daemon says so."""
        ask_until(
            lambda: "'migrate-cancel' gives it up" in pair.entry(pair.here)["step"],
            lambda: f"the stall to be told: {pair.entry(pair.here)}",
        )

    def test_stalled(self) -> None:
        """The network is away for longer than a stream may stand still, and comes back.

        What a relay has to bring is nowhere else.  The control connection is lost meanwhile.
        """
        link = self.link()
        pair = self.pair("10.0", link=link, here=_SHORT, there=_SHORT).start()
        self.half_way(pair, "relay")
        link.cut()
        self.stands_still(pair)
        pair.source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
        link.restore()
        pair.completed()
        pair.prove_moved()

    def test_asleep(self) -> None:
        """Neither QEMU answers for that long: the relays stay, and the guest misses nothing."""
        pair = self.pair("11", here=_SHORT, there=_SHORT).start()
        self.half_way(pair, "relay")
        both = (pair.source.process, pair.destination.process)
        for process in both:
            process.signal(signal.SIGSTOP)
        self.stands_still(pair)
        for process in both:
            process.signal(signal.SIGCONT)
        pair.source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
        pair.completed()
        pair.prove_moved()

    def test_recovered_by_hand(self) -> None:
        """The stream breaks, and a person has the QEMUs recover: their settings come back then."""
        pair = self.pair("10.0").start()
        proxy, uri = self.proxied(pair)
        self.half_way(pair, "handover", uri=uri)
        proxy.drop()
        for daemon in (pair.here, pair.there):
            self.assertIn("still ", pair.failed(daemon))
        # One that finds it like that has the same to do.
        pair.here.restart()
        pair.source.wait_migration("postcopy-paused")
        port = free_ports()[0]
        pair.destination.qmp("migrate-recover", uri=f"tcp:127.0.0.1:{port}")
        pair.source.qmp("migrate", uri=f"tcp:127.0.0.1:{port}", resume=True)
        pair.source.wait_migration("postcopy-active")
        for guest in (pair.source, pair.destination):
            self.assertTrue(settings_of(guest)["postcopy-ram"])
        pair.source.qmp("migrate-set-parameters", max_postcopy_bandwidth=0)
        pair.source.wait_migration("completed")
        for guest in (pair.source, pair.destination):
            pair.wait_settings(guest)
        pair.prove_moved()


class ChannelTests(PairCase):
    """A channel that does not come about is noticed while the guest can still stay."""

    def test_preempt(self) -> None:
        """However early or late QEMU opens it: by itself it would go over without."""
        for machine in (MACHINE, "pc-i440fx-8.0"):
            pair = self.pair("10.0", here={"handshake_deadline": 1.0}, machine=machine).start()
            proxy = Deaf(pair.there.uri, 2)  # the control connection, and main
            self.addCleanup(proxy.close)
            pair.begin("relay", "preempt", bandwidth=SLOW, uri=proxy.uri)
            with self.assertRaises(QmpError):
                pair.postcopy()
            self.assertIn("did not accept a payload channel within 1", pair.failed(pair.here))
            pair.prove_stayed()
