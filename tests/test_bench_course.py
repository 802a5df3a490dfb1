"""The benchmark's course: what is run on it comes through, and costs something."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.bench import course, ktls
from tests.bench.course import Contestant, Cost
from tests.bench.ours import How, contestant

#: Little, in GiB.
_SOME = 1 / 256


class RunTests(SynchronousTestCase):
    def check(self, how: How, channels: int) -> None:
        cost = course.run(contestant("qmigd", how), channels, _SOME)
        self.assertGreater(cost.cpu, 0)
        self.assertGreater(cost.seconds, 0)

    def test_relay_in_tls(self) -> None:
        """Two relays with TLS between them."""
        self.check(How(tls="relay"), 2)

    def test_handover(self) -> None:
        """A connection that the source and the sink are given."""
        self.check(How("handover"), 1)


class RoundsTests(SynchronousTestCase):
    def measured(self, foreign: list[float]) -> list[Cost]:
        """Measure one round of one contestant, with others on the machine as said."""
        costs = [Cost(number, 1.0, share) for number, share in enumerate(foreign)]
        self.patch(course, "run", lambda *_: costs.pop(0))
        one = Contestant("one", lambda place: self.fail("It was started."))
        found = course.run_all([one], 1, 1.0, [1], lambda text: None)
        return found["one", 1]

    def test_quiet(self) -> None:
        """A run that had the machine for itself counts at once."""
        self.assertEqual([cost.cpu for cost in self.measured([0.0, 0.5])], [0])

    def test_again(self) -> None:
        """One that had not is done again."""
        self.assertEqual([cost.cpu for cost in self.measured([0.5, 0.01])], [1])

    def test_busy(self) -> None:
        """Where the machine is never quiet, the quietest run counts."""
        self.assertEqual([cost.cpu for cost in self.measured([0.5, 0.2, 0.0])], [1])

    def test_turns(self) -> None:
        """Nobody is always the first."""
        order: list[str] = []

        def run(one: Contestant, channels: int, gib: float) -> Cost:
            order.append(one.name)
            return Cost(1.0, 1.0, 0.0)

        self.patch(course, "run", run)
        both = [Contestant(name, lambda place: self.fail("It was started.")) for name in "ab"]
        course.run_all(both, 2, 1.0, [1], lambda text: None)
        self.assertEqual(order, ["a", "b", "b", "a"])


class NoteTests(SynchronousTestCase):
    def test_order(self) -> None:
        """What was measured under emulation says so, and which way is the cheapest."""
        costs = {
            name: [Cost(cpu, 1.0, 0.0) for cpu in cpus]
            for name, cpus in {"dear": (3, 9, 8), "cheap": (1, 1, 9), "middle": (5, 2, 4)}.items()
        }
        text = ktls.note("6.1", costs)
        self.assertIn("Linux 6.1 on one emulated CPU: only the order", text)
        self.assertTrue(text.endswith("cheap; middle; dear"), text)
