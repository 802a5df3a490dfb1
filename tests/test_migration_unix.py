"""Two daemons on one host, or in two containers of one, that speak over a unix socket."""

from __future__ import annotations

from typing import Any

from tests.rig.case import RigCase
from tests.rig.news import wait_until
from tests.rig.proofs import counted_without_a_gap, only_one_runs
from tests.rig.qemus import require


class UnixCase(RigCase):
    def migrate(self, **more: Any) -> dict[str, Any]:
        """Move a guest, check it, and return what the source says."""
        qemu = require("7.2")
        here, there = self.guest(qemu, "here"), self.guest(qemu, "there", incoming=True)
        here.start()
        there.start()
        source = self.daemon("source", guests={"vm": {"qmp": f"unix:{here.qmp_path}"}}).start()
        uri = f"{'in-band:' if self.in_band else ''}unix:{here.directory}/peer"
        self.daemon(
            "destination", guests={"vm": {"qmp": f"unix:{there.qmp_path}"}}, listen=[uri]
        ).start()
        source.execute("migrate", guest="vm", uri=uri, **more)

        def ended() -> dict[str, Any]:
            (entry,) = source.execute("query-migrate", guest="vm")
            return entry if "ended" in entry else {}

        entry = wait_until(ended, lambda: f"the end of the migration; {source.log}")
        self.assertEqual("completed", entry["status"], entry)
        only_one_runs(there, here)
        counted_without_a_gap(here, there)
        there.check_ram()
        return entry["plan"]


class UnixTests(UnixCase):
    def test_relay(self) -> None:
        """Several channels go through the relay, since the QEMUs have no address to meet at."""
        plan = self.migrate(prefer=["postcopy-preempt"])
        self.assertEqual("relay", plan["path"])
        self.assertIn("not direct: the two daemons speak over a unix socket", plan["path-reason"])

    def test_handover(self) -> None:
        """One channel is handed over."""
        self.assertEqual("handover", self.migrate(require=["handover"])["path"])

    def test_baseline(self) -> None:
        """With no feature selected, the very connection is."""
        plan = self.migrate(exclude=["multifd", "postcopy-ram", "postcopy-preempt"])
        self.assertEqual("handover", plan["path"])
        self.assertEqual([], plan["features"])


class InBandTests(UnixCase):
    """In the handshake's other form."""

    in_band = True

    def test_relay(self) -> None:
        """Every channel begins in-band."""
        plan = self.migrate(require=["multifd"])
        self.assertEqual("relay", plan["path"])
