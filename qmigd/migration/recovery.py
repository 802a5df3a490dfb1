"""After the daemon itself died: what becomes of the migrations that it had under way.

The journal says how far each one was.  QEMU has gone on without the daemon, or has
stopped because its relay was gone; either way the rules of
:mod:`qmigd.migration.ownership` say whose the guest is, and what qmigd had set on
its QEMU is put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.logger import Logger

from ..backend import Guest
from ..channels.saved_files import discard
from ..errors import GuestGone, QmigdError
from ..interfaces import RELAY, Role, Settings
from ..transports.programs import reach
from ..transports.uri import InBandAddress, bare, parse_uri
from .move import Move
from .parting import goes_on, part_late
from .services import Services
from .verdicts import ask

__all__ = ["Recovery"]

log = Logger()


class Recovery(Move):
    """One migration of an earlier life of the daemon, on its way to an end."""

    def __init__(
        self, services: Services, migration: str, role: str, entry: Mapping[str, Any]
    ) -> None:
        """:param entry: what the journal has of it."""
        side: Role = "source" if role == "source" else "destination"
        super().__init__(
            services, services.records.new(migration, entry["guest"], side, entry["peer"])
        )
        self._entry = entry
        self._step = ""

    async def carry_out(self) -> None:
        entry, services = self._entry, self.services
        self.guest = services.guests.retake(entry["guest"], entry["qmp"], self.record.id)
        if self.record.role == "destination":
            services.verdicts.expect(self.record.id, bytes.fromhex(entry.get("secret", "")))
        await self.attach(self.guest)
        self.saved = Settings(
            entry.get("capabilities", {}),
            entry.get("parameters", {}),
            dict.fromkeys(entry.get("objects", ())),
        )
        if self.record.role == "source":
            self._step = await self._source(self.guest)
        else:
            self._step = await self._destination(self.guest)
        if self.saved:
            await self.look()
            if not goes_on(self):
                await self.put_back()

    async def settle(self, error: QmigdError | None) -> None:
        entry, services, id, role = self._entry, self.services, self.record.id, self.record.role
        if isinstance(error, GuestGone):
            if role == "destination" and entry["stage"] != "released":
                services.verdicts.settle(id, False)
            if role == "source" and "file" in entry:
                discard(entry["file"])
            self.saved = Settings()
            self._step = f"its process is gone: {error.text}"
        elif error is not None:
            self._step = f"it could not be brought to an end: {error.text}"
        log.warn(
            "migration {id} of guest {guest} was interrupted by the end of an earlier qmigd: "
            "{step}",
            id=id,
            guest=entry["guest"],
            step=self._step,
        )
        if goes_on(self):
            await part_late(self)
        self.leave()
        await services.leftovers.end_for(self.record.name)

    async def _source(self, guest: Guest) -> str:
        entry = self._entry
        # Nobody finishes a file any more.  If QEMU still writes, then to one that has no name.
        if "file" in entry and not discard(entry["file"]):
            return "it was saved"
        if entry["stage"] == "released" and not await self._never_ran():
            return "the guest is the destination's"
        # A relay has ended with the daemon.
        if entry.get("path") != RELAY or not await self.fails_by_itself():
            await self.cancel_migration()
        await self.until_over()
        if entry.get("baseline") and self.qemu_status == "completed":
            # Nobody has to be asked there: the destination's QEMU lets it run by itself.
            return "the guest is the destination's"
        if entry.get("was-running", True) and await guest.query_status() != "running":
            await guest.cont()
        return "the guest goes on here"

    async def _never_ran(self) -> bool:
        """Whether the destination says so of a guest that was released to it."""
        services, entry = self.services, self._entry
        try:
            uri, secret = parse_uri(entry["peer"]), bytes.fromhex(entry["secret"])
        except (QmigdError, KeyError, ValueError) as error:
            log.warn(
                "migration {id} cannot be asked about: {error}", id=self.record.id, error=error
            )
            return False
        peer = services.bound(bare(uri), self.record.id, entry["guest"])
        hostname = entry.get("tls-hostname")
        tls = services.security.calling(hostname) if hostname else None
        reached, programs = reach(services.reactor, peer, self.record.name, services.leftovers)
        end = self.now() + services.deadlines.ask
        try:
            while self.now() < end:
                try:
                    answer = await ask(
                        services.reactor,
                        reached,
                        self.record.id,
                        secret,
                        services.deadlines.handshake,
                        tls,
                        in_band=isinstance(uri, InBandAddress),
                    )
                except QmigdError as error:
                    log.info("no answer from {peer}: {error}", peer=reached, error=error.text)
                else:
                    if answer.get("ran") is not None:
                        return answer["ran"] is False
                await self.rest()
        finally:
            if programs is not None:
                await programs.end()
        return False

    async def _destination(self, guest: Guest) -> str:
        entry = self._entry
        if entry["stage"] == "prepared":
            return "nothing had been moved; its process still waits"
        if "file" in entry:
            return await self._restored(guest)
        if entry["stage"] == "receiving":
            if entry.get("baseline"):
                # QEMU has the connection, and lets the guest run by itself.
                await self.until_over()
            if await guest.query_status() == "running":
                self.services.verdicts.settle(self.record.id, True)
                return "it runs here"
            if entry.get("baseline") and self.qemu_status == "completed":
                return "it is here, as it was at the source"
            self.saved = Settings()
            await guest.quit()
            self.services.verdicts.settle(self.record.id, False)
            return "the guest is the source's; the half of it that was here was ended"
        await self.until_over()
        if entry.get("run", True) and await guest.query_status() != "running":
            await guest.cont()
        self.services.verdicts.settle(self.record.id, True)
        return "the guest runs here"

    async def _restored(self, guest: Guest) -> str:
        """A guest out of a file: QEMU may have it whole, if it reads the file by itself."""
        await self.until_over()
        if self.qemu_status == "none":
            return "nothing of it had been loaded; its process still waits"
        if self.qemu_status != "completed":
            self.saved = Settings()
            await guest.quit()
            return "its file was not read to the end, and its process was ended"
        if self._entry.get("run", True) and await guest.query_status() != "running":
            await guest.cont()
        return "it was restored"
