"""What the daemon gives to every migration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..backend import Guest
from ..channels.attach import Attachments
from ..interfaces import GuestFacts, Host, IFeature
from ..negotiation.policy import Policy
from ..negotiation.terms import Conflict
from ..transports.descriptors import ChannelRequests
from ..transports.leftovers import Leftovers
from ..transports.ports import PortRange
from ..transports.uri import FdAddress, Place
from .security import Security
from .status import Records
from .verdicts import Verdicts

__all__ = ["Deadlines", "Guests", "HostFacts", "Journal", "Services"]


@dataclass(frozen=True)
class Deadlines:
    """How long to wait for what, in seconds.

    :ivar handshake: for the whole of a peer's handshake, and for each answer in it.
    :ivar peer: without any sign of life from the peer before it counts as lost.
    :ivar guest: for an answer from a QEMU, and for each step that it has to take.
    """

    handshake: float = 10.0
    peer: float = 10.0
    guest: float = 10.0

    @property
    def prepare(self) -> float:
        """For the destination's PREPARED: its QEMU may have to be started first."""
        return self.handshake + 3 * self.guest

    @property
    def ask(self) -> float:
        """For the answer of a lost destination to what became of a released guest."""
        return 6 * self.peer

    @property
    def stall(self) -> float:
        """Without any progress of a stream before a migration counts as hung."""
        return self.peer + 2 * self.guest


class Guests(Protocol):
    """The guests that are registered here."""

    def take(self, name: str, migration: str) -> Guest:
        """Reserve a guest for a migration.

        :raises GuestNotFound: there is none of that name.
        :raises GuestBusy: it is in another migration.
        """

    def retake(self, name: str, qmp: str, migration: str) -> Guest:
        """Reserve a guest that an earlier life of the daemon had, registered or not."""

    async def waiting(self, name: str | None, migration: str) -> Guest:
        """Reserve a guest that waits for its stream; one that is launched is started.

        :param name: ``None``: the only one that waits.
        :raises GuestError: none waits, or it cannot be started.
        """

    def assign(self, guest: Guest, migration: str) -> None:
        """The migration that has it is known by its id now."""

    def launched_for(self, guest: Guest, migration: str) -> bool:
        """Whether its QEMU was started for this very migration."""

    def where(self, guest: Guest) -> str:
        """Its QMP socket's URI: what finds it again after the daemon's death."""

    def free(self, guest: Guest) -> None:
        """The migration has ended."""


class Journal(Protocol):
    """What must survive the daemon's death."""

    def write(self, migration: str, role: str, entry: Mapping[str, Any]) -> None:
        """Put down, or replace, what is known of a migration.

        :raises MigrationError: it cannot be written, and what was known before still is.
        """

    def forget(self, migration: str, role: str) -> None:
        """The migration has ended."""


class HostFacts:
    """What is known of this host, which may become more while the daemon runs.

    :ivar host: as of now; whoever decides something by it, decides by what it was then.
    """

    def __init__(self, host: Host) -> None:
        self.host = host

    def learn(self, **facts: Any) -> None:
        """Take in facts, by the names of :class:`~qmigd.interfaces.Host`'s fields."""
        self.host = replace(self.host, **facts)


@dataclass(frozen=True)
class Services:
    """Everything around one migration that is not the migration itself.

    :ivar conflicts: what the QEMUs of two guests, source and destination, cannot combine.
    :ivar unawaited: the channels that a source's QEMU connects and does not wait for, though a
        migration that fails before they are there is the end of it.
    :ivar requests: asks the management app for connections, where it makes them.
    :ivar ports: what the destination offers for ``direct``; ``None``: nothing.
    :ivar run_dir: where the relay's unix sockets live; only this user can look inside.
    :ivar leftovers: the programs of ``exec:`` that an earlier life of the daemon has left.
    """

    reactor: Any
    facts: HostFacts
    features: Mapping[str, IFeature]
    policy: Policy
    guests: Guests
    records: Records
    journal: Journal
    attachments: Attachments
    verdicts: Verdicts
    requests: ChannelRequests
    conflicts: Callable[[GuestFacts, GuestFacts], list[Conflict]]
    unawaited: Callable[[GuestFacts], frozenset[str]]
    ports: PortRange | None
    run_dir: Path
    deadlines: Deadlines
    leftovers: Leftovers
    source_after: str = "keep"
    security: Security = field(default_factory=Security)

    @property
    def host(self) -> Host:
        """What is known of this host at present."""
        return self.facts.host

    def bound(self, peer: Place, migration: str, guest: str) -> Place:
        """Return what a migration connects to where the peer is to be reached at ``peer``."""
        if isinstance(peer, FdAddress):
            return peer.bind(self.requests, migration, guest, self.deadlines.handshake)
        return peer
