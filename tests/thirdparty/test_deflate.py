"""The test of a feature, as its author writes it: ``trial test_deflate``."""

from qmigd_example_deflate import feature
from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from qmigd.testing import Pair


class DeflateTests(TestCase):
    async def test_both(self) -> None:
        """Two hosts that have it use it, and the guest arrives whole."""
        async with Pair(reactor, [feature]) as pair:
            moved = await pair.move(require=[feature.name])
        self.assertEqual({"level": 1}, moved.plan["agreements"][feature.name])

    async def test_one(self) -> None:
        """Where the destination lacks it, the guest moves without."""
        async with Pair(reactor, source_features=[feature]) as pair:
            moved = await pair.move()
        self.assertNotIn(feature.name, moved.plan["features"])
