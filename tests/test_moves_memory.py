"""Whole moves of memory guests between two daemons: the same paths and faults as with QEMU.

Nothing here waits for a guest to boot, so that one pair of daemons can move its guest many
times, there and back.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.rig.case import RigCase
from tests.rig.certificates import Authority
from tests.rig.daemons import Daemon
from tests.rig.memory import MemoryGuest, moved_whole
from tests.rig.news import ask_until
from tests.rig.pair import ENDED, SLOW, choice, start

_GUEST: Mapping[str, Any] = {"size": "32M", "dirty-rate": "16M/s", "pattern": "random"}


class MemoryMoves(RigCase):
    """Two daemons that know the same guest; it runs at the first one.

    The second one listens for the handshake's in-band form.
    """

    def two(self, guest: Mapping[str, Any] = _GUEST, **options: Any) -> None:
        self.here = self.daemon("here", guests={"vm": {"memory": guest}}, **options)
        waiting = {"memory": {**guest, "incoming": True}}
        self.in_band = True
        self.there = self.daemon("there", guests={"vm": waiting}, **options)
        self.source, self.destination = MemoryGuest.of(self.here), MemoryGuest.of(self.there)
        for one in (self.source, self.destination):
            self.addCleanup(one.close)
        start(self.here, self.there)
        ask_until(lambda: self.source.status() == "running", "the guest to run")

    def turn(self) -> None:
        """What was the destination is the source from now on."""
        self.here, self.there = self.there, self.here
        self.source, self.destination = self.destination, self.source

    def begin(self, path: str, mode: str = "precopy", **tunables: Any) -> str:
        values = {"max-bandwidth": 1 << 40, "downtime-limit": 1000, **tunables}
        done = self.here.execute(
            "migrate", guest="vm", uri=self.there.uri, tunables=values, **choice(path, mode)
        )
        return str(done["id"])

    def entry(self, daemon: Daemon, migration: str) -> dict[str, Any]:
        found = daemon.execute("query-migrate", id=migration)
        return dict(found[0])

    def active(self, migration: str) -> None:
        ask_until(
            lambda: self.entry(self.here, migration)["status"] in ("active", *ENDED), "a stream"
        )

    def ended(self, daemon: Daemon, migration: str) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            entry = self.entry(daemon, migration)
            return entry if entry["status"] in ENDED else {}

        return ask_until(look, lambda: f"its end at {daemon.name}; {daemon.log}")

    def move(self, path: str, mode: str = "precopy") -> dict[str, Any]:
        """Move it, see that it has gone over whole, and return what the source says."""
        postcopy = "postcopy" in mode or mode == "preempt"
        migration = self.begin(path, mode, **({"max-bandwidth": SLOW} if postcopy else {}))
        if postcopy:
            self.active(migration)
            self.here.execute("migrate-start-postcopy", guest="vm")
        for daemon in (self.here, self.there):
            entry = self.ended(daemon, migration)
            self.assertEqual("completed", entry["status"], entry)
        moved_whole(self.source, self.destination)
        return self.entry(self.here, migration)

    def stayed(self) -> None:
        """It runs at the source alone, and its RAM is right."""
        ask_until(lambda: self.source.status() == "running", "the guest to go on")
        self.source.wait_ticks(2)
        self.source.check()
        self.assertNotEqual("running", self.destination.status())


class PathTests(MemoryMoves):
    def test_there_and_back(self) -> None:
        """Every path and every way to move, with one guest; the plan is what was asked for.

        Who is asked what there is gets it as from a QEMU.
        """
        self.two()
        (shown,) = self.here.execute("query-guests")
        self.assertEqual(("memory", "running"), (shown["backend"], shown["state"]))
        (shown,) = self.there.execute("query-guests")
        self.assertEqual(("memory", "not-started"), (shown["backend"], shown["state"]))
        tunables = {one["name"]: one for one in self.here.execute("query-tunables", guest="vm")}
        self.assertEqual(["none", "zlib", "zstd"], tunables["multifd-compression"]["values"])
        self.assertEqual(300, tunables["downtime-limit"]["value"])
        settings = self.source.qmp("query-migrate-capabilities")
        for path, mode in (
            ("handover", "precopy"),
            ("direct", "multifd"),
            ("relay", "preempt"),
            ("handover", "postcopy"),
            ("relay", "multifd"),
            ("direct", "multifd-postcopy"),
        ):
            plan = self.move(path, mode)["plan"]
            self.assertEqual(path, plan["path"])
            self.assertEqual(path == "direct", "zero-copy-send" in plan["features"])
            for guest in (self.source, self.destination):
                # As they were before.
                self.assertEqual(settings, guest.qmp("query-migrate-capabilities"))
            self.turn()
        # With no feature at all it goes over the control connection itself.
        self.move("baseline")
        places = self.destination.clock()["places"]
        self.assertEqual(8, len(places), places)


class SecuredTests(MemoryMoves):
    """The same in TLS, negotiated in the handshake's in-band form."""

    in_band = True

    def setUp(self) -> None:
        self.authority = Authority(self.mktemp())

    def daemon(self, name: str = "qmigd", **options: Any) -> Daemon:
        return super().daemon(name, tls=self.authority.host("127.0.0.1").table(), **options)

    def test_there_and_back(self) -> None:
        """Every way to move goes through a relay, with all of its channels."""
        self.two()
        for mode in ("precopy", "multifd", "preempt", "multifd-postcopy"):
            plan = self.move("relay", mode)["plan"]
            self.assertIn("tls", plan["features"])
            self.assertEqual("relay", plan["path"])
            self.turn()


class FaultTests(MemoryMoves):
    def slow(self) -> str:
        """Begin a move that does not end by itself."""
        guest = {**_GUEST, "fill": "random"}
        self.two(guest, peer_deadline=2.0, handshake_deadline=2.0, guest_deadline=2.0)
        migration = self.begin("relay", "multifd", **{"max-bandwidth": SLOW, "downtime-limit": 1})
        self.active(migration)
        return migration

    def again(self) -> None:
        """A second try succeeds."""
        self.move("direct")

    def test_cancel(self) -> None:
        """A user's cancel leaves the guest here, and a second try succeeds."""
        migration = self.slow()
        self.here.execute("migrate-cancel", guest="vm")
        self.assertEqual("cancelled", self.ended(self.here, migration)["status"])
        self.ended(self.there, migration)
        self.stayed()
        self.again()

    def test_destination_killed(self) -> None:
        """So does the end of the guest's process at the destination."""
        migration = self.slow()
        pid = int(self.destination.clock()["here"].partition(":")[2])
        os.kill(pid, signal.SIGKILL)
        said = [self.ended(daemon, migration) for daemon in (self.here, self.there)]
        self.assertEqual(["failed", "failed"], [entry["status"] for entry in said])
        self.assertNotIn("QEMU", json.dumps(said))  # of which there is none
        self.stayed()
        self.again()

    def test_daemons_killed(self) -> None:
        """And that of either qmigd; guests outlive daemons."""
        migration = self.slow()
        self.there.kill()
        self.assertEqual("failed", self.ended(self.here, migration)["status"])
        self.stayed()
        self.there.start()
        self.here.kill()
        self.here.start()
        self.stayed()
        self.again()


class LifeTests(MemoryMoves):
    def test_saved(self) -> None:
        """It is saved into a file and restored, and qmigctl inspect says what is in the file."""
        self.two()
        path = os.path.join(self.here.directory, "saved")
        done = self.here.execute("save", guest="vm", file=path, after="quit")
        said = self.ended(self.here, done["id"])
        self.assertEqual("completed", said["status"])
        self.assertNotIn("QEMU", json.dumps(said))
        qmigctl = Path(sys.executable).with_name("qmigctl")
        shown = json.loads(subprocess.check_output([qmigctl, "inspect", "--json", path]))
        self.assertEqual("qmigd-memory-1", shown["machine"])
        ask_until(lambda: self.source.status() == "gone", "its process to end")
        done = self.here.execute("restore", guest="vm", file=path)
        self.assertEqual("completed", self.ended(self.here, done["id"])["status"])
        self.source.wait_ticks(2)
        self.source.check()
        first, second = self.source.clock()["places"]
        self.assertEqual(first["to"], second["from"])

    def test_does_not_start(self) -> None:
        """Why it does not is in the log, and is told whoever asks, or wants to move it in."""
        guest = {"memory": {"size": "64T"}}
        waiting = {"memory": {"size": "64T", "incoming": True}}
        self.two()
        there = self.daemon("third", guests={"much": guest, "vm": waiting})
        there.start()
        reason = "there is no room for its 67108864 MiB of RAM"

        def told() -> str:
            shown = {one["name"]: one for one in there.execute("query-guests")}
            return str(shown["much"].get("reason", ""))

        ask_until(told, lambda: f"a reason; {there.log}")
        self.assertIn("the process of guest much ended as soon as it was started", told())
        self.assertIn(reason, told())
        self.assertIn(reason, there.log)
        self.there = there
        failed = self.ended(self.here, self.begin("direct"))
        self.assertIn("the process of guest vm ended as soon", failed["error"]["desc"])
        self.stayed()

    def test_is_not_started_twice(self) -> None:
        """A guest that was moved away and whose process has ended stays away, until it returns."""
        self.two(policy={"source-after": "quit"})
        migration = self.begin("handover")
        self.assertEqual("completed", self.ended(self.here, migration)["status"])
        ask_until(lambda: self.source.status() == "gone", "the source's process to end")
        self.here.restart()
        self.there.restart()
        (shown,) = self.here.execute("query-guests")
        self.assertEqual("not-started", shown["state"])
        self.assertEqual("it was moved away from here", shown["reason"])
        moved_whole(self.source, self.destination, ended=True)
        self.turn()
        migration = self.begin("handover")
        self.assertEqual("completed", self.ended(self.here, migration)["status"])
        moved_whole(self.source, self.destination, ended=True)
