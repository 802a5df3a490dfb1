"""What stands in the way of a feature, and where: on which side, and in what.

Every reason that a user sees is made here, so that all have one form::

    destination kernel: vm.unprivileged_userfaultfd is 0 ...
    source process: it does not know the capability
    policy of the source: it is excluded
    conflict: it cannot be combined with multifd
    path: no open path carries it together with multifd
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..interfaces import CONFLICT, PATH, PLACES, POLICY, PROCESS, No, Role, Withdraw
from .terms import expect

__all__ = ["Obstacle"]


@dataclass(frozen=True)
class Obstacle:
    """Why a feature is not used.

    :ivar reason: half a sentence.
    :ivar where: one of :data:`qmigd.interfaces.PLACES`.
    :ivar side: whose; ``None`` where it is nobody's, or only one side was looked at.
    """

    reason: str
    where: str
    side: Role | None = None

    def __str__(self) -> str:
        """All of it, for people."""
        if self.side is None or self.where in (CONFLICT, PATH):
            return f"{self.where}: {self.reason}"
        if self.where == POLICY:
            return f"policy of the {self.side}: {self.reason}"
        return f"{self.side} {self.where}: {self.reason}"

    @classmethod
    def of(cls, answer: No | Withdraw, default: str, side: Role | None = None) -> Obstacle:
        """Return a feature's own words, placed where it says or else at ``default``."""
        return cls(answer.reason, answer.where or default, side)

    @classmethod
    def from_wire(cls, body: Mapping[str, Any], key: str, side: Role) -> Obstacle:
        """Return what a peer says stands in the way at its side.

        A place that is not known here is no error: newer peers may know more of them.

        :param key: under which the reason is.
        :raises ProtocolError: there is no reason in it.
        """
        where = body.get("where")
        place = where if isinstance(where, str) and where in PLACES else PROCESS
        return cls(expect(body, key, str), place, side)

    def to_wire(self, key: str) -> dict[str, Any]:
        """Return what a peer is told; it knows itself which side we are."""
        return {key: self.reason, "where": self.where}

    def to_json(self) -> dict[str, Any]:
        """Return what ``query-features`` and ``query-migrate`` show."""
        shown: dict[str, Any] = {"reason": str(self), "where": self.where}
        if self.side is not None:
            shown["side"] = self.side
        return shown
