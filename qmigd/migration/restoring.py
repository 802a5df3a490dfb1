"""A guest that comes out of a file, from the file's head to the guest that runs.

::

    prepare   the file's head is read and proved
    examine   a QEMU that waits; the two guests are compared; what QEMU saved is verified
    load      QEMU's settings; the guest is kept from running by itself; its RAM
    settle    settings put back; the guest runs, if it ran when it was saved

Up to ``load`` its QEMU waits as before and can be used again.  A QEMU whose load has
failed is of no use any more and is ended.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twisted.logger import Logger

from ..channels.file_streams import pour_in
from ..channels.pump import SEND_BUFFER
from ..channels.saved_files import SavedFile
from ..errors import (
    DeadlineError,
    FileError,
    GuestGone,
    MigrationError,
    PreflightError,
    QmigdError,
)
from ..interfaces import MAPPED_RAM, ZSTD, Settings
from ..transports.sockets import set_send_buffer
from . import preflight
from .filing import Filing, way
from .move import OVER
from .services import Services
from .status import Record

__all__ = ["RestoreOptions", "Restoring"]

log = Logger()


@dataclass(frozen=True)
class RestoreOptions:
    """What the user wants.

    :ivar verify: what QEMU saved is compared with its checksum before QEMU gets it.
    """

    verify: bool = True
    tunables: Mapping[str, Any] = field(default_factory=dict)


class Restoring(Filing):
    """One guest on its way out of a file."""

    too_late = "the guest is here"
    not_now = "the guest is not being loaded yet, or is here already"

    def __init__(
        self, services: Services, record: Record, path: Path, options: RestoreOptions
    ) -> None:
        super().__init__(services, record, path)
        self._options = options
        self._file = SavedFile(path)
        head = self._file.head
        record.file = {
            "path": str(path),
            "format": head.format,
            "features": list(head.features),
            "size": head.offset + head.length,
            "on-disk": os.fstat(self._file.descriptor).st_blocks * 512,
        }
        self._pid: int | None = None
        self._poured_in = 0
        self._already = 0

    # the guest out of the file

    async def carry_out(self) -> None:
        head, file = self._file.head, self._file
        guest = await self.find_waiting(self.record.guest)
        examined = await self.take_waiting(guest, "to be restored")
        facts = examined.facts
        self._compare(head.guest, examined.description)
        tunables = self._options.tunables
        tunables = await guest.checked(tunables) if tunables else {}
        chosen = way(self.services, facts, "destination", tunables, head.format)
        self.record.tunables = tunables
        self.record.file = {**(self.record.file or {}), "features": list(chosen.features)}
        self.raise_if_cancelled()
        if self._options.verify:
            self.record.update(step="verifying the file")
            await self.done(
                self.work(file.descriptor, "verify", lambda own: file.verify(own, self._stop))
            )
        self.remember(chosen.settings, facts)
        self.note()
        await self.set_up(chosen.settings)
        self.record.update(step="loading RAM")
        self._moving = True
        await guest.stop()
        if head.format == MAPPED_RAM:
            name = await self.lend(file, facts)
            self._pid = facts.process.pid if facts.process is not None else None
            self._already = self._read() or 0
            await guest.incoming(f"file:{name},offset={head.offset:#x}")
        else:
            await guest.incoming(self._open_stream())
        self.record.under_way()
        await self._watch()
        self._settled = True
        self.record.owner = "destination"
        if head.run:
            await guest.cont()

    def _compare(self, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
        """See that the guest that was saved fits into the one that waits."""
        if found := preflight.differences(saved, here):
            raise PreflightError(
                f"the guest that was saved in {self.path} (the source) and guest "
                f"{self.record.guest} here do not fit together, and no RAM has been read: "
                + "; ".join(found)
            )

    def _open_stream(self) -> socket.socket:
        """Return the socket for QEMU to read what is in the file."""
        ours, its = socket.socketpair()
        set_send_buffer(ours, SEND_BUFFER)
        self._stream = ours
        head = self._file.head

        def pour(descriptor: int) -> None:
            pour_in(
                descriptor,
                head.offset,
                head.length,
                ours,
                packed=head.format == ZSTD,
                moved=self._count,
            )

        self.work(self._file.descriptor, "restore", pour).addBoth(self.poured, ours)
        return its

    def _count(self, size: int) -> None:
        self._poured_in += size

    async def _watch(self) -> None:
        """Follow QEMU until the guest is loaded.

        :raises QmigdError: it cannot be, or must not.
        """
        stall = self.services.deadlines.stall
        moved: int | None = -1
        since = self.now()
        while True:
            status = await self._status()
            self.raise_if_broken()
            self.raise_if_cancelled()
            if status == "completed":
                return
            if status in OVER:
                reason = await self.reason()
                self.raise_if_broken()
                raise FileError(f"the guest's process could not load {self.path}: {reason}")
            if (now := self._read()) != moved:
                moved, since = now, self.now()
                if moved is not None:
                    self._tell(moved - self._already)
            elif now is None:
                since = self.now()
            if self.now() - since > stall:
                raise MigrationError(
                    f"nothing has been read for {stall:g} seconds (migration status: {status})",
                    code="deadline",
                )
            await self.rest()

    async def _status(self) -> str:
        """How far QEMU is; it answers nothing while it reads RAM out of a file by itself."""
        try:
            return await self.look()
        except DeadlineError:
            return self.qemu_status
        except GuestGone:
            self.raise_if_broken()
            raise FileError(
                f"the guest's process ended while it loaded {self.path}; what it has "
                "printed says why"
            ) from None

    def _read(self) -> int | None:
        """Bytes of the file that have been read, or of all that QEMU reads; ``None``: unknown."""
        if self._file.head.format != MAPPED_RAM:
            return self._poured_in
        try:
            counts = Path(f"/proc/{self._pid}/io").read_text()
        except OSError:
            return None
        return int(counts.split()[1])  # rchar, see proc(5)

    def _tell(self, read: int) -> None:
        """Show how far it is, in QEMU's terms: a destination's QEMU says nothing of it."""
        file = self.record.file or {}
        total = min(file["size"], file["on-disk"])
        ram = {"total": total, "transferred": read, "remaining": max(0, total - read)}
        self.record.progressed({"ram": ram})

    # the end

    async def settle(self, error: QmigdError | None) -> None:
        step = "restored; it runs here" if self._file.head.run else "restored; it is paused here"
        self._stop.set()
        self.cut_stream()
        if error is not None:
            step = await self._give_up()
        await self.take_back()
        self._file.close()
        await self.put_back()
        self.leave()
        if error is not None:
            log.warn(
                "guest {guest} was not restored from {path}: {error}; {step}",
                guest=self.record.guest,
                path=self.path,
                error=error.text,
                step=step,
            )
        self.record.end(step, error)

    async def _give_up(self) -> str:
        """After a failure: nothing of it may run here; returns what has become of the QEMU."""
        guest = self.guest
        if guest is None:
            return "not here; nothing of it has been loaded"
        try:
            if self._settled:
                return "the guest is here, but could not be let run"
            launched = self.services.guests.launched_for(guest, self.record.id)
            if not self._moving and not launched:
                return "not here; its process is as it was"
            self.saved = Settings()
            await guest.quit()
        except GuestGone:
            pass
        except QmigdError as second:
            return f"not here; its process could not be ended: {second.text}"
        return "not here; its process was ended"

    def note(self) -> None:
        self.put_down("receiving", file=str(self.path), run=self._file.head.run)
