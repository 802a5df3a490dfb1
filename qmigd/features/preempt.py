"""``postcopy-preempt``: in postcopy, pages that the guest waits for overtake the others.

They travel on a channel of their own (QEMU 7.1 and newer).  The capability on the
source alone corrupts RAM in silence, which is why both QEMUs' settings are read
back before a migration starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..interfaces import (
    DIRECT,
    RELAY,
    Answer,
    Channels,
    Feature,
    GuestFacts,
    Role,
    Settings,
)
from .capabilities import known

__all__ = ["Preempt", "feature"]


class Preempt(Feature):
    """An addition to ``postcopy-ram``."""

    name = "postcopy-preempt"
    summary = "in postcopy, pages that the guest waits for come first"
    requires = frozenset({"postcopy-ram"})
    paths = frozenset({DIRECT, RELAY})

    def probe_guest(self, guest: GuestFacts, role: Role) -> Answer:
        return known(guest, "postcopy-preempt")

    def settings(self, agreement: Mapping[str, Any], role: Role) -> Settings:
        return Settings({"postcopy-preempt": True})

    def channels(self, agreement: Mapping[str, Any]) -> Sequence[Channels]:
        return (Channels("preempt"),)


feature = Preempt()
