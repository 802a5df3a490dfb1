"""What moves bytes in a daemon's relays: configured, remembered or measured."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase, TestCase

from qmigd.channels.calibration import DIRECTIONS, Measuring
from qmigd.daemon.zero_copy import Movers, decide, identity, read, write
from qmigd.interfaces import KERNEL, POLICY, ZeroCopy
from tests.rig.case import RigCase
from tests.rig.news import ask_until
from tests.rig.zero_copy import measured, remember

NAME = "zero-copy-receive"


class FileTests(SynchronousTestCase):
    """The file in the state directory."""

    def setUp(self) -> None:
        """A directory for it."""
        self.path = Path(self.mktemp())
        self.path.mkdir()
        self.path /= "zero-copy.json"

    def test_round_trip(self) -> None:
        """What was measured is read back as it was, lacking movers included."""
        for one in (measured(splice=0.7), measured(splice=1.25, zerocopy=0.5)):
            write(self.path, one)
            self.assertEqual(read(self.path), one)
        self.assertEqual(os.listdir(self.path.parent), [self.path.name])

    def test_none(self) -> None:
        """Where there is no file, nothing is known."""
        self.assertIsNone(read(self.path))

    def test_foreign(self) -> None:
        """A file about another build of a kernel, another CPU, or by another qmigd is none."""
        write(self.path, measured(splice=0.7))
        good = json.loads(self.path.read_text())
        for key, other in (("kernel", good["kernel"] + "1"), ("cpu", "Z80"), ("format", 0)):
            self.path.write_text(json.dumps({**good, key: other}))
            self.assertIsNone(read(self.path))
        self.path.write_text(json.dumps(good))
        self.assertIsNotNone(read(self.path))

    def test_broken(self) -> None:
        """A file that is damaged is none, wherever the damage is."""
        write(self.path, measured(splice=0.7))
        good = json.loads(self.path.read_text())
        costs = good["costs"]["send"]
        wrong: tuple[Any, ...] = (
            [],
            None,
            {},
            {**good, "costs": {}},
            {**good, "obstacles": []},
            {**good, "obstacles": {**good["obstacles"], "send": {"splice": 1}}},
            *(
                {**good, "costs": {**good["costs"], "send": bad}}
                for bad in (
                    {"splice": costs["splice"]},
                    {**costs, "pigeon": costs["splice"]},
                    {**costs, "splice": {"cpu": -1, "ratio": 0.5, "quartile": 0.5}},
                    {**costs, "splice": {"cpu": float("nan"), "ratio": 0.5, "quartile": 0.5}},
                    {**costs, "splice": {"cpu": 1, "ratio": 0.5}},
                    {**costs, "splice": 7},
                )
            ),
        )
        for broken in wrong:
            self.path.write_text(json.dumps(broken))
            self.assertIsNone(read(self.path), broken)
        for text in ("", "{", "\x80", "[" * 100_000):
            self.path.write_bytes(text.encode("latin-1"))
            self.assertIsNone(read(self.path))
        self.path.unlink()
        self.path.mkdir()
        self.assertIsNone(read(self.path))

    @given(st.binary())
    def test_any_bytes(self, data: bytes) -> None:
        """No bytes make reading it fail."""
        path = Path(self.mktemp())
        path.write_bytes(data)
        self.assertIsNone(read(path))

    def test_decided(self) -> None:
        """The decision names the movers, and the numbers where it is a copy both ways."""
        self.assertEqual(decide(measured(splice=0.7)).send, "splice")
        decided = decide(measured(splice=1.28, zerocopy=1.5))
        self.assertEqual((decided.send, decided.receive), ("copy", "copy"))
        self.assertEqual(decided.obstacle.where, KERNEL)
        self.assertEqual(
            decided.obstacle.reason,
            "a copy is cheaper on this kernel (to send 0.50 CPU s for each GiB against 0.64 by "
            "splice and 0.75 by zerocopy; to receive 0.50 CPU s for each GiB against 0.64 by "
            "splice and 0.75 by zerocopy)",
        )


class MoversTests(TestCase):
    """:class:`Movers`."""

    def make(self, wanted: str, state: Path | None = None) -> Movers:
        """Start it; what it learns is in ``learnt``."""
        self.learnt: list[ZeroCopy] = []
        self.first: Deferred[None] = Deferred()

        def learn(zero_copy: ZeroCopy) -> None:
            self.learnt.append(zero_copy)
            if not self.first.called:
                self.first.callback(None)

        self.state = state or Path(self.mktemp())
        self.state.mkdir(exist_ok=True)
        movers = Movers(reactor, self.state, wanted, learn)
        self.addCleanup(movers.stop)
        movers.start()
        return movers

    def test_off(self) -> None:
        """Switched off, it is said at once, and nothing is measured or kept."""
        self.make("off")
        (said,) = self.learnt
        self.assertEqual((said.send, said.receive, said.obstacle.where), ("copy", "copy", POLICY))
        self.assertEqual(os.listdir(self.state), [])

    def test_by_hand(self) -> None:
        """A mover in the configuration is taken without measuring, where the kernel has it."""
        for name in ("splice", "zerocopy"):
            self.make(name)
            (said,) = self.learnt
            self.assertLessEqual({said.send, said.receive}, {name, "copy"})
            if "copy" in (said.send, said.receive):
                self.assertIn(f"{name} is configured, but this kernel", said.obstacle.reason)
            self.assertEqual(os.listdir(self.state), [])

    async def test_measured_once(self) -> None:
        """What is not known is measured beside the reactor, kept, and known the next time."""
        self.make("measure")
        self.assertEqual(self.learnt, [])
        await self.first
        (said,) = self.learnt
        kept = read(self.state / "zero-copy.json")
        assert kept is not None
        self.assertEqual(decide(kept), said)
        self.make("measure", self.state)
        self.assertEqual(self.learnt, [said])

    async def test_broken_file(self) -> None:
        """A broken file is measured anew, and replaced."""
        state = Path(self.mktemp())
        state.mkdir()
        (state / "zero-copy.json").write_text("{}")
        self.make("measure", state)
        await self.first
        self.assertIsNotNone(read(state / "zero-copy.json"))

    async def test_cannot_be_kept(self) -> None:
        """Where it cannot be kept, what was measured counts all the same."""
        state = Path(self.mktemp())
        state.mkdir()
        (state / "zero-copy.new").mkdir()
        self.make("measure", state)
        await self.first
        self.assertEqual(len(self.learnt), 1)
        self.assertIsNone(read(state / "zero-copy.json"))

    async def test_stopped(self) -> None:
        """Stopped in the middle, it ends without an answer, and keeps nothing."""
        movers = self.make("measure")
        await movers.stop()
        self.assertEqual(self.learnt, [])
        self.assertEqual(os.listdir(self.state), [])

    async def test_cannot_be_measured(self) -> None:
        """Where measuring fails, relays copy, and the reason is told."""

        def fail(measuring: Measuring) -> None:
            raise OSError(24, "Too many open files")

        self.patch(Measuring, "measure", fail)
        self.make("measure")
        await self.first
        (said,) = self.learnt
        self.assertEqual((said.send, said.receive), ("copy", "copy"))
        self.assertIn("Too many open files", said.obstacle.reason)


class DaemonTests(RigCase):
    """A daemon's own words."""

    def said(self, **settings: Any) -> dict[str, Any]:
        """What a daemon with these settings says of the feature."""
        daemon = self.daemon(**settings).start()
        return self.asked(daemon)

    def asked(self, daemon: Any) -> dict[str, Any]:
        features = daemon.execute("query-features")["features"]
        (ours,) = [feature for feature in features if feature["name"] == NAME]
        return dict(ours)

    def test_copy_is_cheaper(self) -> None:
        """On a kernel where a copy is cheaper, that is the reason, with the numbers."""
        daemon = self.daemon(zero_copy="measure")
        remember(daemon, measured(splice=1.31))
        daemon.start()
        said = self.asked(daemon)
        self.assertFalse(said["offered"])
        self.assertIn("a copy is cheaper on this kernel", said["reason"])
        self.assertIn("against 0.66 by splice", said["reason"])

    def test_gains(self) -> None:
        """On a kernel where another way is cheaper, it is offered."""
        daemon = self.daemon(zero_copy="measure")
        remember(daemon, measured(splice=0.7))
        daemon.start()
        self.assertTrue(self.asked(daemon)["offered"])

    def test_switched_off(self) -> None:
        """Switched off in the configuration, that is the reason."""
        self.assertIn('zero-copy = "off" in [daemon]', self.said(zero_copy="off")["reason"])

    def test_measures_at_the_first_start(self) -> None:
        """A daemon that knows nothing answers at once, and knows something a little later."""
        daemon = self.daemon(zero_copy="measure").start()
        path = Path(daemon.config["daemon"]["state-dir"], "zero-copy.json")
        ask_until(lambda: daemon.execute("query-features") and path.exists(), "a measurement")
        document = json.loads(path.read_text())
        self.assertEqual({key: document[key] for key in identity()}, identity())
        self.assertEqual({*document["costs"]}, {*DIRECTIONS})
        ask_until(lambda: "a relay sends by" in daemon.log, "a line in the log")
        self.assertEqual(daemon.stop(), -signal.SIGTERM)

    def test_ends_while_measuring(self) -> None:
        """A daemon that is stopped while it measures ends as any other."""
        daemon = self.daemon(zero_copy="measure").start()
        self.assertEqual(daemon.stop(), -signal.SIGTERM)
        self.assertNotIn("Traceback", daemon.log)
