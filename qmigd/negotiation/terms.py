"""What one side lays on the table: its terms.

The source's terms travel in PREPARE, the destination's in PREPARED (docs/protocol).
Everything that the choice depends on is in them, so that two daemons with
different versions of a feature, or of the table of quirks, still come to the
same plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ProtocolError
from ..interfaces import PATHS, GuestFacts, Host, IFeature

__all__ = ["Conflict", "Terms", "Traits", "expect"]


_WORDS = {
    bool: "true or false",
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
}


def expect(body: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Return ``body[key]``, which has to be a ``kind``.

    :param default: returned where the key is absent; ``None`` makes the key mandatory.
    :raises ProtocolError: the key is missing, or its value is of another type.
    """
    if key not in body and default is not None:
        return default
    value = body.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ProtocolError(
            f"the peer's message has no usable {key!r}: {_WORDS[kind]} is needed",
            code="bad-json",
        )
    return value


def _names(body: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = expect(body, key, list, [])
    if not all(isinstance(name, str) for name in names):
        raise ProtocolError(f"{key!r} has to be a list of strings", code="bad-json")
    return tuple(names)


@dataclass(frozen=True)
class Traits:
    """What the choice has to know of a feature (:class:`qmigd.interfaces.IFeature`)."""

    rank: int
    requires: frozenset[str] = frozenset()
    excludes: frozenset[str] = frozenset()
    paths: frozenset[str] = frozenset(PATHS)
    paths_with: Mapping[str, frozenset[str]] = field(default_factory=dict)
    avoids: frozenset[str] = frozenset()

    @classmethod
    def of(cls, feature: IFeature, guest: GuestFacts, host: Host) -> Traits:
        return cls(
            int(feature.rank),
            feature.requires,
            feature.excludes,
            feature.paths_for(guest, host),
            dict(feature.paths_with),
            feature.avoids,
        )

    def carried_by(self, path: str, others: Iterable[str]) -> bool:
        """Whether a path carries it, where it is used together with ``others``."""
        return path in self.paths or any(path in self.paths_with.get(other, ()) for other in others)

    def to_wire(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "rank": self.rank,
            "requires": sorted(self.requires),
            "excludes": sorted(self.excludes),
            "paths": sorted(self.paths),
        }
        if self.paths_with:
            body["paths-with"] = {
                name: sorted(paths) for name, paths in sorted(self.paths_with.items())
            }
        if self.avoids:
            body["avoids"] = sorted(self.avoids)
        return body

    @classmethod
    def from_wire(cls, body: Mapping[str, Any]) -> Traits:
        return cls(
            expect(body, "rank", int),
            frozenset(_names(body, "requires")),
            frozenset(_names(body, "excludes")),
            frozenset(_names(body, "paths")),
            {
                name: frozenset(_names(more, name))
                for more in [expect(body, "paths-with", dict, {})]
                for name in more
            },
            frozenset(_names(body, "avoids")),
        )

    def __and__(self, other: Traits) -> Traits:
        """What holds when both sides' versions of the feature have their say."""
        return Traits(
            min(self.rank, other.rank),
            self.requires | other.requires,
            self.excludes | other.excludes,
            self.paths & other.paths,
            {
                name: self._all_with(name) & other._all_with(name)
                for name in self.paths_with.keys() | other.paths_with.keys()
            },
            self.avoids | other.avoids,
        )

    def _all_with(self, other: str) -> frozenset[str]:
        return self.paths | self.paths_with.get(other, frozenset())


@dataclass(frozen=True)
class Conflict:
    """What must not be combined in this migration, because ``reason``.

    :ivar features: names; a path among them is not to be taken for the others.
    """

    features: frozenset[str]
    reason: str


@dataclass(frozen=True)
class Terms:
    """One side's terms.

    :ivar traits: of each feature that this side would still take.
    :ivar conflicts: what the two QEMUs cannot combine, as far as this side knows.
    :ivar prefer: feature and path names, the most wanted first.
    :ivar require: feature and path names that this side insists on.
    :ivar closed: the paths that this side cannot or must not take, each with the reason.
    """

    traits: Mapping[str, Traits]
    conflicts: tuple[Conflict, ...] = ()
    prefer: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    closed: Mapping[str, str] = field(default_factory=dict)

    def to_wire(self) -> dict[str, Any]:
        return {
            "traits": {name: traits.to_wire() for name, traits in sorted(self.traits.items())},
            "conflicts": [
                {"features": sorted(conflict.features), "reason": conflict.reason}
                for conflict in self.conflicts
            ],
            "prefer": list(self.prefer),
            "require": list(self.require),
            "closed": dict(sorted(self.closed.items())),
        }

    @classmethod
    def from_wire(cls, body: Mapping[str, Any]) -> Terms:
        """:raises ProtocolError: the JSON is not that of terms."""
        traits = expect(body, "traits", dict, {})
        conflicts = expect(body, "conflicts", list, [])
        closed = expect(body, "closed", dict, {})
        for value in (*traits.values(), *conflicts):
            if not isinstance(value, dict):
                raise ProtocolError("terms hold something that is no object", code="bad-json")
        return cls(
            {name: Traits.from_wire(value) for name, value in traits.items()},
            tuple(
                Conflict(frozenset(_names(value, "features")), expect(value, "reason", str))
                for value in conflicts
            ),
            _names(body, "prefer"),
            _names(body, "require"),
            {path: expect(closed, path, str) for path in closed},
        )
