"""What a host offers, whatever a feature's own code does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from twisted.trial.unittest import SynchronousTestCase

from qmigd.interfaces import Answer, Feature, Host, No, Yes
from qmigd.migration.offer import not_offered, offered
from qmigd.migration.services import Services
from qmigd.negotiation.policy import Policy


class _Fair(Feature):
    name = "fair"

    def probe_host(self, host: Host) -> Answer:
        return Yes()


class _Unable(Feature):
    name = "unable"

    def probe_host(self, host: Host) -> Answer:
        return No("it has no wings")


class _Broken(Feature):
    name = "broken"

    def probe_host(self, host: Host) -> Answer:
        raise OSError("the party is over")


def _services(*features: Feature) -> Services:
    known = {feature.name: feature for feature in features}
    return cast(Services, SimpleNamespace(features=known, policy=Policy(), host=Host(1)))


class OfferTests(SynchronousTestCase):
    def test_reason(self) -> None:
        """What the host cannot have is not offered, with the feature's own reason."""
        services = _services(_Fair(), _Unable())
        self.assertEqual(offered(services), ["fair"])
        self.assertIn("no wings", str(not_offered(services)["unable"]))

    def test_broken_probe(self) -> None:
        """A probe that fails costs its feature and nothing else; the log has where it failed."""
        services = _services(_Broken(), _Fair())
        self.assertEqual(offered(services), ["fair"])
        (failure,) = self.flushLoggedErrors(OSError)
        self.assertIn("the party is over", str(failure.value))
        self.assertIn("the party is over", str(not_offered(services)["broken"]))
        self.flushLoggedErrors(OSError)
