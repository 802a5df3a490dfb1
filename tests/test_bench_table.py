"""The benchmark's table: its medians, its ratios, and what it looks like."""

from __future__ import annotations

import io
import json

from twisted.trial.unittest import SynchronousTestCase

from tests.bench.table import Row, compare, single, to_json, write


class RowTests(SynchronousTestCase):
    def test_ratio(self) -> None:
        """A ratio is the median of the rounds' ratios, not the ratio of the medians."""
        row = compare("part", "speed", "GiB/s", "peer", [1.0, 4.0, 3.0], [2.0, 2.0, 30.0])
        self.assertEqual((row.ours, row.theirs, row.related), (3.0, 2.0, 0.5))
        self.assertEqual(row.quartiles, (0.3, 1.25))
        self.assertIsNone(row.met)

    def test_difference(self) -> None:
        """A difference is the median of the rounds' differences; the target looks at it."""
        row = compare(
            *("part", "start", "ms", "peer", [12.0, 30.0, 14.0], [2.0, 3.0, 5.0]),
            relation="difference",
            target="under +10 ms",
            judge=lambda median, quartiles: median < 10,
        )
        self.assertEqual((row.related, row.met), (10.0, False))

    def test_one_round(self) -> None:
        """A single round is its own median and quartiles."""
        row = single("part", "memory", "MiB", [3.0])
        self.assertEqual((row.ours, row.quartiles, row.rounds), (3.0, (3.0, 3.0), 1))


class WritingTests(SynchronousTestCase):
    def test_plain(self) -> None:
        """Where there is no terminal each row is one line, without colours or trailing blanks."""
        rows = [
            compare(
                *("streams", "direct: speed", "GiB/s", "QEMU alone", [1.0, 1.0], [2.0, 2.0]),
                target="1.00",
                judge=lambda median, quartiles: median > 1,
            ),
            Row("relay", "total CPU", "", peer="socat", note="socat is not installed [here]"),
        ]
        file = io.StringIO()
        write(rows, "heading", file)
        heading, names, first, gap, second, note = file.getvalue().splitlines()
        self.assertEqual(heading, "heading")
        self.assertIn("qmigd to peer", names)
        self.assertRegex(
            first,
            r"^streams +direct: speed +1 GiB/s +QEMU alone +2 GiB/s +0\.50 "
            r"+\(0\.50 \.\. 0\.50\) +1\.00 +NO$",
        )
        self.assertEqual(gap, "")
        self.assertRegex(second, r"^relay +total CPU +none +socat$")
        self.assertEqual(note, "relay, total CPU: socat is not installed [here]")

    def test_json(self) -> None:
        """The rows can be written as JSON."""
        row = single("part", "memory", "MiB", [3.0, 5.0], note="of the daemon")
        (found,) = json.loads(json.dumps(to_json([row])))
        self.assertEqual((found["ours"], found["note"]), (4.0, "of the daemon"))
