"""Memory guests moved by RDMA, over the lane's soft RoCE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import SkipTest

from qmigd.guests.memory.verbs import load
from tests.kernel.test_rdma import RdmaCase
from tests.rig import rdma
from tests.rig.daemons import Daemon
from tests.rig.memory import MemoryGuest, moved_whole
from tests.rig.news import ask_until
from tests.rig.pair import ENDED, NAME, choice
from tests.rig.users import locking

#: Some pages of zero bytes, others beside them, and a workload that changes one into the other.
_GUEST = ("-m", "8M", "-dirty-rate", "1M", "-pattern", "random")
_HALF = (8 << 20) // 2  # the workload has the other one
#: Bytes a second with which a move that is to be disturbed takes some seconds.
_SLOW = 1 << 20


def _pinned(guest: MemoryGuest) -> int:
    """Return how many bytes of a guest's process are pinned by devices (VmPin in proc(5))."""
    (kib,) = re.findall(r"VmPin:\s+(\d+) kB", Path(f"/proc/{guest.process.pid}/status").read_text())
    return int(kib) << 10


class MemoryTests(RdmaCase):
    def setUp(self) -> None:
        super().setUp()
        try:
            load()
        except ImportError as error:
            raise SkipTest(f"a memory guest has no RDMA here: {error}") from None

    def start(self, name: str, *argv: str, before: Sequence[str] = ()) -> MemoryGuest:
        guest = MemoryGuest(name, (*_GUEST, *argv), before=before, preloaded=True)
        self.addCleanup(guest.close)
        return guest.start()

    def begin(self, source: MemoryGuest, mode: str, bandwidth: int = 1 << 40) -> MemoryGuest:
        """Begin to move a guest to a new one; returns that."""
        self.here, self.there = self.daemons()
        destination = self.start("there", "-incoming", "defer")
        for daemon, guest in ((self.here, source), (self.there, destination)):
            daemon.execute("guest-add", name=NAME, qmp=f"unix:{guest.qmp_path}")
        tunables = {"max-bandwidth": bandwidth, "downtime-limit": 1000}
        self.migration = self.here.execute(
            "migrate", guest=NAME, uri=self.there.uri, tunables=tunables, **choice("direct", mode)
        )["id"]
        return destination

    def ended(self, *statuses: str) -> dict[str, Any]:
        """Wait for the end on both sides, and return what the source says."""
        said = self.entry(self.here, *ENDED)
        self.assertIn(said["status"], statuses, said)
        self.entry(self.there, *statuses)
        return said

    def entry(self, daemon: Daemon, *statuses: str) -> dict[str, Any]:
        """Wait until a side has one of these statuses, and return what it says."""

        def ask() -> dict[str, Any]:
            return dict(daemon.execute("query-migrate", id=self.migration)[0])

        def look() -> dict[str, Any]:
            entry = ask()
            return entry if entry["status"] in statuses else {}

        return ask_until(look, lambda: f"{statuses} at {daemon.name}: {ask()}")

    def disturbed(self, source: MemoryGuest) -> None:
        """Begin a move that takes a while, and return once pages are under way."""
        self.begin(source, "rdma", _SLOW)
        entry = self.entry(self.here, "active", *ENDED)
        self.assertEqual("active", entry["status"], entry)
        ask_until(lambda: _pinned(source) > 0, "RAM that is registered")

    def test_there_and_back(self) -> None:
        """Its RAM is right, registered piece by piece or all at once; nothing stays pinned."""
        source = self.start("here")
        for mode in ("rdma", "rdma-pin-all"):
            destination = self.begin(source, mode)
            plan = self.ended("completed")["plan"]
            self.assertEqual(self.address, plan["agreements"]["rdma"]["address"])
            self.assertEqual(mode == "rdma-pin-all", "rdma-pin-all" in plan["features"])
            moved_whole(source, destination)
            self.assertEqual(source.ram()[:_HALF], destination.ram()[:_HALF])
            self.assertEqual([0, 0], [_pinned(one) for one in (source, destination)])
            source = destination

    def test_locked_memory(self) -> None:
        """The limit that is asked for is enough to pin it all; with less there is no RDMA."""
        poor = self.start("poor", before=locking(8 << 20))
        here, _ = self.daemons()
        here.execute("guest-add", name=NAME, qmp=f"unix:{poor.qmp_path}")
        features = here.execute("query-features", guest=NAME)["features"]
        (reason,) = [one["reason"] for one in features if one["name"] == "rdma"]
        self.assertIn("its locked-memory limit is 8 MiB, and 9 MiB are needed", reason)
        poor.close()
        source = self.start("here", before=locking(9 << 20))
        destination = self.begin(source, "rdma-pin-all")
        self.assertIn("rdma-pin-all", self.ended("completed")["plan"]["features"])
        moved_whole(source, destination)

    def test_disturbed(self) -> None:
        """After a cancel, and when the link is cut, it goes on where it is."""
        source = self.start("here", "-fill", "random")
        self.disturbed(source)
        self.here.execute("migrate-cancel", guest=NAME)
        self.ended("cancelled", "failed")
        self.goes_on(source)
        self.disturbed(source)
        self.addCleanup(rdma.up)
        rdma.down()
        self.ended("failed")
        # Which guest's end qmigd hears of first is chance, and that one is its reason.
        self.assertIn("RDMA failed: ", source.qmp("query-migrate")["error-desc"])
        self.goes_on(source)

    def goes_on(self, source: MemoryGuest) -> None:
        ask_until(lambda: source.status() == "running", "the guest to go on")
        source.wait_ticks(2)
        source.check()
        self.assertEqual(0, _pinned(source))
