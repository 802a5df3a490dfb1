"""What is known of a migration while it runs and after it: the record behind ``query-migrate``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from twisted.logger import Logger

from ..errors import MigrationError, QmigdError
from ..interfaces import Role
from ..negotiation.plan import Plan

__all__ = ["ENDED", "Record", "Records", "outcome"]

log = Logger()

#: QEMU's words for a migration that has ended.
ENDED = frozenset({"completed", "failed", "cancelled"})

#: The code of the error that a user's wish to end a migration comes to, on either side.
_CANCELLED = "cancelled"

#: How many ended migrations are remembered.
REMEMBERED = 100

Listener = Callable[[str, dict[str, Any]], None]

#: The members of QEMU's ``query-migrate`` that are passed on as they are.
_PASSED_ON = (
    "ram",
    "total-time",
    "setup-time",
    "downtime",
    "expected-downtime",
    "cpu-throttle-percentage",
    "postcopy-blocktime",
    "blocked-reasons",
)


def outcome(error: QmigdError | None) -> str:
    """Return the status that a migration ends with, one of :data:`ENDED`.

    :param error: what has ended it, found here or reported by the peer; ``None``: nothing.
    """
    if error is None:
        return "completed"
    return "cancelled" if error.code == _CANCELLED else "failed"


@dataclass
class Record:
    """One migration, on one side.

    :ivar id: a UUID, the same on both sides.
    :ivar status: in QEMU's words; ``setup`` until QEMU says another.
    :ivar peer_names: in TLS, the names in the other host's certificate.
    :ivar step: what is going on, for people.
    :ivar owner: whose the guest is (:mod:`qmigd.migration.ownership`).
    :ivar progress: what QEMU's ``query-migrate`` said last.
    :ivar negotiation_time: seconds from the command to QEMU's own start.
    :ivar handover_time: seconds in which the guest stood still for the daemons' sake,
        beyond QEMU's own downtime.
    :ivar file: what there is to know of the file, where it is a save or a restore.
    :ivar listed: it is one of the migrations that the daemon shows and tells of.
    """

    id: str
    guest: str
    role: Role
    peer: str
    notify: Listener
    status: str = "setup"
    peer_names: tuple[str, ...] = ()
    step: str = "negotiating"
    plan: Plan | None = None
    tunables: Mapping[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    owner: Role = "source"
    can_postcopy: bool = False
    error: QmigdError | None = None
    started: float = field(default_factory=time.time)
    ended: float | None = None
    negotiation_time: float | None = None
    handover_time: float | None = None
    file: Mapping[str, Any] | None = None
    listed: bool = False
    _passes: int = 0

    @property
    def name(self) -> str:
        """What it is called in the log."""
        return f"migration {self.id} of guest {self.guest}"

    def update(self, *, status: str | None = None, step: str | None = None) -> None:
        """Take over a new status or step, and tell the listeners of a new status."""
        if step is not None:
            self.step = step
        if status is not None and status != self.status and self.ended is None:
            self.status = status
            self._tell()

    def under_way(self) -> None:
        """QEMU has been told to migrate: all that came before was negotiation."""
        self.negotiation_time = time.time() - self.started

    def progressed(self, progress: Mapping[str, Any]) -> None:
        """Take over what QEMU's ``query-migrate`` says."""
        for name in _PASSED_ON:
            if name in progress:
                self.progress[name] = progress[name]

    def passed(self, number: int) -> None:
        """A pass over the guest's RAM has begun."""
        if number > self._passes and self.listed:
            self._passes = number
            self.notify("MIGRATION_PASS", {"id": self.id, "guest": self.guest, "pass": number})

    def end(self, step: str, error: QmigdError | None = None) -> None:
        """The migration has ended, by an error or well; nothing changes any more."""
        if self.ended is None:
            self.step = step
            self.error = error
            self.can_postcopy = False
            self.status = outcome(error)
            self.ended = time.time()
            if error is None and self.listed:
                log.info("{name} has completed: {step}", name=self.name, step=step)
            self._tell()

    def _tell(self) -> None:
        if self.listed:
            self.notify(*self.event())

    def event(self) -> tuple[str, dict[str, Any]]:
        """Name and data of the event that tells of the present status."""
        data: dict[str, Any] = {
            "id": self.id,
            "guest": self.guest,
            "role": self.role,
            "status": self.status,
        }
        if self.error is not None:
            data["error"] = {"class": self.error.code, "desc": self.error.text}
        return "MIGRATION", data

    def to_json(self) -> dict[str, Any]:
        """The entry in the answer to ``query-migrate``."""
        entry: dict[str, Any] = {
            "id": self.id,
            "guest": self.guest,
            "role": self.role,
            "peer": self.peer,
            "status": self.status,
            "step": self.step,
            "tunables": dict(self.tunables),
            "postcopy": self.can_postcopy,
            "owner": self.owner,
            "started": self.started,
            **self.progress,
        }
        if self.file is not None:
            entry["file"] = dict(self.file)
        if self.peer_names:
            entry["peer-names"] = list(self.peer_names)
        if self.plan is not None:
            entry["plan"] = self.plan.to_json()
        if self.negotiation_time is not None:
            entry["negotiation-time"] = round(self.negotiation_time * 1000, 2)
        if self.handover_time is not None:
            entry["handover-time"] = round(self.handover_time * 1000, 2)
        if self.error is not None:
            entry["error"] = {"class": self.error.code, "desc": self.error.text}
        if self.ended is not None:
            entry["ended"] = self.ended
        return entry


class Records:
    """All migrations that this daemon knows, the oldest first."""

    def __init__(self, notify: Listener) -> None:
        self._notify = notify
        self._records: dict[tuple[str, Role], Record] = {}

    def new(self, migration: str, guest: str, role: Role, peer: str) -> Record:
        """Make a record; it is shown once :meth:`add` has listed it."""
        return Record(migration, guest, role, peer, self._notify)

    def add(self, record: Record) -> None:
        """List it; old ended ones make room.

        :raises MigrationError: there is one of that id in that role already.
        """
        key = record.id, record.role
        if key in self._records:
            raise MigrationError(f"there is a migration {record.id} already", code="repeated")
        ended = [key for key, other in self._records.items() if other.ended is not None]
        for old in ended[: max(0, len(ended) - REMEMBERED + 1)]:
            del self._records[old]
        self._records[key] = record
        record.listed = True
        way = "to" if record.role == "source" else "from"
        log.info("{name} {way} {peer} begins", name=record.name, way=way, peer=record.peer)
        record.notify(*record.event())

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def of(self, name: str) -> list[Record]:
        """The records of a guest, or those with that id."""
        return [record for record in self._records.values() if name in (record.guest, record.id)]
