"""What a host offers before any guest is named, and why the rest is not offered."""

from __future__ import annotations

from ..interfaces import HOST, POLICY, No, Role
from ..negotiation.obstacles import Obstacle
from ..negotiation.policy import Policy
from .services import Services

__all__ = ["not_offered", "offered"]


def not_offered(
    services: Services, policy: Policy | None = None, side: Role | None = None
) -> dict[str, Obstacle]:
    """Return the features that this host cannot have or does not want, each with the reason.

    :param policy: where it is not that of the configuration.
    :param side: which side this host is, for the reasons.
    """
    excluded = (policy or services.policy).exclude
    found: dict[str, Obstacle] = {}
    for name, feature in services.features.items():
        answer = feature.probe_host(services.host)
        if name in excluded:
            found[name] = Obstacle("it is excluded", POLICY, side)
        elif isinstance(answer, No):
            found[name] = Obstacle.of(answer, HOST, side)
    return found


def offered(services: Services) -> list[str]:
    """Return the features that this host's greeting offers."""
    refused = not_offered(services)
    return [name for name in services.features if name not in refused]
