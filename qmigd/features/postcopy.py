"""``postcopy-ram``: the guest can be switched over before all of its RAM is there.

It makes sure that a migration ends: however fast the guest dirties its RAM, each
page travels at most once more after the switch, which ``migrate-start-postcopy``
asks for (QEMU 2.6 and newer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..interfaces import Answer, Feature, GuestFacts, No, Rank, Role, Settings, Yes

__all__ = ["Postcopy", "feature"]


class Postcopy(Feature):
    """The capability has to be on at both ends, or the stream is refused."""

    name = "postcopy-ram"
    summary = "can be switched over at any time, so the move surely ends"
    rank = Rank.CERTAINTY
    abilities = frozenset({"postcopy"})

    def probe_guest(self, guest: GuestFacts, role: Role) -> Answer:
        if "postcopy-ram" not in guest.capabilities:
            return No("this QEMU does not know it")
        for other in ("x-ignore-shared", "mapped-ram", "background-snapshot"):
            if guest.capabilities.get(other):
                return No(f"{other} has been switched on in this QEMU, which excludes it")
        return Yes()

    def settings(self, agreement: Mapping[str, Any], role: Role) -> Settings:
        return Settings({"postcopy-ram": True})


feature = Postcopy()
