"""How far a migration has come: what ``query-migrate`` tells of it, in QEMU's words."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from qmigd.guests.memory.ram import PAGE

__all__ = ["BUSY", "OVER", "Progress"]

#: Statuses of a migration that is over.
OVER = ("completed", "failed", "cancelled")
#: Statuses in which another one cannot begin.
BUSY = (
    *("setup", "active", "device", "cancelling"),
    *("postcopy-active", "postcopy-paused", "postcopy-recover"),
)


@dataclass
class Progress:
    """One migration, seen from one side.  Counters only grow; each has one thread that adds.

    :ivar outgoing: on the source there is more to be told.
    :ivar on_status: called with each new status.
    """

    outgoing: bool
    on_status: Callable[[str], None]
    status: str = "none"
    error: str = ""
    total: int = 0  # bytes of RAM
    remaining: int = 0  # bytes
    normal: int = 0  # pages
    duplicate: int = 0  # pages of zero bytes
    transferred: int = 0  # bytes
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    postcopy_bytes: int = 0
    multifd_bytes: int = 0
    syncs: int = 0
    dirty_rate: int = 0  # pages a second
    requests: int = 0
    copied: int = 0  # sends that were to be zero copy and were not
    throttle: int = 0  # per cent
    bandwidth: float = 0.0  # bytes a second
    setup_time: float = 0.0
    downtime: float = 0.0
    expected_downtime: float = 0.0
    begun: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    def become(self, status: str) -> None:
        """Have another status."""
        if status == self.status:
            return
        self.status = status
        if status in OVER:
            self.ended = time.monotonic()
        self.on_status(status)

    @property
    def over(self) -> bool:
        return self.status in OVER

    def show(self) -> dict[str, Any]:
        """As ``query-migrate`` returns it."""
        if self.status == "none":
            return {}
        shown: dict[str, Any] = {"status": self.status}
        if self.error and self.status in ("failed", "cancelled", "postcopy-paused"):
            shown["error-desc"] = self.error
        if not self.outgoing:
            return shown
        total = (self.ended or time.monotonic()) - self.begun
        shown["total-time"] = _ms(total)
        shown["setup-time"] = _ms(self.setup_time)
        if self.over:
            shown["downtime"] = _ms(self.downtime)
        else:
            shown["expected-downtime"] = _ms(self.expected_downtime)
        if self.throttle:
            shown["cpu-throttle-percentage"] = self.throttle
        shown["ram"] = {
            "total": self.total,
            "transferred": self.transferred,
            "remaining": 0 if self.status == "completed" else self.remaining,
            "normal": self.normal,
            "normal-bytes": self.normal * PAGE,
            "duplicate": self.duplicate,
            "skipped": 0,
            "mbps": self.bandwidth * 8 / 1e6,
            "pages-per-second": int(self.bandwidth // PAGE),
            "page-size": PAGE,
            "dirty-pages-rate": self.dirty_rate,
            "dirty-sync-count": self.syncs,
            "dirty-sync-missed-zero-copy": self.copied,
            "postcopy-requests": self.requests,
            "multifd-bytes": self.multifd_bytes,
            "precopy-bytes": self.precopy_bytes,
            "downtime-bytes": self.downtime_bytes,
            "postcopy-bytes": self.postcopy_bytes,
        }
        return shown


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
