"""The plan: what a migration is going to do, immutable, the same on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ProtocolError
from .obstacles import Obstacle

__all__ = ["MAIN", "Plan"]

#: The payload channel that is always there; it carries QEMU's main stream.
MAIN = ("main", 0)


@dataclass(frozen=True)
class Plan:
    """What both sides settled on.

    :ivar features: the chosen ones, in alphabetical order.
    :ivar agreements: what the two sides agreed on, by feature.
    :ivar channels: name and index of each payload channel, in the order in which
        QEMU connects them.
    :ivar path: one of :data:`qmigd.interfaces.PATHS`.
    :ivar path_reason: why this path; each side's own words.
    :ivar left_out: features that were not chosen, with the reason; each side's own words.
    """

    path: str
    features: tuple[str, ...] = ()
    agreements: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    channels: tuple[tuple[str, int], ...] = (MAIN,)
    path_reason: str = ""
    left_out: Mapping[str, Obstacle] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        """What both sides must have alike."""
        return {
            "path": self.path,
            "features": list(self.features),
            "agreements": {name: dict(self.agreements[name]) for name in sorted(self.agreements)},
            "channels": [{"name": name, "index": index} for name, index in self.channels],
        }

    def to_json(self) -> dict[str, Any]:
        """What ``query-migrate`` shows."""
        return {
            **self.to_wire(),
            "path-reason": self.path_reason,
            "left-out": [
                {"name": name, **obstacle.to_json()}
                for name, obstacle in sorted(self.left_out.items())
            ],
        }

    def verify(self, theirs: Mapping[str, Any]) -> None:
        """Compare with the plan in the peer's PREPARED.

        :raises ProtocolError: it is another one; the text names the first difference.
        """
        for key, ours in self.to_wire().items():
            if theirs.get(key) != ours:
                raise ProtocolError(
                    f"the destination's plan differs in {key}: {theirs.get(key)!r} there, "
                    f"{ours!r} here; the migration is not begun on a guess",
                    code="plan-differs",
                )
