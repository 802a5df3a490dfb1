"""From the choice to the plan: agreements, and the channels that they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..interfaces import IFeature
from .obstacles import Obstacle
from .plan import MAIN, Plan
from .select import choose
from .terms import Terms

__all__ = ["build_plan"]


def build_plan(
    features: Mapping[str, IFeature],
    agreements: Mapping[str, Mapping[str, Any]],
    source: Terms,
    destination: Terms,
    left_out: Mapping[str, Obstacle],
) -> Plan:
    """Return the plan that both sides come to.

    :param agreements: of the features that neither side has given up.
    :param left_out: what this side knows of the others.
    :raises FeatureError: something required cannot be had.
    """
    choice = choose(agreements, source, destination, left_out)
    channels = [MAIN]
    for name in choice.features:
        for added in features[name].channels(agreements[name]):
            channels += [(added.name, index) for index in range(added.count)]
    return Plan(
        path=choice.path,
        features=choice.features,
        agreements={name: agreements[name] for name in choice.features},
        channels=tuple(channels),
        path_reason=choice.path_reason,
        left_out={**left_out, **choice.left_out},
    )
