"""What a host offers before any guest is named, and why the rest is not offered."""

from __future__ import annotations

from twisted.logger import Logger

from ..interfaces import HOST, POLICY, Answer, Host, IFeature, No, Role
from ..negotiation.obstacles import Obstacle
from ..negotiation.policy import Policy
from .services import Services

__all__ = ["kernel_does_tls", "not_offered", "offered"]

log = Logger()

#: The ability of the feature by which the kernel does TLS.
_KERNEL_TLS = "kernel-tls"


def not_offered(
    services: Services, policy: Policy | None = None, side: Role | None = None
) -> dict[str, Obstacle]:
    """Return the features that this host cannot have or does not want, each with the reason.

    :param policy: where it is not that of the configuration.
    :param side: which side this host is, for the reasons.
    """
    found: dict[str, Obstacle] = {}
    for name, feature in services.features.items():
        obstacle = _obstacle(services, feature, policy, side)
        if obstacle is not None:
            found[name] = obstacle
    return found


def _obstacle(
    services: Services, feature: IFeature, policy: Policy | None, side: Role | None = None
) -> Obstacle | None:
    if feature.name in (policy or services.policy).exclude:
        return Obstacle("it is excluded", POLICY, side)
    answer = _probe(feature, services.host)
    return Obstacle.of(answer, HOST, side) if isinstance(answer, No) else None


def _probe(feature: IFeature, host: Host) -> Answer:
    try:
        return feature.probe_host(host)
    except Exception as error:
        # A third party's code costs its own feature, and not the daemon.
        log.failure("feature {name} is left out: its look at the host failed", name=feature.name)
        return No(f"its look at the host failed: {error}")


def offered(services: Services) -> list[str]:
    """Return the features that this host's greeting offers."""
    refused = not_offered(services)
    return [name for name in services.features if name not in refused]


def kernel_does_tls(services: Services, policy: Policy | None = None) -> bool:
    """Whether this side's kernel is to do the TLS of payload channels.

    It is this side's own affair: the peer cannot tell the difference.

    :param policy: where it is not that of the configuration.
    """
    return any(
        _KERNEL_TLS in feature.abilities and _obstacle(services, feature, policy) is None
        for feature in services.features.values()
    )
