"""The baseline, from a peer that shares no code with qmigd.

The source here is a QEMU alone, and between it and the daemon stands
:mod:`tests.minipeer`: it knows the Greeting, a Reply without features and START, and
sends QEMU's stream in the same segment.
"""

from __future__ import annotations

import os
import socket
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tests import minipeer
from tests.rig.daemons import Daemon
from tests.rig.guest import Guest
from tests.rig.news import wait_until
from tests.rig.pair import PairCase, same_ram, settings_of, start
from tests.rig.proofs import counted_without_a_gap, only_one_runs


class BaselineTests(PairCase):
    def two(
        self, source: str, destination: str, others: int = 0
    ) -> tuple[Guest, Guest, Daemon, list[Guest]]:
        """Start a source of its own, and a daemon with a guest ``vm`` that waits, and others."""
        one, two = self.two_guests(source, destination)
        more = [self.waiting_guest(destination, f"other {number}") for number in range(others)]
        guests = {"vm": {"qmp": f"unix:{two.qmp_path}"}}
        for number, guest in enumerate(more):
            guests[f"other{number}"] = {"qmp": f"unix:{guest.qmp_path}"}
        daemon = self.daemon(guests=guests)
        start(one, two, daemon, *more)
        one.set_capabilities("events", "return-path")
        one.qmp("migrate-set-parameters", max_bandwidth=1 << 30)
        return one, two, daemon, more

    def send(self, source: Guest, daemon: Daemon, name: str | None) -> Future[int]:
        """Have the source's stream carried to the daemon; the result is what minipeer says."""
        _, host, port = daemon.uri.split(":")
        path = os.path.join(source.directory, "stream")
        if os.path.exists(path):
            os.unlink(path)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()

        def carry() -> int:
            with listener, listener.accept()[0] as stream:
                return minipeer.move(host, int(port), stream, name)

        pool = ThreadPoolExecutor(1)
        self.addCleanup(pool.shutdown)
        carried = pool.submit(carry)
        source.qmp("migrate", uri=f"unix:{path}")
        return carried

    def check_moved(self, source: Guest, destination: Guest, carried: Future[int]) -> None:
        self.assertEqual(source.wait_migration("completed", "failed"), "completed")
        self.assertGreater(carried.result(60), 4 << 20)
        destination.wait_running()
        with destination.stopped():
            same_ram(source, destination)
        only_one_runs(destination, source)
        counted_without_a_gap(source, destination)

    def test_named_7_2(self) -> None:
        """A guest that is named comes in whole, byte for byte, and others are left alone."""
        source, destination, daemon, others = self.two("7.2", "7.2", others=1)
        before = settings_of(destination)
        self.check_moved(source, destination, self.send(source, daemon, "vm"))
        self.assertEqual(others[0].status(), "inmigrate")
        entry = self.ended(daemon)
        self.assertEqual(entry["status"], "completed")
        self.assertEqual(entry["plan"]["features"], [])
        self.assertEqual(entry["plan"]["path"], "handover")
        self.assertEqual(settings_of(destination), before)

    def test_named_10_0(self) -> None:
        """The same into QEMU 10.0, from 7.2."""
        source, destination, daemon, _ = self.two("7.2", "10.0")
        self.check_moved(source, destination, self.send(source, daemon, "vm"))

    def test_only_one_11(self) -> None:
        """Without a name, the only guest that waits is meant."""
        source, destination, daemon, _ = self.two("11", "11")
        self.check_moved(source, destination, self.send(source, daemon, None))
        self.assertEqual(self.ended(daemon)["guest"], "vm")

    def test_only_one_that_waits(self) -> None:
        """One that runs already does not count as waiting."""
        source, destination, daemon, others = self.two("10.0", "10.0", others=1)
        others[0].close()
        self.check_moved(source, destination, self.send(source, daemon, None))

    def test_ambiguous(self) -> None:
        """Without a name, and with two that wait, there is an ERROR and nobody is touched."""
        source, destination, daemon, others = self.two("7.2", "7.2", others=1)
        self.refused(source, daemon, None, "more than one", "vm", "other0")
        for waiting in (destination, *others):
            self.assertEqual(waiting.status(), "inmigrate")
        self.check_moved(source, destination, self.send(source, daemon, "vm"))

    def test_unknown(self) -> None:
        """A name that nobody has is an ERROR that says which there are."""
        source, destination, daemon, _ = self.two("10.0", "7.2")
        self.refused(source, daemon, "wm", "vm")
        self.assertEqual(destination.status(), "inmigrate")

    def test_none_waits(self) -> None:
        """Without a guest that waits there is nothing to come into."""
        source, destination, daemon, _ = self.two("7.2", "7.2")
        self.check_moved(source, destination, self.send(source, daemon, None))
        self.ended(daemon)
        again = self.noisy_guest("7.2", "again").start()
        again.set_capabilities("events", "return-path")
        self.refused(again, daemon, None, "none waits")
        self.refused(again, daemon, "vm", "running")
        only_one_runs(destination, source)

    def refused(self, source: Guest, daemon: Daemon, name: str | None, *words: str) -> None:
        """Check that a stream is refused, and that its guest goes on where it was."""
        carried = self.send(source, daemon, name)
        error = carried.exception(60)
        self.assertIsInstance(error, minipeer.Refused)
        for word in words:
            self.assertIn(word, str(error))
        self.assertEqual(source.wait_migration("failed", "completed"), "failed")
        source.wait_running()
        source.wait_ticks(2)

    def ended(self, daemon: Daemon) -> dict[str, Any]:
        """Wait until the daemon has done with the guest, and return what it says of that."""
        daemon.monitor.wait_event("MIGRATION", where=lambda data: data["status"] == "completed")
        return daemon.execute("query-migrate")[-1]

    def test_no_return_path(self) -> None:
        """A source that can only write is served too: QEMU's ``exec:`` into a program."""
        source, destination, daemon, _ = self.two("7.2", "10.0")
        source.set_capabilities("return-path", on=False)
        _, host, port = daemon.uri.split(":")
        program = f"{sys.executable} {minipeer.__file__} {host} {port} vm"
        source.qmp("migrate", uri=f"exec:{program}")
        self.assertEqual(source.wait_migration("completed", "failed"), "completed")
        destination.wait_running()
        with destination.stopped():
            same_ram(source, destination)
        counted_without_a_gap(source, destination)

    def test_cut_off(self) -> None:
        """A stream that ends in the middle does not leave half a guest running."""
        source, destination, daemon, _ = self.two("10.0", "10.0")
        source.qmp("migrate-set-parameters", max_bandwidth=1 << 20)
        self.send(source, daemon, "vm")
        source.monitor.wait_event("MIGRATION_PASS")
        source.qmp("migrate_cancel")
        # QEMU 10.0 shuts the return path before it calls itself cancelling, and with it the stream:
        # a write that fails in between is a failure to it (1 of 200 cancels without a daemon).
        source.wait_migration("cancelled", "failed")
        wait_until(
            lambda: [entry for entry in daemon.execute("query-migrate") if "ended" in entry],
            "the daemon to notice",
        )
        entry = daemon.execute("query-migrate")[-1]
        self.assertEqual(entry["status"], "failed")
        self.assertGreater(len(entry["error"]["desc"]), 20)
        self.assertNotEqual(destination.status(), "running")
        only_one_runs(source, destination)
