"""Guests moved through relays by each mover, and what the plan says of it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from tests.rig.daemons import Daemon
from tests.rig.news import ask_until
from tests.rig.pair import NAME, SLOW, Pair, PairCase
from tests.rig.zero_copy import measured, remember

FEATURE = "zero-copy-receive"


class ZeroCopyCase(PairCase):
    def agreed(self, pair: Pair) -> dict[str, Any] | None:
        """What the plan has agreed on, or ``None`` if the feature was left out."""
        agreed: dict[str, Any] | None = pair.entry(pair.here)["plan"]["agreements"].get(FEATURE)
        self.assertEqual(agreed, pair.entry(pair.there)["plan"]["agreements"].get(FEATURE))
        return agreed

    def left_out(self, pair: Pair) -> str:
        """Why it was left out."""
        plan = pair.entry(pair.here)["plan"]
        (reason,) = [one["reason"] for one in plan["left-out"] if one["name"] == FEATURE]
        return str(reason)

    def journey(self, mover: str, mode: str) -> None:
        """Move a guest with this mover configured at both ends, and look at everything."""
        settings = {"zero_copy": mover}
        pair = self.pair("7.2", here=settings, there=settings).start()
        pair.move("relay", mode)
        self.assertEqual(self.agreed(pair), {"send": mover, "receive": mover})
        pair.prove_moved()


class ConfiguredTests(ZeroCopyCase):
    """A mover that is configured moves guests, in every way."""

    def test_splice_precopy(self) -> None:
        """One channel, spliced at both ends."""
        self.journey("splice", "precopy")

    def test_splice_multifd(self) -> None:
        """Several channels, spliced at both ends."""
        self.journey("splice", "multifd")

    def test_splice_preempt(self) -> None:
        """Postcopy, whose pages are waited for, with its own channel."""
        self.journey("splice", "preempt")

    def test_zerocopy_precopy(self) -> None:
        """One channel, sent with MSG_ZEROCOPY and received with TCP_ZEROCOPY_RECEIVE."""
        self.journey("zerocopy", "precopy")

    def test_zerocopy_multifd(self) -> None:
        """The same with several channels."""
        self.journey("zerocopy", "multifd")

    def test_zerocopy_preempt(self) -> None:
        """The same with postcopy and its own channel."""
        self.journey("zerocopy", "preempt")


class DoneTests(ZeroCopyCase):
    """What the plan says is what the daemons do."""

    def traces(self, daemon: Daemon) -> tuple[int, int]:
        """How many ends of pipes a daemon has open, and how many sockets it has mapped."""
        process = Path("/proc", str(daemon.process.pid))
        targets = []
        for entry in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                targets.append(os.readlink(entry))
        pipes = sum(target.startswith("pipe:") for target in targets)
        return pipes, (process / "maps").read_text().count("socket:[")

    def grown(self, here: str, there: str) -> list[tuple[int, int]]:
        """By how much those have become more on both sides while a guest is being moved."""
        pair = self.pair("7.2", here={"zero_copy": here}, there={"zero_copy": there}).start()
        before = [self.traces(daemon) for daemon in (pair.here, pair.there)]
        pair.begin("relay", bandwidth=SLOW, exclude=["multifd", "postcopy-preempt"])
        pair.wait(pair.there, "active")
        # More than QEMU's own socket holds: the source's relay moves it on.
        ask_until(
            lambda: pair.entry(pair.here).get("ram", {}).get("transferred", 0) > 1 << 20,
            "a MiB to be sent",
        )
        now = [self.traces(daemon) for daemon in (pair.here, pair.there)]
        pair.cancel()
        pair.ended(pair.here)
        pair.prove_stayed()
        return [(a[0] - b[0], a[1] - b[1]) for a, b in zip(now, before, strict=True)]

    def test_splice(self) -> None:
        """Who splices has one pipe for the one channel: what comes back is copied."""
        self.assertEqual(self.grown("splice", "splice"), [(2, 0), (2, 0)])

    def test_zerocopy(self) -> None:
        """Who receives without a copy has its socket mapped."""
        self.assertEqual(self.grown("zerocopy", "zerocopy"), [(0, 0), (0, 1)])

    def test_each_its_own(self) -> None:
        """The two sides need not do the same."""
        self.assertEqual(self.grown("splice", "zerocopy"), [(2, 0), (0, 1)])

    def test_copy(self) -> None:
        """Where one side has it switched off, neither does anything of it."""
        self.assertEqual(self.grown("splice", "off"), [(0, 0), (0, 0)])


class MeasuredTests(ZeroCopyCase):
    """What was measured decides, on each side for itself."""

    def measured_pair(self, here: dict[str, float], there: dict[str, float]) -> Pair:
        """Two daemons, each of which has measured what other movers cost."""
        settings = {"zero_copy": "measure"}
        pair = self.pair("7.2", here=settings, there=settings)
        remember(pair.here, measured(**here))
        remember(pair.there, measured(**there))
        return pair.start()

    def test_gains(self) -> None:
        """Where another way is cheaper on both hosts, each takes its own."""
        pair = self.measured_pair({"splice": 0.7}, {"zerocopy": 0.6, "splice": 0.8})
        pair.move("relay")
        self.assertEqual(self.agreed(pair), {"send": "splice", "receive": "zerocopy"})
        pair.prove_moved()

    def test_copy_is_cheaper(self) -> None:
        """Where a copy is cheaper, the plan says so, with the numbers and the side."""
        for here, there, side in (
            ({"splice": 1.28}, {"splice": 0.7}, "source"),
            ({"splice": 0.7}, {"splice": 1.28}, "destination"),
        ):
            pair = self.measured_pair(here, there)
            pair.move("relay")
            self.assertIsNone(self.agreed(pair))
            reason = self.left_out(pair)
            self.assertIn(side, reason)
            if side == "source":
                self.assertIn("a copy is cheaper on this kernel", reason)
                self.assertIn("0.50 CPU s for each GiB against 0.64 by splice", reason)
            pair.prove_moved()

    def test_no_reason_for_a_relay(self) -> None:
        """What it saves in a relay is no reason to take one; whoever prefers it gets it."""
        pair = self.measured_pair({"splice": 0.7}, {"splice": 0.7})
        features = pair.here.execute("query-features", guest=NAME, uri=pair.there.uri)
        (ours,) = [one for one in features["features"] if one["name"] == FEATURE]
        self.assertTrue(ours["offered"])
        self.assertFalse(ours["selected"])
        self.assertIn("it gains on the path relay only", ours["reason"])
        self.assertEqual(features["path"], "handover")
        pair.begin("", require=[], exclude=[], prefer=[FEATURE])
        self.assertEqual(pair.completed()["plan"]["path"], "relay")
        pair.prove_moved()
