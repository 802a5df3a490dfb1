"""Two QEMUs that are given the ends of a connection in kernel TLS, and know nothing of it."""

from __future__ import annotations

from qmigd.channels.kernel_tls import CIPHERS, install
from tests.rig.bootsector import Program
from tests.rig.lane import KernelCase
from tests.rig.pair import PairCase, same_ram
from tests.rig.proofs import counted_without_a_gap, only_one_runs
from tests.rig.tls_records import sessions
from tests.rig.wire import Wire

_NAME = "channel"

#: Bytes a second: less than that program dirties.
_SLOW = 512 << 10

#: Less to encrypt than a guest has elsewhere: that is slow where the CPU is emulated.
_PROGRAM = Program(pages=256, pages_per_tick=2)


class HandedOverTests(KernelCase, PairCase):
    """The source's end is a TLS client's, the destination's a server's."""

    def given(self, label: str) -> None:
        """Start two QEMUs and give each an end of a connection."""
        self.wire = Wire()
        self.addCleanup(self.wire.close)
        self.source, self.destination = self.two_guests(label, program=_PROGRAM)
        for guest, end in zip(
            (self.source, self.destination), sessions(CIPHERS[0], *self.wire.ends), strict=True
        ):
            guest.start()
            guest.set_capabilities("events", "return-path")
            install(end.sock, end.keys())
            guest.qmp("getfd", sock=end.sock, fdname=_NAME)
            end.sock.close()

    def begin(self) -> None:
        """Start the migration."""
        self.destination.qmp("migrate-incoming", uri=f"fd:{_NAME}")
        self.source.qmp("migrate", uri=f"fd:{_NAME}")

    def prove_moved(self) -> None:
        """Check that the guest has gone over whole, and that nothing of it was to be read."""
        for guest in (self.source, self.destination):
            self.assertEqual(guest.wait_migration("completed", "failed"), "completed")
        self.destination.wait_running()
        with self.destination.stopped():
            same_ram(self.source, self.destination)
        only_one_runs(self.destination, self.source)
        counted_without_a_gap(self.source, self.destination)
        self.destination.check_ram()
        seen = bytes(self.wire.seen[0])
        self.assertGreater(len(seen), 4 << 20)
        for readable in (b"QEVM", b"pc.ram", self.source.ram(16 << 20, (16 << 20) + 64)):
            self.assertNotIn(readable, seen)

    def precopy(self, label: str) -> None:
        self.given(label)
        # Whatever the speed is, it is to end.
        self.source.qmp("migrate-set-parameters", downtime_limit=60_000)
        self.begin()
        self.prove_moved()

    def test_precopy_7_2(self) -> None:
        """Precopy, QEMU 7.2."""
        self.precopy("7.2")

    def test_precopy_11(self) -> None:
        """Precopy, QEMU 11."""
        self.precopy("11")

    def postcopy(self, label: str) -> None:
        self.given(label)
        for guest in (self.source, self.destination):
            guest.set_capabilities("postcopy-ram")
        self.source.qmp("migrate-set-parameters", max_bandwidth=_SLOW)
        self.begin()
        self.source.wait_migration("active")
        self.source.qmp("migrate-start-postcopy")
        self.prove_moved()

    def test_postcopy_7_2(self) -> None:
        """Postcopy, QEMU 7.2: pages are asked for the other way."""
        self.postcopy("7.2")

    def test_postcopy_11(self) -> None:
        """Postcopy, QEMU 11."""
        self.postcopy("11")

    def check_stayed(self) -> None:
        """Check that the migration fails at the source, whose guest goes on."""
        self.assertEqual(self.source.wait_migration("completed", "failed"), "failed")
        self.source.wait_running()
        self.source.wait_ticks(5)
        counted_without_a_gap(self.source)
        self.source.check_ram()

    def slowly(self) -> None:
        """Start a migration that will not come to an end by itself."""
        self.given("7.2")
        self.source.qmp("migrate-set-parameters", max_bandwidth=_SLOW)
        self.begin()
        self.source.wait_migration("active")

    def test_tampered(self) -> None:
        """A bit that is flipped on the wire: the source goes on running, alone."""
        self.slowly()
        self.wire.flip(0, 1 << 20)
        self.check_stayed()
        self.assertFalse(self.destination.lines)

    def test_destination_dies(self) -> None:
        """A destination that dies: the source goes on running."""
        self.slowly()
        self.destination.kill()
        self.check_stayed()

    def test_connection_breaks(self) -> None:
        """A connection that breaks: the source goes on running."""
        self.slowly()
        self.wire.close()
        self.check_stayed()
