"""Moves by RDMA, over a soft RoCE device: by real daemons and real QEMUs, and by QEMU alone."""

from __future__ import annotations

import signal
from typing import Any

from qmigd.features.rdma import locked_memory
from qmigd.guests.describe import parse_ram_blocks
from qmigd.interfaces import GuestFacts
from tests.rig import rdma
from tests.rig.bootsector import Program
from tests.rig.daemons import Daemon
from tests.rig.guest import Guest
from tests.rig.lane import KernelCase
from tests.rig.news import Hang
from tests.rig.pair import ENDED, NAME, SLOW, Pair, PairCase, start
from tests.rig.qmp import QmpError
from tests.rig.users import by, for_everybody, ordinary

#: What leads to RDMA without and with all RAM pinned, and what the plan then is.
_WISHES: dict[str, dict[str, Any]] = {
    "rdma": {"prefer": ["rdma"], "require": [], "exclude": ["rdma-pin-all"]},
    "rdma-pin-all": {"prefer": ["rdma"], "require": [], "exclude": []},
}
#: Seconds without an answer after which a QEMU counts as hung; it stays so.
_HUNG = 5.0

_FEATURES = {"rdma": ["rdma"], "rdma-pin-all": ["rdma", "rdma-pin-all"]}


class RdmaCase(KernelCase, PairCase):
    """Has a device, and two daemons that know it, for all tests: starting one takes seconds.

    The handshake is in its in-band form in one direction.
    """

    _daemons: tuple[Daemon, Daemon] | None = None

    def setUp(self) -> None:
        self.address = rdma.soft_roce()

    def daemons(self) -> tuple[Daemon, Daemon]:
        """Return the source's daemon and the destination's, without guests."""
        if RdmaCase._daemons is None:
            deadlines: dict[str, Any] = {"guest_deadline": 4, "peer_deadline": 6}
            here, there = (
                Daemon(name, preloaded=True, in_band=in_band, **deadlines)
                for name, in_band in (("source's qmigd", False), ("other", True))
            )
            start(here, there)
            RdmaCase._daemons = here, there
        for daemon in RdmaCase._daemons:
            for guest in daemon.execute("query-guests"):
                daemon.execute("guest-remove", name=guest["name"])
        return RdmaCase._daemons

    def one(self, label: str, name: str, **options: Any) -> Guest:
        """Prepare a guest whose QEMU can use the device."""
        guest = self.noisy_guest(label, name, **options)
        guest.qemu = rdma.require(label)
        return guest

    def without(self, label: str, name: str, **options: Any) -> Guest:
        """Prepare a guest whose QEMU sees no RDMA device."""
        guest = self.one(label, name, **options)
        script = 'mount -t tmpfs none /dev/infiniband && exec "$@"'
        guest.qemu = by(guest.qemu, "unshare", "--mount", "sh", "-c", script, "sh")
        return guest

    def two(self, source: Guest, destination: Guest) -> Pair:
        """Start them, and let the daemons have them."""
        start(source, destination)
        pair = Pair(*self.daemons(), source, destination)
        pair.remember()
        pair.add()
        return pair

    def pair_of(self, label: str) -> Pair:
        """Start a pair of one version."""
        return self.two(self.one(label, "source"), self.one(label, "there", incoming=True))


class MoveTests(RdmaCase):
    def test_journey(self) -> None:
        """A guest goes by every QEMU and back, pinned or not, whole, and runs once at a time."""
        legs = (
            ("7.2", "rdma"), ("10.0", "rdma-pin-all"), ("11", "rdma"), ("10.0", "rdma"),
            ("7.2", "rdma-pin-all"),
        )  # fmt: skip
        here, there = self.daemons()
        guest = self.one("7.2", "start").start()
        here.execute("guest-add", name=NAME, qmp=f"unix:{guest.qmp_path}")
        passed = [guest]
        for number, (label, way) in enumerate(legs):
            destination = self.one(label, f"stop {number}", incoming=True).start()
            there.execute("guest-add", name=NAME, qmp=f"unix:{destination.qmp_path}")
            self.leg(here, there, passed, destination, way)
            passed[-1].close()
            passed.append(destination)
            here.execute("guest-remove", name=NAME)
            here, there = there, here

    def leg(
        self, here: Daemon, there: Daemon, passed: list[Guest], destination: Guest, way: str
    ) -> None:
        """Move the guest once, and look at everything."""
        source = passed[-1]
        pair = Pair(here, there, source, destination)
        pair.remember()
        pair.begin("", **_WISHES[way])
        plan = pair.completed()["plan"]
        self.assertEqual((plan["path"], plan["features"]), ("direct", _FEATURES[way]))
        agreed = plan["agreements"]["rdma"]
        self.assertEqual(agreed["address"], self.address)
        old = any(guest.qemu.label == "7.2" for guest in (source, destination))
        self.assertEqual(agreed["return-path"], not old)
        pair.prove_moved(*passed, ticks=5)

    def test_on_request(self) -> None:
        """It is offered, and not taken by itself; what is required cannot be excluded as well."""
        pair = self.pair_of("10.0")
        answer = pair.here.execute("query-features", guest=NAME, uri=pair.there.uri)
        features = {one["name"]: one for one in answer["features"]}
        for name in _FEATURES["rdma-pin-all"]:
            found = features[name]
            self.assertEqual((found["offered"], found["selected"]), (True, False))
            self.assertEqual(found["where"], "policy")
            self.assertIn("--prefer rdma", found["reason"])
        pair.begin("", prefer=[], require=["rdma"], exclude=["direct"])
        self.assertIn("rdma is required but cannot be had: path:", pair.failed(pair.here))
        pair.begin("", prefer=["multifd"], require=["rdma"], exclude=[])
        plan = pair.completed()["plan"]
        self.assertEqual(plan["features"], _FEATURES["rdma-pin-all"])
        left_out = {one["name"]: one["reason"] for one in plan["left-out"]}
        self.assertEqual(left_out["multifd"], "conflict: it cannot be combined with rdma")
        pair.prove_moved()


class FailureTests(RdmaCase):
    """RDMA that does not come about: the guest stays, and the reason says what failed."""

    def refused(self, pair: Pair) -> str:
        pair.begin("", **_WISHES["rdma"])
        reason = pair.failed(pair.here)
        pair.prove_stayed()
        return reason

    def test_source_cannot_connect(self) -> None:
        """A source's QEMU that may not use the device says so."""
        source = self.without("7.2", "source")
        reason = self.refused(self.two(source, self.one("7.2", "there", incoming=True)))
        self.assertIn(f"the guest cannot migrate to rdma:{self.address}:", reason)
        self.assertIn("RDMA ERROR", reason)
        self.assertIn("'--exclude rdma'", reason)

    def test_destination_cannot_listen(self) -> None:
        """The same at the destination."""
        destination = self.without("10.0", "there", incoming=True)
        reason = self.refused(self.two(self.one("10.0", "source"), destination))
        self.assertIn("the destination failed", reason)
        self.assertIn("RDMA ERROR", reason)

    def test_device_down(self) -> None:
        """A device that goes down once the daemons know it."""
        # To be done last, when no QEMU has the device any more.
        self.addCleanup(rdma.up)
        pair = self.pair_of("11")
        rdma.down()
        self.assertIn("RDMA ERROR", self.refused(pair))

    def test_destination_hangs(self) -> None:
        """A destination's QEMU that stops in the middle is given up by the deadlines."""
        pair = self.pair_of("10.0")
        pair.begin("", bandwidth=SLOW, **_WISHES["rdma"])
        pair.wait(pair.here, "active")
        pair.destination.process.signal(signal.SIGSTOP)
        self.assertIn("nothing has moved for", pair.failed(pair.here))
        pair.source.wait_running()
        pair.destination.kill()
        pair.prove_stayed()


class LockedMemoryTests(RdmaCase):
    """What both QEMUs have to be able to lock."""

    def limited(self, label: str, name: str, memlock: int, **options: Any) -> Guest:
        """Prepare a guest in an ordinary user's QEMU."""
        guest = self.one(label, name, **options)
        guest.qemu = ordinary(guest.qemu, memlock=memlock)
        return for_everybody(guest)

    def needed(self, guest: Guest) -> int:
        """Return how many bytes are asked for."""
        command = {"command-line": "info ramblock"}
        ram = parse_ram_blocks(guest.qmp("human-monitor-command", command))
        needed = locked_memory(GuestFacts("", "qemu", (0, 0, 0), "", {}, {}, ram=ram))
        assert needed is not None
        return needed

    def test_just_enough(self) -> None:
        """With what is asked for on both sides the guest moves, all of its RAM pinned."""
        with self.one("7.2", "measured").start() as measured:
            needed = self.needed(measured)
        source = self.limited("7.2", "source", needed)
        pair = self.two(source, self.limited("7.2", "there", needed, incoming=True))
        pair.begin("", **_WISHES["rdma-pin-all"])
        self.assertEqual(pair.completed()["plan"]["features"], _FEATURES["rdma-pin-all"])
        pair.prove_moved()

    def test_too_low(self) -> None:
        """With less it is refused, with both numbers, and the move goes on without."""
        source = self.limited("7.2", "source", 40 << 20)
        pair = self.two(source, self.one("7.2", "there", incoming=True))
        pair.begin("", **_WISHES["rdma"])
        plan = pair.completed()["plan"]
        (reason,) = [one["reason"] for one in plan["left-out"] if one["name"] == "rdma"]
        self.assertRegex(
            reason, r"source process: its locked-memory limit is 40 MiB, and 4\d MiB are needed"
        )
        pair.prove_moved()


class QuirkTests(RdmaCase):
    """What QEMU alone does where this is not kept away from it."""

    def alone(self, source: Guest, destination: Guest, *capabilities: str) -> None:
        """Begin a move."""
        start(source, destination)
        for guest in (destination, source):
            guest.set_capabilities("events", *capabilities)
        uri = f"rdma:{self.address}:16514"
        destination.qmp("migrate-incoming", uri=uri)
        source.qmp("migrate", uri=uri)

    def test_return_path_of_7_2(self) -> None:
        """With return-path 7.2 fails at once, without a reason."""
        source, destination = self.one("7.2", "source"), self.one("7.2", "there", incoming=True)
        self.alone(source, destination, "return-path")
        source.wait_migration("failed")
        self.assertNotIn("error-desc", source.qmp("query-migrate"))
        self.assertTrue(source.running())

    def test_return_path_into_7_2(self) -> None:
        """A newer one waits for 5 s for a 7.2 that does not know of a second connection."""
        source, destination = self.one("10.0", "source"), self.one("7.2", "there", incoming=True)
        error = self.assertRaises(QmpError, self.alone, source, destination, "return-path")
        self.assertIn("cm event", error.text)

    def test_too_little_locked_memory(self) -> None:
        """7.2 fails half-way; 11 as the source hangs, and its guest can only be killed."""
        options: dict[str, Any] = {"memory": 48, "program": Program(pages=3072)}
        for label in ("7.2", "11"):
            source = self.one(label, "source", **options)
            source.qemu = ordinary(source.qemu, memlock=8 << 20)
            destination = self.one(label, "there", incoming=True, **options)
            if label == "7.2":
                self.alone(for_everybody(source), destination)
                source.wait_migration("failed")
                self.assertTrue(source.running())
            else:
                self.alone(for_everybody(source), destination, "return-path")
                self.assertRaises(Hang, self.answers, source)

    def answers(self, guest: Guest) -> None:
        """Ask until the migration is over."""
        while guest.qmp("query-migrate", deadline=_HUNG)["status"] not in ENDED:
            pass
