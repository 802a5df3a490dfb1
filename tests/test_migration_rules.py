"""Ownership, preflight, settings and records: the rules of a migration, without one."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import FeatureError, MigrationError, PreflightError, ProtocolError
from qmigd.features import multifd, postcopy
from qmigd.interfaces import GuestFacts, Settings
from qmigd.migration import ownership, preflight, settings, status
from qmigd.migration.ownership import Act, Peer, Released
from qmigd.negotiation.plan import Plan


class OwnershipTests(SynchronousTestCase):
    """Never on both hosts; on neither only where nobody can know."""

    def test_never_on_both(self) -> None:
        """The source runs its guest only where the destination's cannot run."""
        for released in Released:
            for peer in Peer:
                if ownership.on_source_failure(released, peer) is Act.RUN:
                    self.assertTrue(released is Released.NO or peer is Peer.NEVER_RAN)
                    self.assertIsNot(peer, Peer.RUNS)

    def test_source_keeps_what_it_has_not_released(self) -> None:
        for peer in (Peer.NEVER_RAN, Peer.UNKNOWN):
            self.assertIs(ownership.on_source_failure(Released.NO, peer), Act.RUN)

    def test_released_and_lost(self) -> None:
        """Nobody knows whether RELEASE arrived: the guest stays stopped at the source."""
        self.assertIs(ownership.on_source_failure(Released.YES, Peer.UNKNOWN), Act.LEAVE)

    def test_destination_ends_what_is_not_its_own(self) -> None:
        for ran in (True, False):
            self.assertIs(ownership.on_destination_failure(Released.NO, ran), Act.QUIT)
        self.assertIs(ownership.on_destination_failure(Released.YES, True), Act.LEAVE)


GUEST: dict[str, Any] = {
    "name": "vm",
    "machine": "pc-i440fx-7.2",
    "memory": 1 << 26,
    "ram-blocks": [
        {"name": "pc.ram", "size": 1 << 26},
        {"name": "/rom@etc/acpi/tables", "size": 9},
    ],
    "uuid": "5d3c9a52-7d0e-4a57-9a11-6b1f9f0d7a01",
    "cpus": 1,
    "cpu-model": "qemu64-x86_64-cpu",
    "devices": [{"type": "virtio-net-pci", "id": "net0", "address": "00:03.0"}],
    "capabilities": ["events"],
}


class PreflightTests(SynchronousTestCase):
    """What does not fit is named, before anything is moved."""

    def differing(self, **other: Any) -> list[str]:
        return preflight.differences(GUEST, {**GUEST, **other})

    def test_same_guests_fit(self) -> None:
        preflight.check(GUEST, dict(GUEST))

    def test_nothing_said_is_nothing_compared(self) -> None:
        """A bare peer sends no description, or only a name."""
        preflight.check({}, GUEST)
        preflight.check({"name": "another"}, GUEST)

    def test_each_difference_is_named(self) -> None:
        for other, words in (
            ({"machine": "pc-q35-7.2"}, ["machine", "pc-q35-7.2", "pc-i440fx-7.2"]),
            ({"memory": 1}, ["memory", "67108864", "1 bytes"]),
            ({"cpus": 2}, ["CPUs", "1", "2"]),
            ({"cpu-model": "max"}, ["CPU model", "max"]),
            ({"uuid": "00000000-0000-0000-0000-00000000000a"}, ["UUID"]),
            ({"ram-blocks": GUEST["ram-blocks"][1:]}, ["pc.ram", "lacks"]),
            (
                {"ram-blocks": [{"name": "pc.ram", "size": 4}, GUEST["ram-blocks"][1]]},
                ["pc.ram", "4"],
            ),
            ({"devices": []}, ["virtio-net-pci", "00:03.0", "lacks"]),
            ({"capabilities": ["switchover-ack"]}, ["switchover-ack", "alike"]),
        ):
            (said,) = self.differing(**other)
            for word in words:
                self.assertIn(word, said)

    def test_all_differences_in_one_error(self) -> None:
        error = self.assertRaises(
            PreflightError, preflight.check, GUEST, {**GUEST, "cpus": 2, "memory": 2}
        )
        self.assertIn("CPUs", error.text)
        self.assertIn("memory", error.text)

    def test_what_may_differ(self) -> None:
        """No UUID was given; firmware tables that QEMU resizes; local capabilities."""
        self.assertEqual(self.differing(uuid=preflight.NO_UUID), [])
        self.assertEqual(
            self.differing(
                **{
                    "ram-blocks": [
                        GUEST["ram-blocks"][0],
                        {"name": "/rom@etc/acpi/tables", "size": 7},
                    ]
                }
            ),
            [],
        )
        self.assertEqual(self.differing(capabilities=["events", "xbzrle"]), [])

    @given(
        st.dictionaries(
            st.sampled_from(sorted(GUEST)),
            st.recursive(
                st.one_of(st.none(), st.integers(), st.text(), st.floats()),
                lambda inner: st.one_of(
                    st.lists(inner, max_size=3),
                    st.dictionaries(st.sampled_from(["name", "size", "type", "id"]), inner),
                ),
            ),
        )
    )
    def test_hostile_description(self, description: dict[str, Any]) -> None:
        """Whatever a peer sends as its description gives clauses, never a traceback."""
        preflight.differences(description, GUEST)


FACTS = GuestFacts(
    "vm",
    "qemu",
    (10, 0, 2),
    "q35",
    {"multifd": True, "postcopy-ram": False, "return-path": False},
    {},
)
FEATURES = {"multifd": multifd.feature, "postcopy-ram": postcopy.feature}


class SettingsTests(SynchronousTestCase):
    """What is set for a plan, and seen to be set."""

    def test_return_path_is_always_on(self) -> None:
        made = settings.settings_for(Plan("direct"), {}, FACTS, "source")
        self.assertEqual(made.capabilities, {"return-path": True})

    def test_what_is_not_planned_is_switched_off(self) -> None:
        """A capability that somebody left on would hang the migration."""
        made = settings.settings_for(Plan("direct"), FEATURES, FACTS, "source")
        self.assertIs(made.capabilities["multifd"], False)

    def test_what_is_planned_is_switched_on(self) -> None:
        plan = Plan("direct", ("multifd",), {"multifd": {"channels": 3}})
        made = settings.settings_for(plan, FEATURES, FACTS, "destination")
        self.assertIs(made.capabilities["multifd"], True)
        self.assertEqual(made.parameters, {"multifd-channels": 3})

    def test_difference_is_an_error(self) -> None:
        wanted = Settings({"multifd": True}, {"multifd-channels": 4})
        settings.compare(wanted, wanted, "source")
        error = self.assertRaises(
            FeatureError,
            settings.compare,
            wanted,
            Settings({"multifd": True}, {"multifd-channels": 2}),
            "source",
        )
        for word in ("multifd-channels", "source", "4", "2"):
            self.assertIn(word, error.text)

    def test_wire_form(self) -> None:
        some = Settings({"a": True}, {"b": 2})
        self.assertEqual(settings.settings_from_wire(settings.settings_to_wire(some)), some)
        self.assertRaises(
            ProtocolError, settings.settings_from_wire, {"capabilities": {"a": "yes"}}
        )


class RecordTests(SynchronousTestCase):
    """What query-migrate and the events say."""

    def setUp(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.records = status.Records(lambda name, data: self.events.append((name, data)))

    def record(self, migration: str = "id") -> status.Record:
        record = self.records.new(migration, "vm", "source", "tcp:b:1")
        self.records.add(record)
        return record

    def test_events_follow_the_status(self) -> None:
        """One event for each new status, and none for the same one again."""
        record = self.record()
        record.update(status="active")
        record.update(status="active")
        record.end("not moved", MigrationError("a reason"))
        record.update(status="active")
        self.assertEqual(
            [(name, data["status"]) for name, data in self.events],
            [("MIGRATION", "setup"), ("MIGRATION", "active"), ("MIGRATION", "failed")],
        )
        self.assertEqual(self.events[-1][1]["error"], {"class": "migration", "desc": "a reason"})

    def test_passes(self) -> None:
        record = self.record()
        record.passed(1)
        record.passed(1)
        record.passed(2)
        passes = [data["pass"] for name, data in self.events if name == "MIGRATION_PASS"]
        self.assertEqual(passes, [1, 2])

    def test_unlisted_record_is_silent(self) -> None:
        """A connection that never came to name a guest is no migration."""
        record = self.records.new("x", "", "destination", "tcp:a:1")
        record.end("nothing")
        self.assertEqual((self.events, list(self.records)), ([], []))

    def test_same_id_twice(self) -> None:
        self.record()
        self.assertRaises(MigrationError, self.record)

    def test_only_so_many_are_remembered(self) -> None:
        """Old ended ones make room; running ones stay."""
        running = self.record("running")
        for number in range(status.REMEMBERED + 10):
            self.record(str(number)).end("moved")
        ids = [record.id for record in self.records]
        self.assertEqual(len(ids), status.REMEMBERED + 1)
        self.assertIs(next(iter(self.records)), running)
        self.assertEqual(ids[-1], str(status.REMEMBERED + 9))
