"""The calibration: what is measured, and what follows from the numbers."""

from __future__ import annotations

import os
import threading

from twisted.trial.unittest import SynchronousTestCase

from qmigd.channels.calibration import DIRECTIONS, Calibration, Cancelled, Cost, Measuring
from qmigd.interfaces import MOVERS
from tests.rig.zero_copy import measured


class DecisionTests(SynchronousTestCase):
    """What follows from the numbers."""

    def test_dearer(self) -> None:
        """Where everything else is dearer, it is a copy."""
        self.assertEqual(measured(splice=1.3, zerocopy=1.2).best("send"), "copy")

    def test_clearly_cheaper(self) -> None:
        """The cheapest is taken, if it is cheaper by a clear margin."""
        self.assertEqual(measured(splice=0.8, zerocopy=0.7).best("send"), "zerocopy")
        self.assertEqual(measured(splice=0.89).best("receive"), "splice")
        self.assertEqual(measured(splice=0.91).best("receive"), "copy")

    def test_not_in_most_rounds(self) -> None:
        """What was cheaper in the median, but not in three quarters of the rounds, is not taken."""
        costs = {"copy": Cost(0.5, 1, 1), "splice": Cost(0.4, 0.8, 1.01)}
        once = Calibration(dict.fromkeys(DIRECTIONS, costs), {key: {} for key in DIRECTIONS})
        self.assertEqual(once.best("send"), "copy")

    def test_nothing_else(self) -> None:
        """A kernel that can only copy copies."""
        self.assertEqual(measured().best("send"), "copy")

    def test_said(self) -> None:
        """The numbers are told, and what the kernel lacks."""
        self.assertEqual(
            measured(splice=1.28).says("send"),
            "0.50 CPU s for each GiB against 0.64 by splice; zerocopy: not here",
        )


class MeasuringTests(SynchronousTestCase):
    """Measuring itself, on this kernel."""

    def test_everything_is_measured(self) -> None:
        """In both directions each mover has a cost, or a reason why the kernel lacks it."""
        before = set(os.listdir("/proc/self/fd"))
        found = Measuring().measure()
        for direction in DIRECTIONS:
            costs, obstacles = found.costs[direction], found.obstacles[direction]
            self.assertEqual(sorted([*costs, *obstacles]), sorted(MOVERS))
            self.assertEqual(costs["copy"].ratio, 1.0)
            self.assertTrue(all(cost.cpu > 0 for cost in costs.values()))
            self.assertIn(found.best(direction), costs)
        self.assertEqual(set(os.listdir("/proc/self/fd")), before)
        self.assertNotIn("calibration", [thread.name for thread in threading.enumerate()])

    def test_cancelled_beforehand(self) -> None:
        """Cancelled before it began, it does nothing."""
        measuring = Measuring()
        measuring.cancel()
        self.assertRaises(Cancelled, measuring.measure)

    def test_cancelled_in_the_middle(self) -> None:
        """Cancelled while bytes are being moved, it ends, and leaves no thread."""
        measuring = Measuring()
        outcomes: list[BaseException] = []

        def measure() -> None:
            try:
                measuring.measure()
            except Exception as error:
                outcomes.append(error)

        thread = threading.Thread(target=measure)
        thread.start()
        measuring.begun.wait()
        measuring.cancel()
        thread.join()
        self.assertEqual([type(error) for error in outcomes], [Cancelled])
        self.assertNotIn("calibration", [thread.name for thread in threading.enumerate()])
