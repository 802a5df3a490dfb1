"""One guest, moved on and on between two daemons, by every path, in every way, by every QEMU.

Each leg of a journey takes the guest to a fresh QEMU, and each time everything is looked
at: where it runs, its RAM byte for byte, its count, what was negotiated, and that both
QEMUs are set as they were before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.rig.daemons import Daemon
from tests.rig.guest import Guest
from tests.rig.pair import KNOWN, NAME, Pair, PairCase, choice, start

_EVERYTHING = ("precopy", "multifd", "postcopy", "preempt")

#: Without preempt, which takes another path than ``direct`` with the machine type of these tests.
_DIRECT = _EVERYTHING[:-1]

#: A machine type that lets it go directly, and with multifd.
_NEW_MACHINE = "pc-i440fx-10.0"

#: What each way of moving has to have among its features.
_FEATURES = {
    "precopy": set[str](),
    "multifd": {"multifd"},
    "postcopy": {"postcopy-ram"},
    "preempt": {"postcopy-ram", "postcopy-preempt"},
    "multifd-postcopy": {"multifd", "postcopy-ram"},
}


class JourneyCase(PairCase):
    def journey(
        self,
        path: str | Mapping[str, str],
        *ways: str,
        by: tuple[str, str],
        machine: str = "",
        daemons: tuple[Daemon, Daemon] | None = None,
    ) -> None:
        """Move a guest between two QEMUs and back, again and again.

        :param path: the same for each way, or one for each.
        :param ways: one after the other; where the two QEMUs are of different versions,
            each of them there and back.
        :param daemons: those that move it, not started yet.
        """
        options: dict[str, Any] = {"machine": machine} if machine else {}
        one, other = by
        legs = [(way, other if leg == 0 else one) for way in ways for leg in (0, 1)]
        if one == other:
            legs = legs[::2]
        here, there = daemons or (self.daemon("one qmigd"), self.daemon("other qmigd"))
        guest = self.noisy_guest(one, "start", **options)
        start(here, there, guest)
        here.execute("guest-add", name=NAME, qmp=f"unix:{guest.qmp_path}")
        passed: list[Guest] = [guest]
        for number, (way, label) in enumerate(legs):
            source = passed[-1]
            destination = self.waiting_guest(label, f"stop {number}", **options).start()
            there.execute("guest-add", name=NAME, qmp=f"unix:{destination.qmp_path}")
            pair = Pair(here, there, source, destination)
            pair.remember()
            self.leg(pair, path if isinstance(path, str) else path[way], way, passed)
            passed.append(destination)
            source.close()
            here.execute("guest-remove", name=NAME)
            here, there = there, here

    def leg(self, pair: Pair, path: str, way: str, passed: list[Guest]) -> None:
        """Move the guest once, and look at everything."""
        entry = pair.move(path, way)
        plan = entry["plan"]
        self.assertGreater(entry["total-time"], 0)
        pair.prove_moved(*passed, ticks=5)
        self.assertEqual(plan["path"], "handover" if path == "baseline" else path)
        self.assertLessEqual(_FEATURES[way], {*plan["features"]}, plan)
        for left_out in choice(path, way).get("exclude", ()):
            self.assertNotIn(left_out, plan["features"])
        told = {entry["name"]: entry["reason"] for entry in plan["left-out"]}
        self.assertEqual({*told, *plan["features"]}, KNOWN)
        if path == "direct" and "multifd" in plan["features"] and "tls" not in plan["features"]:
            self.assertIn("zero-copy-send", plan["features"])
        self.assertTrue(all(told.values()), told)
        switched = way in ("postcopy", "preempt", "multifd-postcopy")
        self.assertEqual(entry["ram"]["postcopy-bytes"] > 0, switched, entry["ram"])
        if "multifd" in way:
            self.assertGreater(entry["ram"]["multifd-bytes"], 0)


class SameVersionTests(JourneyCase):
    """QEMUs of one version on both hosts."""

    def test_baseline_7_2(self) -> None:
        """With no feature, QEMU 7.2's stream takes the control connection."""
        self.journey("baseline", "precopy", by=("7.2", "7.2"))

    def test_baseline_10_0(self) -> None:
        """The same with QEMU 10.0."""
        self.journey("baseline", "precopy", by=("10.0", "10.0"))

    def test_baseline_11(self) -> None:
        """The same with QEMU 11."""
        self.journey("baseline", "precopy", by=("11", "11"))

    def test_handover_7_2(self) -> None:
        """Over one socket in QEMU's hands 7.2 moves by precopy and by postcopy."""
        self.journey("handover", "precopy", "postcopy", by=("7.2", "7.2"))

    def test_handover_10_0(self) -> None:
        """The same with QEMU 10.0."""
        self.journey("handover", "precopy", "postcopy", by=("10.0", "10.0"))

    def test_handover_11(self) -> None:
        """The same with QEMU 11."""
        self.journey("handover", "precopy", "postcopy", by=("11", "11"))

    def test_direct_7_2(self) -> None:
        """From QEMU to QEMU, 7.2 moves in every way but with preempt."""
        self.journey("direct", *_DIRECT, by=("7.2", "7.2"))

    def test_direct_10_0(self) -> None:
        """The same with QEMU 10.0."""
        self.journey("direct", *_EVERYTHING, by=("10.0", "10.0"), machine=_NEW_MACHINE)

    def test_direct_11(self) -> None:
        """The same with QEMU 11, which can have multifd along with postcopy."""
        ways = (*_EVERYTHING, "multifd-postcopy")
        self.journey("direct", *ways, by=("11", "11"), machine=_NEW_MACHINE)

    def test_relay_7_2(self) -> None:
        """Through two relays 7.2, which depends on the order of channels, moves in every way."""
        self.journey("relay", *_EVERYTHING, by=("7.2", "7.2"))

    def test_relay_10_0(self) -> None:
        """The same with QEMU 10.0, whose preempt channel comes with postcopy only."""
        self.journey("relay", *_EVERYTHING, by=("10.0", "10.0"))

    def test_relay_11(self) -> None:
        """The same with QEMU 11, which can have multifd along with postcopy."""
        self.journey("relay", *_EVERYTHING, "multifd-postcopy", by=("11", "11"))


class MixedVersionTests(JourneyCase):
    """QEMUs of different versions, there and back, with the machine type of the older one."""

    def test_baseline(self) -> None:
        """With no feature, a guest goes from any version to any other and back."""
        self.journey("baseline", "precopy", by=("7.2", "10.0"))
        self.journey("baseline", "precopy", by=("11", "7.2"))
        self.journey("baseline", "precopy", by=("10.0", "11"))

    def test_handover_7_2_and_10_0(self) -> None:
        """Over one socket 7.2 and 10.0 move to each other by precopy and postcopy."""
        self.journey("handover", "precopy", "postcopy", by=("7.2", "10.0"))

    def test_handover_7_2_and_11(self) -> None:
        """The same between 7.2 and 11."""
        self.journey("handover", "precopy", "postcopy", by=("7.2", "11"))

    def test_handover_10_0_and_11(self) -> None:
        """The same between 10.0 and 11."""
        self.journey("handover", "precopy", "postcopy", by=("10.0", "11"))

    def test_direct_7_2_and_10_0(self) -> None:
        """From QEMU to QEMU 7.2 and 10.0 move to each other in every way but with preempt."""
        self.journey("direct", *_DIRECT, by=("7.2", "10.0"))

    def test_direct_7_2_and_11(self) -> None:
        """The same between 7.2 and 11."""
        self.journey("direct", *_DIRECT, by=("7.2", "11"))

    def test_direct_10_0_and_11(self) -> None:
        """The same between 10.0 and 11."""
        self.journey("direct", *_EVERYTHING, by=("10.0", "11"), machine=_NEW_MACHINE)

    def test_relay_7_2_and_10_0(self) -> None:
        """Through relays 7.2 and 10.0 move to each other in every way."""
        self.journey("relay", *_EVERYTHING, by=("7.2", "10.0"))

    def test_relay_7_2_and_11(self) -> None:
        """The same between 7.2 and 11."""
        self.journey("relay", *_EVERYTHING, by=("7.2", "11"))

    def test_relay_10_0_and_11(self) -> None:
        """The same between 10.0 and 11."""
        self.journey("relay", *_EVERYTHING, by=("10.0", "11"))
