"""The guests that this daemon knows, and which of them are in a migration."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ..api import nearest
from ..backend import Guest
from ..errors import DeadlineError, GuestBusy, GuestError, GuestGone, GuestNotFound
from ..guests.launch import Launcher
from ..guests.memory.options import moved_away
from ..guests.qemu import Known, QemuGuest
from ..migration.move import OVER
from ..waiting import together, with_deadline
from .config import GuestConfig

__all__ = ["GuestRegistry"]

log = Logger()

#: Seconds that a guest may still be in the hands of a migration that is just ending.
SETTLING = 1.0

#: QEMU's run state while it waits for a stream.
WAITING = "inmigrate"


@dataclass
class _Entry:
    config: GuestConfig
    configured: bool
    launcher: Launcher | None = None
    #: What one look at its QEMU has found for the next.
    known: Known = field(default_factory=Known)
    #: The migration that has it, and the object through which it does.
    migration: str | None = None
    guest: QemuGuest | None = None
    #: The migration that its QEMU was started for.
    launched_for: str | None = None
    #: Who waits for it to be free.
    waiting: list[Deferred[None]] = field(default_factory=list)

    @property
    def backend(self) -> str:
        return QemuGuest.backend if self.config.memory is None else "memory"

    @property
    def qmp(self) -> str:
        return self.launcher.qmp if self.launcher is not None else f"unix:{self.config.qmp}"


class GuestRegistry:
    """Guests by name; provides :class:`qmigd.migration.services.Guests`."""

    def __init__(
        self,
        reactor: Any,
        configured: Mapping[str, GuestConfig],
        state_dir: Path,
        deadline: float,
    ) -> None:
        """:param deadline: seconds that a QEMU has for an answer."""
        self._reactor = reactor
        self._deadline = deadline
        self._entries = {
            name: _Entry(config, True, self._launcher(config, state_dir))
            for name, config in configured.items()
        }

    def _launcher(self, config: GuestConfig, state_dir: Path) -> Launcher | None:
        if not config.command:
            return None
        return Launcher(
            self._reactor,
            config.name,
            config.command,
            state_dir,
            deadline=3 * self._deadline,
        )

    async def start_guests(self) -> None:
        """Start the memory guests that are to run here, and do not.

        One that was moved away is left where it is.
        """
        for name, entry in self._entries.items():
            memory, launcher = entry.config.memory, entry.launcher
            if memory is None or memory.incoming or launcher is None:
                continue
            if moved_away(launcher.qmp):
                log.info("guest {name} was moved away from here, and is not started", name=name)
            elif not await launcher.running():
                try:
                    await launcher.start(incoming=False)
                except GuestError as error:
                    log.error("guest {name} does not start: {error}", name=name, error=error.text)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def unknown(self, name: str) -> str:
        """Say that there is no such guest."""
        known = ", ".join(self._entries) or "none yet; 'qmigctl guest-add' registers one"
        return f"there is no guest '{name}'{nearest(name, self._entries)} (guests: {known})"

    # for the management commands

    async def add(self, config: GuestConfig) -> dict[str, Any]:
        """Register a QEMU that runs, and take a first look at it.

        What that finds takes no time any more when a migration is to begin.

        :return: what :meth:`query` has of it.
        :raises GuestBusy: there is a guest of that name, or with that QMP socket.
        """
        if config.name in self._entries:
            raise GuestBusy(f"there is a guest '{config.name}' already; remove it first")
        for name, entry in self._entries.items():
            if entry.qmp == f"unix:{config.qmp}":
                raise GuestBusy(f"unix:{config.qmp} is the QMP socket of guest '{name}'")
        self._entries[config.name] = entry = _Entry(config, False)
        shown = await self._shown(entry, closely=True)
        log.info(
            "guest {name} was added: {what}",
            name=config.name,
            what=shown.get("reason", shown["state"]),
        )
        return shown

    def remove(self, name: str) -> None:
        """Forget a guest that was registered at run time.

        :raises GuestBusy: it is in a migration, or stands in the configuration.
        """
        entry = self._entry(name)
        if entry.configured:
            raise GuestBusy(f"guest '{name}' stands in the configuration file; remove it there")
        if entry.migration is not None:
            raise GuestBusy(f"guest '{name}' is in migration {entry.migration}")
        del self._entries[name]

    async def query(self) -> list[dict[str, Any]]:
        """The answer to ``query-guests``."""
        # At once: each of those that do not answer takes seconds.
        looks = [Deferred.fromCoroutine(self._shown(entry)) for entry in self._entries.values()]
        return await together(looks)

    async def _shown(self, entry: _Entry, *, closely: bool = False) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "name": entry.config.name,
            "backend": entry.backend,
            "qmp": entry.qmp,
            "launch": entry.launcher is not None,
            "configured": entry.configured,
        }
        shown["state"], reason = await self._state(entry, closely=closely)
        if reason:
            shown["reason"] = reason
        if entry.migration is not None:
            shown["migration"] = entry.migration
        return shown

    async def _state(self, entry: _Entry, *, closely: bool = False) -> tuple[str, str]:
        """The state of a guest, and why it could not be read.

        :param closely: the whole of the guest is looked at.
        """
        if entry.launcher is not None and not await entry.launcher.running():
            away = entry.config.memory is not None and moved_away(entry.launcher.qmp)
            reason = "it was moved away from here" if away else entry.launcher.failure
            return "not-started", reason
        try:
            async with self._held(entry) as guest:
                if closely:
                    return (await guest.examine()).status, ""
                return await guest.query_status(), ""
        except GuestBusy as error:
            return "busy", error.text
        except GuestError as error:
            return "unreachable", error.text

    @asynccontextmanager
    async def borrowed(self, name: str) -> AsyncIterator[Guest]:
        """Hold a guest for a look at it; one in a migration is looked at along with it.

        :raises GuestError: there is none of that name, or it cannot be reached.
        """
        async with self._held(self._entry(name)) as guest:
            yield guest

    @asynccontextmanager
    async def _held(self, entry: _Entry) -> AsyncIterator[QemuGuest]:
        if entry.guest is not None and entry.guest.attached:
            yield entry.guest
            return
        guest = self._guest(entry)
        await guest.attach()
        try:
            yield guest
        finally:
            guest.detach()

    # for migrations

    def take(self, name: str, migration: str) -> Guest:
        """Reserve a guest.

        :raises GuestNotFound: there is none of that name.
        :raises GuestBusy: it is in another migration.
        """
        return self._reserve(self._entry(name), migration)

    def check_free(self, name: str) -> None:
        """See that a guest can be reserved.

        :raises GuestNotFound: there is none of that name.
        :raises GuestBusy: it is in a migration.
        """
        self._check_free(self._entry(name))

    def retake(self, name: str, qmp: str, migration: str) -> Guest:
        """Reserve a guest that an earlier life of the daemon had, registered or not."""
        if name not in self._entries:
            self._entries[name] = _Entry(GuestConfig(name, qmp.removeprefix("unix:")), False)
        return self.take(name, migration)

    async def waiting(self, name: str | None, migration: str) -> Guest:
        """Reserve a guest that waits for its stream; one that is launched is started."""
        entry = self._entry(name) if name is not None else await self._only_waiting()
        if entry.migration is not None:
            await self._settled(entry)
        if entry.migration is not None:
            raise GuestBusy(
                f"guest '{entry.config.name}' is in migration {entry.migration} at the "
                "destination already; if it is on its way out there, the URI leads to the qmigd "
                "that has it, and not to another one"
            )
        guest = self._reserve(entry, migration)
        if entry.launcher is not None:
            try:
                if await self._make_room(entry):
                    await entry.launcher.start()
                    entry.launched_for = migration
            except BaseException:
                self.free(guest)
                raise
        return guest

    async def _settled(self, entry: _Entry) -> None:
        """Give a migration, or a mere question, that is just ending the time to end."""
        freed: Deferred[None] = Deferred()
        entry.waiting.append(freed)
        with suppress(DeadlineError):
            await with_deadline(self._reactor, freed, SETTLING, "the end of another migration")

    async def _make_room(self, entry: _Entry) -> bool:
        """Whether the launcher has to start a QEMU: none runs, or a spent one was ended."""
        assert entry.launcher is not None
        if not await entry.launcher.running():
            return True
        guest = self._guest(entry)
        await guest.attach()
        try:
            status = await guest.query_status()
            if status == WAITING and (await guest.query_migrate())["status"] not in OVER:
                return False
            if status == "running":
                raise GuestBusy(f"guest '{entry.config.name}' runs here already")
            if status in ("postmigrate", WAITING):
                # It was moved away from here and now comes back, or it failed to come in.
                await guest.quit()
                return True
            raise GuestBusy(
                f"guest '{entry.config.name}' is {status} here and waits for no migration; "
                f"end it first if it is of no use any more"
            )
        except GuestGone:
            return True
        finally:
            guest.detach()

    async def _only_waiting(self) -> _Entry:
        waiting = []
        for entry in list(self._entries.values()):
            if entry.migration is None:
                state, _ = await self._state(entry)
                if state in (WAITING, "not-started"):
                    waiting.append(entry)
        if len(waiting) == 1:
            return waiting[0]
        if not waiting:
            raise GuestNotFound("no guest was named, and none waits for a migration here")
        names = ", ".join(entry.config.name for entry in waiting)
        raise GuestNotFound(f"no guest was named, and more than one waits here: {names}")

    def assign(self, guest: Guest, migration: str) -> None:
        """The migration that has it is known by its id now."""
        entry = self._entry(guest.name)
        if entry.launched_for == entry.migration:
            entry.launched_for = migration
        entry.migration = migration

    def launched_for(self, guest: Guest, migration: str) -> bool:
        """Whether its QEMU was started for this very migration."""
        entry = self._entries.get(guest.name)
        return entry is not None and entry.launched_for == migration

    def where(self, guest: Guest) -> str:
        """Its QMP socket's URI."""
        return self._entry(guest.name).qmp

    def free(self, guest: Guest) -> None:
        """The migration that had it has ended."""
        entry = self._entries.get(guest.name)
        if entry is not None and entry.guest is guest:
            entry.guest = entry.migration = None
            waiting, entry.waiting = entry.waiting, []
            for freed in waiting:
                if not freed.called:
                    freed.callback(None)

    # inside

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise GuestNotFound(self.unknown(name)) from None

    def _guest(self, entry: _Entry) -> QemuGuest:
        return QemuGuest(
            *(self._reactor, entry.config.name, entry.qmp),
            deadline=self._deadline,
            known=entry.known,
            backend=entry.backend,
        )

    def _check_free(self, entry: _Entry) -> None:
        if entry.migration is not None:
            raise GuestBusy(f"guest '{entry.config.name}' is in migration {entry.migration}")

    def _reserve(self, entry: _Entry, migration: str) -> Guest:
        self._check_free(entry)
        entry.migration = migration
        entry.guest = self._guest(entry)
        return entry.guest
