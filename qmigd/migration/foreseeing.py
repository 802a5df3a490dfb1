"""Which payload channels a migration may come to want, before anything has been negotiated.

Where a management app makes the connections it is told how many it may be asked for before it
makes the first, on which all else is negotiated.  So this is a bound and no plan: the channels
of every feature that the source could use, as if the destination could do the same as this
host, and of features that exclude each other those of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..interfaces import DIRECT, PATHS, GuestFacts, IFeature, Withdraw
from ..negotiation.plan import MAIN
from ..negotiation.policy import Policy
from .offer import not_offered
from .services import Services

__all__ = ["most_channels"]


def most_channels(
    services: Services,
    policy: Policy,
    transport: str,
    guest: GuestFacts,
    tunables: Mapping[str, Any],
) -> tuple[tuple[str, int], ...]:
    """Return name and index of each payload channel that there may be.

    :param transport: by which the peer is reached; no QEMU connects to the other there.
    :param guest: the source's.
    :param tunables: the user's.
    """
    wanted = set(policy.require) & set(PATHS) or set(PATHS)
    paths = wanted - set(policy.exclude) - {DIRECT}
    refused = not_offered(services, policy, "source")
    candidates = {
        name: feature
        for name, feature in services.features.items()
        if name not in refused
        and transport in feature.transports
        and feature.probe_guest(guest, "source")
        and paths & _paths(feature, guest, services)
    }
    channels = [MAIN]
    for name in sorted(candidates):
        if candidates[name].requires <= candidates.keys():
            channels += _channels(candidates[name], guest, services, tunables)
    return tuple(channels)


def _paths(feature: IFeature, guest: GuestFacts, services: Services) -> frozenset[str]:
    own: frozenset[str] = feature.paths_for(guest, services.host)
    return own.union(*feature.paths_with.values())


def _channels(
    feature: IFeature, guest: GuestFacts, services: Services, tunables: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    own = {key: value for key, value in tunables.items() if key in feature.tunables}
    try:
        proposal = feature.propose(guest, services.host, own)
        agreement = feature.answer(guest, services.host, proposal)
    except (Withdraw, ValueError):
        return
    for added in feature.channels(agreement):
        for index in range(added.count):
            yield added.name, index
