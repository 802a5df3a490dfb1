"""A QEMU that refuses what its capabilities promise: the move goes on without that.

Postcopy is the case in practice: the capability is there, but the destination's QEMU
needs userfaultfd, which many hosts keep from ordinary users.  Here the QEMU runs in a
user namespace, where it is an ordinary user to the host, and behind a proxy, so that
its daemon cannot find that out beforehand.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any
from unittest import SkipTest

from tests.rig.case import RigCase
from tests.rig.daemons import Daemon
from tests.rig.guest import Guest
from tests.rig.news import wait_until
from tests.rig.proofs import counted_without_a_gap, only_one_runs
from tests.rig.proxy import Proxy
from tests.rig.qemus import require
from tests.rig.users import by

_UNPRIVILEGED = ("unshare", "--user", "--map-root-user")
_SWITCH = Path("/proc/sys/vm/unprivileged_userfaultfd")


class RefusedTests(RigCase):
    def setUp(self) -> None:
        if subprocess.run([*_UNPRIVILEGED, "true"], check=False, capture_output=True).returncode:
            raise SkipTest("this host makes no user namespaces for this user")
        if not _SWITCH.exists() or _SWITCH.read_text().strip() != "0":
            raise SkipTest(f"{_SWITCH} is not 0: userfaultfd is for everybody here")

    def waiting(self) -> Guest:
        qemu = by(require("7.2"), *_UNPRIVILEGED)
        return self.guest(qemu, "there", incoming=True).start()

    def daemon_of(self, guest: Guest) -> Daemon:
        proxy = Proxy(guest.qmp_path)
        self.addCleanup(proxy.close)
        return self.daemon(guest.name, guests={"vm": {"qmp": proxy.uri}}).start()

    def end(self, source: Daemon) -> dict[str, Any]:
        """Return what the source says of the migration once it has ended."""

        def ended() -> dict[str, Any]:
            (entry,) = source.execute("query-migrate", guest="vm")
            return entry if "ended" in entry else {}

        return wait_until(ended, lambda: f"the end of the migration; {source.log}")

    def test_refused(self) -> None:
        """What QEMU refuses is given up with QEMU's reason; what it stood in the way of is used."""
        here, there = self.guest(require("7.2"), "here").start(), self.waiting()
        source, destination = self.daemon_of(here), self.daemon_of(there)
        before = there.qmp("query-migrate-capabilities")

        # for the pair, without a migration: nothing is left set
        answer = source.execute("query-features", guest="vm", uri=destination.uri)
        features = {one["name"]: one for one in answer["features"]}
        self.assertFalse(features["postcopy-ram"]["selected"])
        self.assertIn("Postcopy is not supported", features["postcopy-ram"]["reason"])
        self.assertTrue(features["multifd"]["selected"])
        self.assertEqual(before, there.qmp("query-migrate-capabilities"))

        source.execute("migrate", guest="vm", uri=destination.uri)
        entry = self.end(source)
        self.assertEqual("completed", entry["status"], entry)
        self.assertEqual(["multifd", "zero-copy-send"], entry["plan"]["features"])
        reasons = {one["name"]: one["reason"] for one in entry["plan"]["left-out"]}
        self.assertEqual(
            "destination process: the guest's process refused migrate-set-capabilities: "
            "Postcopy is not supported",
            reasons["postcopy-ram"],
        )
        self.assertEqual(
            "conflict: it needs postcopy-ram, which cannot be had", reasons["postcopy-preempt"]
        )
        only_one_runs(there, here)
        counted_without_a_gap(here, there)
        there.check_ram()

    def test_required(self) -> None:
        """Where it is required, the migration is refused, and the guest stays; here in-band."""
        self.in_band = True
        here, there = self.guest(require("7.2"), "here").start(), self.waiting()
        source, destination = self.daemon_of(here), self.daemon_of(there)
        source.execute("migrate", guest="vm", uri=destination.uri, require=["postcopy-ram"])
        entry = self.end(source)
        self.assertEqual("failed", entry["status"])
        self.assertIn("postcopy-ram is required but cannot be had", entry["error"]["desc"])
        self.assertIn("Postcopy is not supported", entry["error"]["desc"])
        only_one_runs(here, there)
        self.assertEqual("inmigrate", there.status())
