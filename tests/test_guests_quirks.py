"""What QEMU gets wrong, shown with QEMU alone, and that the table says so."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from importlib import import_module

from twisted.trial.unittest import SynchronousTestCase

from qmigd.guests.quirks import QUIRKS, Versions, conflicts, unawaited
from qmigd.interfaces import GuestFacts
from tests.rig.bootsector import Program
from tests.rig.case import RigCase
from tests.rig.guest import Guest, GuestDied
from tests.rig.news import Hang, ask_until, wait_until
from tests.rig.proofs import compare_ram
from tests.rig.qemus import require
from tests.rig.qmp import Lost, QmpError

MULTIFD = "multifd"
POSTCOPY = "postcopy-ram"
PREEMPT = "postcopy-preempt"

#: Seconds without an answer after which a QEMU counts as hung.  All of these
#: moves are over within one second where they go well, and one that hangs stays so.
HUNG = 3.0
#: Bytes per second: precopy of the guest takes about 3 s, so that postcopy begins within it.
SLOW = 4 << 20

#: The same, less than QEMU sends at a time.
CRAWL = 300_000

#: The guests: one that precopy takes its time for, and one that it does not.
LARGE, SMALL = Program(pages=3072, pages_per_tick=16), Program(pages=64)

#: Machine types up to 7.2, and those of distributors, which may be as old.
OLD_MACHINES = ("pc-i440fx-7.2", "pc-q35-6.0", "s390-ccw-virtio-7.2", "virt-rhel9.2.0")
NEW_MACHINES = ("pc-i440fx-8.0", "pc-q35-10.1", "virt-11.1", "microvm", "sbsa-ref")

#: What a QEMU says of a connection that it did not expect.
_TOO_MANY = "Extra incoming migration connection"

#: How often to try to ask a QEMU something at a moment that lasts 100 ms.
TRIES = 10


def facts(version: tuple[int, int, int], machine: str = "pc-i440fx-7.2") -> GuestFacts:
    return GuestFacts("guest", "qemu", version, machine, {}, {})


class TableTests(SynchronousTestCase):
    def excluded(
        self,
        source: tuple[int, int, int],
        destination: tuple[int, int, int],
        machine: str = "pc-i440fx-7.2",
    ) -> set[frozenset[str]]:
        return {pair for pair, _ in conflicts(facts(source, machine), facts(destination, machine))}

    def test_multifd_with_postcopy(self) -> None:
        """It is excluded into anything older than 10.1, and out of 8.1 to 10.0."""
        pair = frozenset({MULTIFD, POSTCOPY})
        bad = [
            ((7, 2, 22), (7, 2, 22)), ((11, 1, 3), (7, 2, 22)), ((7, 2, 22), (8, 0, 5)),
            ((7, 2, 22), (8, 1, 0)), ((10, 0, 2), (10, 0, 2)), ((10, 0, 9), (11, 1, 3)),
            ((8, 1, 0), (10, 1, 0)), ((11, 1, 3), (10, 0, 2)),
        ]  # fmt: skip
        good = [
            ((7, 2, 22), (11, 1, 3)), ((8, 0, 5), (10, 1, 0)), ((10, 1, 0), (10, 1, 0)),
            ((11, 1, 3), (11, 1, 3)),
        ]  # fmt: skip
        for source, destination in bad:
            self.assertIn(pair, self.excluded(source, destination), (source, destination))
        for source, destination in good:
            self.assertNotIn(pair, self.excluded(source, destination), (source, destination))

    def test_multifd_with_preempt(self) -> None:
        """It goes by the machine type's version; a type without one is the newest."""
        pair = frozenset({MULTIFD, PREEMPT})
        new = (11, 1, 3)
        for machine in OLD_MACHINES:
            self.assertIn(pair, self.excluded(new, new, machine), machine)
        for machine in NEW_MACHINES:
            self.assertNotIn(pair, self.excluded(new, new, machine), machine)

    def test_preempt_on_direct(self) -> None:
        """It goes by the source: its version, and its machine type's."""
        pair = frozenset({PREEMPT, "direct"})
        old, new = (7, 2, 22), (11, 1, 3)
        for source, machine in ((old, "microvm"), *((new, machine) for machine in OLD_MACHINES)):
            self.assertIn(pair, self.excluded(source, new, machine), machine)
            self.assertEqual(unawaited(facts(source, machine)), {"preempt"}, machine)
        for machine in NEW_MACHINES:
            self.assertNotIn(pair, self.excluded(new, old, machine), machine)
            self.assertEqual(unawaited(facts(new, machine)), set(), machine)

    def test_ranges(self) -> None:
        """A range has its first version, with every patch level, and not its end."""
        versions = Versions((8, 1), (10, 1))
        self.assertIn((8, 1, 0), versions)
        self.assertIn((10, 0, 99), versions)
        self.assertNotIn((10, 1, 0), versions)
        self.assertNotIn((8, 0, 99), versions)

    def test_every_row_has_its_test(self) -> None:
        """The tests that the table names exist, and each row has an id of its own."""
        for quirk in QUIRKS:
            module, case, method = quirk.test.rsplit(".", 2)
            self.assertTrue(hasattr(getattr(import_module(module), case), method), quirk.test)
        self.assertEqual(len({quirk.id for quirk in QUIRKS}), len(QUIRKS))


class QuirkTests(RigCase):
    """Two QEMUs and nobody in between."""

    def pair(
        self,
        source: str,
        destination: str,
        *capabilities: str,
        machine: str = "pc-i440fx-7.2",
        program: Program = LARGE,
    ) -> tuple[Guest, Guest]:
        """Start both and set the same capabilities on both."""
        one = self.guest(require(source), "source", machine=machine, program=program)
        other = self.guest(
            require(destination), "destination", machine=machine, program=program, incoming=True
        )
        one.start()
        other.start()
        for guest in (other, one):
            guest.set_capabilities("events", "return-path", *capabilities)
        one.qmp("migrate-set-parameters", {"max-bandwidth": SLOW})
        return one, other

    def begin(self, source: Guest, destination: Guest) -> None:
        """Start the move."""
        uri = f"unix:{os.path.join(destination.directory, 'stream')}"
        destination.qmp("migrate-incoming", uri=uri)
        source.qmp("migrate", uri=uri)
        source.wait_migration("active")

    def enter_postcopy(self, source: Guest, destination: Guest) -> None:
        """Let the precopy begin, then switch."""
        self.begin(source, destination)
        wait_until(
            lambda: source.qmp("query-migrate")["ram"]["transferred"] > SLOW // 8,
            "the precopy to get under way",
        )
        source.qmp("migrate-start-postcopy")

    def switch_with_nothing_left(self, label: str, other: str) -> Iterator[tuple[Guest, Guest]]:
        """Switch when everything has been sent of a guest that was stopped, try for try.

        With a bandwidth that a single write exceeds, QEMU sleeps up to 100 ms before it finds
        out that it is done; a downtime limit of next to nothing has it send the last page so.
        On a busy machine this test may come too late, and QEMU has completed by precopy.
        """
        for _ in range(TRIES):
            source, destination = self.pair(label, other, POSTCOPY, program=SMALL)
            source.qmp("stop")
            source.qmp("migrate-set-parameters", {"max-bandwidth": CRAWL, "downtime-limit": 1})
            self.begin(source, destination)
            while (now := source.qmp("query-migrate"))["status"] == "active":
                if now["ram"]["remaining"] == 0:
                    with contextlib.suppress(QmpError):  # it has completed just now
                        source.qmp("migrate-start-postcopy")
                    break
            source.wait_migration("completed", "failed")
            yield source, destination
            source.close()
            destination.close()

    def assert_hung(self, guest: Guest) -> None:
        """Its QMP does not answer any more, once the channels have come.

        Where they come in another order than mostly, it takes one for too many instead,
        and waits for ever.
        """

        def hangs() -> bool:
            if _TOO_MANY in guest.log:
                return True
            try:
                status = guest.qmp("query-status", deadline=HUNG)["status"]
            except Hang:
                return True
            self.assertEqual(status, "inmigrate")
            return False

        ask_until(hangs, "it to hang")
        if _TOO_MANY in guest.log:
            self.assertEqual(guest.status(), "inmigrate")

    def assert_arrives(self, source: Guest, destination: Guest) -> None:
        """The move ends well: the guest runs at its destination, with its RAM."""
        source.wait_migration("completed")
        destination.wait_migration("completed")
        destination.wait_running()
        destination.wait_ticks(3)
        destination.check_ram()

    def test_multifd_with_postcopy_into_old_qemu_loses_the_guest(self) -> None:
        """7.2 accepts the pair; its source says completed, and the destination has aborted."""
        source, destination = self.pair("7.2", "7.2", MULTIFD, POSTCOPY)
        self.enter_postcopy(source, destination)
        source.wait_migration("completed")
        destination.process.wait()
        self.assertNotEqual(destination.process.exit_code, 0)
        self.assertIn("yank_unregister_instance", destination.log)

    def test_multifd_with_postcopy_from_new_into_old_qemu_never_ends(self) -> None:
        """11.1 into 7.2: postcopy goes on for ever, with pages that never come."""
        source, destination = self.pair("11", "7.2", MULTIFD, POSTCOPY)
        self.enter_postcopy(source, destination)
        source.wait_migration("postcopy-active")
        self.assertRaises(Hang, source.wait_migration, "completed", "failed", deadline=HUNG)
        self.assertEqual(source.status(), "finish-migrate")

    def test_multifd_with_postcopy_is_refused(self) -> None:
        """10.0 refuses the pair, whichever side it is on."""
        guest = self.guest(require("10.0"), "10.0").start()
        error = self.assertRaises(QmpError, guest.set_capabilities, MULTIFD, POSTCOPY)
        self.assertIn("not yet compatible with multifd", error.text)

    def test_multifd_with_postcopy_works_into_new_qemu(self) -> None:
        """11.1 takes the pair from 7.2 and from itself: no row excludes that."""
        for version in ("7.2", "11"):
            source, destination = self.pair(version, "11", MULTIFD, POSTCOPY)
            self.enter_postcopy(source, destination)
            self.assert_arrives(source, destination)

    def test_multifd_with_preempt_hangs_on_old_machine_types(self) -> None:
        """With a machine type of 7.2 the destination's QMP is dead, and nothing moves."""
        for version in ("7.2", "11"):
            source, destination = self.pair(version, version, MULTIFD, POSTCOPY, PREEMPT)
            self.begin(source, destination)
            self.assert_hung(destination)
            self.assertEqual(source.migration(), "active")
            self.assertTrue(source.running())

    def test_multifd_with_preempt_works_on_new_machine_types(self) -> None:
        """With a machine type of 8.2 all three go together on 11.1: no row excludes that."""
        source, destination = self.pair(
            "11", "11", MULTIFD, POSTCOPY, PREEMPT, machine="pc-i440fx-8.2"
        )
        self.enter_postcopy(source, destination)
        self.assert_arrives(source, destination)

    def test_preempt_alone_works_on_old_machine_types(self) -> None:
        """Without multifd a machine type of 7.2 does no harm, across versions too."""
        for one, other in (("7.2", "7.2"), ("11", "7.2"), ("7.2", "11")):
            source, destination = self.pair(one, other, POSTCOPY, PREEMPT)
            self.enter_postcopy(source, destination)
            self.assert_arrives(source, destination)

    def test_postcopy_without_pages(self) -> None:
        """11.1 switches with nothing left, and then a destination cannot load the guest.

        The destination's QEMU ends, or waits for ever; the guest has never run there.
        """
        for other in ("7.2", "10.0", "11"):
            tries = self.switch_with_nothing_left("11", other)
            caught = next((one for one in tries if one[0].migration() == "failed"), None)
            assert caught is not None, f"it has always completed into {other}"
            source, destination = caught
            self.assertIn(destination.status(), ("inmigrate", "gone"), other)
            self.assertEqual(destination.lines, [], other)
            source.qmp("cont")
            source.wait_ticks(3)
            source.check_ram()

    def test_postcopy_without_pages_is_precopy_out_of_older_ones(self) -> None:
        """7.2 and 10.0 look first whether they are done, and complete by precopy."""
        for label in ("7.2", "10.0"):
            source, destination = next(self.switch_with_nothing_left(label, "11"))
            self.assertEqual(source.migration(), "completed", label)
            destination.wait_migration("completed")
            self.assertEqual(destination.status(), "paused")
            compare_ram(source, destination)

    def test_gone_or_hung_is_told_apart(self) -> None:
        """What the other tests call hung is a QEMU that lives: a dead one says so at once."""
        guest = self.guest(require("7.2"), "dead").start()
        guest.kill()
        self.assertRaises((Lost, GuestDied), guest.qmp, "query-status")

    def test_preempt_that_is_connected_too_late_loses_the_guest(self) -> None:
        """Where it is not waited for, every version ends when it comes after the end.

        The kernel does not answer who calls a listener whose queue is full.
        """
        for label in ("7.2", "10.0", "11"):
            source = self.guest(require(label), label, program=SMALL).start()
            source.set_capabilities("events", "return-path", POSTCOPY, PREEMPT)
            source.qmp("migrate-set-parameters", {"max-bandwidth": CRAWL})
            with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
                host, port = listener.getsockname()
                source.qmp("migrate", uri=f"tcp:{host}:{port}")
                source.wait_migration("active")
                source.qmp("migrate_cancel")
                source.wait_migration("cancelled")
                self.assertTrue(source.alive)
                with listener.accept()[0], listener.accept()[0]:
                    source.process.wait()
            self.assertNotEqual(source.process.exit_code, 0)
            self.assertIn("yank_register_function", source.log)
