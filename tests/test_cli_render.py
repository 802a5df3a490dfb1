"""What qmigctl prints, from JSON to text."""

from __future__ import annotations

import io
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.cli import render
from qmigd.cli.progress import LinesDisplay, TerminalDisplay

from .management import MIGRATION, entry

TIMES = {"total-time": 3200, "downtime": 41, "ended": 1003.2}


class WordsTests(SynchronousTestCase):
    def test_sizes(self) -> None:
        """Sizes have the unit in which a person reads them."""
        for count, text in (
            (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 << 20, "1.5 GiB"),
            (200 << 20, "200 MiB"), (5000 << 40, "5000 TiB"),
        ):  # fmt: skip
            self.assertEqual(text, render.size(count))
        self.assertEqual("1.0 GiB/s", render.rate(8589.934592))

    def test_durations(self) -> None:
        """So have times."""
        for milliseconds, text in (
            (0, "0 ms"), (41, "41 ms"), (3210, "3.2 s"), (125_000, "2 min 5 s"),
            (3_720_000, "1 h 2 min"),
        ):  # fmt: skip
            self.assertEqual(text, render.duration(milliseconds))

    def test_remaining(self) -> None:
        """The end is estimated from what is sent less what the guest dirties."""
        ram = {"remaining": 1000, "mbps": 0.008, "dirty-pages-rate": 0, "page-size": 100}
        self.assertEqual(1.0, render.remaining_seconds(ram))
        self.assertEqual(2.0, render.remaining_seconds({**ram, "dirty-pages-rate": 5}))
        self.assertIsNone(render.remaining_seconds({**ram, "dirty-pages-rate": 10}))
        self.assertIsNone(render.remaining_seconds({"mbps": 1}))
        self.assertIsNone(render.remaining_seconds({"remaining": 1}))

    @given(st.text())
    def test_clean(self, text: str) -> None:
        """No control character of a peer's reaches the terminal, nor a line's end."""
        self.assertTrue(render.clean(text).isprintable())


class TableTests(SynchronousTestCase):
    def test_guests(self) -> None:
        """Guests have their state, where their QEMU is, and why there is none."""
        text = render.guests(
            [
                {"name": "web1", "backend": "qemu", "qmp": "unix:/run/web1.qmp", "launch": False,
                 "configured": True, "state": "running", "migration": "x"},
                {"name": "db", "backend": "qemu", "launch": True, "configured": True,
                 "state": "not-started"},
                {"name": "old", "backend": "qemu", "qmp": "unix:/o", "launch": False,
                 "configured": False, "state": "unreachable", "reason": "no\x1b[31msocket"},
            ]
        )  # fmt: skip
        self.assertEqual(
            "GUEST  STATE        QMP\n"
            "web1   running      unix:/run/web1.qmp  in migration x\n"
            "db     not-started  started by qmigd\n"
            "old    unreachable  unix:/o             no [31msocket",
            text,
        )
        self.assertIn("qmigctl guest-add", render.guests([]))

    def test_features(self) -> None:
        """Features are offered or not; for a pair selected or left out, with the path."""
        feature = {"name": "multifd", "summary": "several channels", "offered": True}
        self.assertEqual(
            "FEATURE\nmultifd  offered  several channels", render.features({"features": [feature]})
        )
        text = render.features(
            {
                "guest": "g",
                "peer": "tcp:b:1",
                "path": "handover",
                "path-reason": "one channel",
                "features": [
                    {**feature, "selected": False, "reason": "the peer lacks it"},
                    {"name": "postcopy-ram", "summary": "ends", "offered": True, "selected": True},
                ],
            }
        )
        self.assertEqual(
            "FEATURE\n"
            "multifd       left out  the peer lacks it\n"
            "postcopy-ram  selected  ends\n"
            "path  handover: one channel",
            text,
        )
        self.assertEqual(
            "FEATURE\n"
            "multifd  offered  several channels\n"
            "warning  the certificate ends in 12\n"
            "         days",
            render.features(
                {"features": [feature], "warnings": ["the certificate ends in 12 days"]}, width=39
            ),
        )

    def test_features_of_a_stuck_guest(self) -> None:
        """That a guest cannot be moved at all stands below its features."""
        feature = {"name": "multifd", "summary": "several channels", "offered": True}
        text = render.features({"guest": "g", "features": [feature], "blocked-reasons": ["nvme"]})
        self.assertTrue(text.endswith("\nthe guest cannot be moved  nvme"), text)

    def test_tunables(self) -> None:
        """Tunables have type, value, the values of an enum, and warnings."""
        text = render.tunables(
            [
                {"name": "max-bandwidth", "type": "int", "value": 134217728, "deprecated": False,
                 "unstable": False},
                {"name": "mode", "type": "MigMode", "values": ["normal", "cpr"], "value": None,
                 "deprecated": True, "unstable": True},
                {"name": "direct-io", "type": "bool", "value": False, "deprecated": False,
                 "unstable": False},
                {"name": "multifd-zlib-level", "type": "int", "value": 1, "deprecated": False,
                 "unstable": False},
            ]
        )  # fmt: skip
        self.assertEqual(
            "TUNABLE             TYPE     VALUE\n"
            "max-bandwidth       int      134217728\n"
            "mode                MigMode  -          one of normal, cpr; deprecated; unstable\n"
            "direct-io           bool     false\n"
            "multifd-zlib-level  int      1",
            text,
        )

    def test_wrapping(self) -> None:
        """On a terminal the last column is wrapped below itself."""
        answer = {
            "features": [{"name": "ktls", "summary": "s", "offered": False, "reason": "x " * 30}]
        }
        lines = render.features(answer, width=45).splitlines()
        self.assertEqual("ktls     no  " + "x " * 15 + "x", lines[1])
        self.assertEqual(" " * 13 + "x " * 13 + "x", lines[2])

    def test_migrations(self) -> None:
        """A migration has its peer, its status, and how far it is or how it ended."""
        text = render.migrations(
            [
                entry("completed", **TIMES),
                entry("failed", error={"class": "peer-gone", "desc": "The link broke."}),
                entry(role="destination"),
            ]
        )
        self.assertEqual(
            "GUEST  PEER                   STATUS\n"
            "web1   to tcp:host-b:16516    completed  in 3.2 s, stood still for 41 ms\n"
            "web1   to tcp:host-b:16516    failed     The link broke.\n"
            "web1   from tcp:host-b:16516  active     moving RAM; pass 2; 3.0 GiB sent; 1.0 GiB "
            "left; 1.0 GiB/s; about 1.0 s to go",
            text,
        )
        self.assertIn("no migration", render.migrations([]))

    def test_summary(self) -> None:
        """At the end: times, path and why, features, channels, and what was left out and why."""
        self.assertEqual(
            "web1 moved to tcp:host-b:16516 in 3.2 s, stood still for 41 ms.\n"
            "  path      direct: the destination offers ports\n"
            "  features  multifd, postcopy-ram\n"
            "  channels  main, multifd x 2\n"
            "  sent      3.0 GiB, 2 passes\n"
            "  left out  postcopy-preempt: QEMU 7.2 lacks it",
            render.summary(entry("completed", **TIMES)),
        )
        bare = entry("completed", role="destination")
        del bare["plan"], bare["ram"]
        self.assertEqual("web1 came from tcp:host-b:16516.", render.summary(bare))

    def test_file(self) -> None:
        """Of a save and of a restore: the file, what is in it, and what the guest does now."""
        file = {
            "path": "/saved/web1",
            "format": "mapped-ram",
            "features": ["mapped-ram", "multifd"],
            "size": 4 << 30,
            "on-disk": 1 << 30,
        }
        done = entry("completed", **TIMES, file=file, step="saved; kept here paused")
        del done["plan"]
        done["ended"] = done["started"] + 2.5
        self.assertEqual(
            "web1 was saved to /saved/web1 in 2.5 s.\n"
            "  guest     saved; kept here paused\n"
            "  format    mapped-ram, multifd\n"
            "  size      4.0 GiB, 1.0 GiB on the disk",
            render.summary(done),
        )
        done |= {"role": "destination", "step": "restored; it runs here"}
        self.assertIn("web1 was restored from /saved/web1 in 2.5 s.\n", render.summary(done))
        self.assertNotIn("stood still", render.migrations([done]))


class DisplayTests(SynchronousTestCase):
    def test_lines(self) -> None:
        """Plain output has a line for each change, else one in ten seconds; nothing but text."""
        out, now = io.StringIO(), [0.0]
        display = LinesDisplay(out, lambda: now[0])
        display.show(entry("setup", step="negotiating", ram={}))
        display.show(entry())
        now[0] = 9.9
        display.show(entry())
        now[0] = 10.1
        display.show(entry())
        display.show(entry("postcopy-active", step="fetching\x1b[2J"))
        display.close()
        moving = (
            "web1: active, moving RAM; pass 2; 3.0 GiB sent; 1.0 GiB left; 1.0 GiB/s; "
            "about 1.0 s to go\n"
        )
        text = out.getvalue()
        self.assertEqual(
            "web1: setup, negotiating\n"
            + moving * 2
            + moving.replace("active, moving RAM", "postcopy-active, fetching [2J"),
            text,
        )

    def test_hopeless(self) -> None:
        """Where the guest dirties more than is sent, that is said, with the remedy if any."""
        hopeless: dict[str, Any] = entry()
        hopeless["ram"]["dirty-pages-rate"] = 1 << 20
        self.assertEqual("dirtied as fast as it is sent", render.details(hopeless)[-1])
        hopeless["postcopy"] = True
        self.assertEqual(
            "dirtied as fast as it is sent: 'qmigctl postcopy web1' would end it",
            render.details(hopeless)[-1],
        )

    def test_terminal(self) -> None:
        """On a terminal there is a bar, which is gone at the end, and the cursor is back."""
        out = io.StringIO()
        display = TerminalDisplay(out)
        display.show(entry("setup", step="negotiating", ram={}))
        display.show(entry(step="moving [bold]RAM"))
        display.close()
        text = out.getvalue()
        self.assertIn("web1 to tcp:host-b:16516: moving [bold]RAM", text)
        self.assertIn("75%", text)
        self.assertIn("pass 2, 3.0 GiB sent, 1.0 GiB left, 1.0 GiB/s, about 1.0 s to go", text)
        self.assertEqual(text.count("\x1b[?25l"), text.count("\x1b[?25h"))
        self.assertNotIn(MIGRATION, text)

    def test_terminal_closed_early(self) -> None:
        """A display that never showed anything leaves nothing behind."""
        out = io.StringIO()
        TerminalDisplay(out).close()
        self.assertEqual("", out.getvalue())
