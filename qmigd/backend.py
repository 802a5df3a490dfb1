"""What a guest is to a migration: the page that the author of another kind of guest reads.

``qmigd/guests`` has those that there are.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from qmigd.interfaces import GuestFacts, Settings

__all__ = ["Examined", "Guest", "Tunable"]


@dataclass(frozen=True)
class Examined:
    """What a guest is like at one moment.

    :ivar status: its run state in QEMU's words.
    :ivar description: what a preflight compares, JSON (docs/protocol, GUEST).
    :ivar migration: the status of the last migration that its QEMU knows of, ``none`` if none.
    """

    facts: GuestFacts
    status: str
    description: Mapping[str, Any]
    migration: str = "none"


@dataclass(frozen=True)
class Tunable:
    """A migration parameter as the guest's QEMU describes it."""

    name: str
    #: QAPI's word for the type: ``"int"``, ``"bool"``, ``"str"``, or the name of an enum.
    type: str
    #: The values of an enum; empty for any other type.
    values: tuple[str, ...] = ()
    value: Any = None
    deprecated: bool = False
    unstable: bool = False


class Guest(Protocol):
    """What a migration asks of a guest.

    Between :meth:`attach` and :meth:`detach` the guest is in qmigd's hands.  All
    methods raise :class:`qmigd.errors.GuestError` or one of its kinds.
    """

    name: str
    backend: str

    @property
    def postcopy_without_pages(self) -> bool:
        """Whether it switches to postcopy where nothing is left to be sent; while attached."""

    @property
    def told_to_run(self) -> bool:
        """Whether its QEMU has been told to let it run since it was attached."""

    async def attach(self) -> None:
        """Take hold of the guest: ``GuestBusy`` if somebody has it, ``GuestGone`` if none."""

    def detach(self) -> None:
        """Let go; the guest goes on.  Harmless when not attached."""

    def watch(self, callback: Callable[[str, dict[str, Any]], None]) -> Callable[[], None]:
        """Call back with name and data of each event; returns what ends that.

        Beside QEMU's own events there is ``QMIGD_GONE``: the guest was lost.
        """

    async def examine(self) -> Examined:
        """Return what there is to know before a migration, all at one time."""

    async def tunables(self) -> list[Tunable]: ...

    async def checked(self, tunables: Mapping[str, Any]) -> dict[str, Any]:
        """Return a user's values in the types that the guest declares.

        :raises qmigd.errors.ArgumentError: a name is unknown or a value does not fit.
        """

    async def apply(
        self, settings: Settings, facts: GuestFacts | None = None
    ) -> tuple[Settings, Settings]:
        """Set; returns what the same names were set to before, and what was read back."""

    async def incoming(self, channel: str | socket.socket) -> None:
        """Have it wait for the stream on a URI, or take it from a connected socket."""

    async def migrate(self, channel: str | socket.socket) -> None:
        """Start the outgoing migration to a URI, or into a connected socket."""

    async def lend(self, *descriptors: int) -> str:
        """Give it copies of descriptors of one file; returns the name by which it opens them.

        A name is good until :meth:`unlend`, as often as QEMU likes.
        """

    async def unlend(self, name: str) -> None:
        """Take them away again; what QEMU has opened stays open."""

    async def query_status(self) -> str:
        """Return the run state in QEMU's words: running, paused, inmigrate ..."""

    async def query_migrate(self) -> dict[str, Any]:
        """Return QEMU's ``query-migrate``, with ``status`` always there (``none``)."""

    async def holds_on(self) -> bool:
        """Whether QEMU still has a migration's connection, or calls for one; over or not.

        It begins no other migration then: QEMU 10.0, told to cancel while it is still being
        connected, is ``cancelled`` at once and does not stop to call (``query-yank`` tells).
        """

    async def start_postcopy(self) -> None:
        """Ask for the switch; QEMU does it some time later."""

    async def cancel(self) -> None:
        """Ask for the end of the outgoing migration; does not wait for it."""

    async def stop(self) -> None: ...

    async def cont(self) -> None: ...

    async def quit(self) -> None:
        """End the guest's process; returns once it is gone."""
