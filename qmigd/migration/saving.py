"""A guest that is saved into a file, from the first look at it to the file's name.

::

    prepare   the guest and its QEMU are looked at; the file is made, under another name
    save      QEMU's settings; the guest stops, unless it is to be saved live; its RAM
    finish    the file is brought to the disk, checksum and head with it, and gets its name
    settle    settings put back; on a failure the guest runs on and the file is gone

Until the file has its name the guest is not allowed to end: whatever fails before, it runs
on.  What becomes of it afterwards is the user's choice, since a guest and the file that
it was saved to share their disks.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from .. import __version__
from ..backend import Guest
from ..channels.file_streams import pour_out
from ..channels.pump import SEND_BUFFER
from ..channels.saved_files import NewFile, checksum, sync
from ..errors import DeadlineError, FileError, MigrationError, QmigdError
from ..interfaces import MAPPED_RAM, ZSTD, GuestFacts
from ..transports.sockets import set_send_buffer
from ..waiting import in_thread, together
from ..wire.saved import NO_CHECKSUM, Head, offset_for
from .filing import Filing, Way, way
from .movable import check_movable
from .move import OVER
from .parting import finish_late
from .services import Services
from .status import Record

__all__ = ["AFTER", "CONTINUE", "KEEP", "QUIT", "SaveOptions", "Saving"]

log = Logger()

#: What becomes of the guest once it is saved.
KEEP: Final = "keep"
QUIT: Final = "quit"
CONTINUE: Final = "continue"
AFTER: Final = (KEEP, CONTINUE, QUIT)


@dataclass(frozen=True)
class SaveOptions:
    """What the user wants.

    :ivar format: one of :data:`~qmigd.interfaces.FORMATS`; ``None``: the best one.
    :ivar live: the guest runs on while its RAM is saved.
    :ivar after: one of :data:`AFTER`.
    :ivar replace: a file of that name may be there.
    :ivar checksum: what QEMU saves gets one.
    """

    format: str | None = None
    live: bool = False
    after: str = KEEP
    replace: bool = False
    checksum: bool = True
    tunables: Mapping[str, Any] = field(default_factory=dict)


class Saving(Filing):
    """One guest on its way into a file."""

    too_late = "the guest is saved"
    not_now = "the guest is not being saved yet, or is saved already"

    def __init__(
        self, services: Services, record: Record, path: Path, options: SaveOptions
    ) -> None:
        super().__init__(services, record, path)
        record.step = "looking at the guest"
        self._options = options
        self._file: NewFile | None = None
        self._head: Head | None = None
        self._way: Way | None = None
        self._facts: GuestFacts | None = None
        self._ran = False
        self._pouring = False

    async def prepare(self, guest: Guest) -> None:
        """Look at the guest, and make the file.

        :raises QmigdError: it cannot be saved, or not like that; nothing has changed.
        """
        try:
            await self.attach(guest)
            options = self._options
            tunables = await guest.checked(options.tunables) if options.tunables else {}
            examined = await guest.examine()
            check_movable(examined, "saved")
            self._ran = examined.status == "running"
            self._facts = facts = examined.facts
            self._way = chosen = way(self.services, facts, "source", tunables, options.format)
            self.record.tunables = tunables
            described = {**examined.description}
            # They say how the guest was saved, and QEMU will be told so at the restore.
            described.pop("capabilities", None)
            head = Head(
                format=chosen.format,
                features=chosen.features,
                run=self._ran,
                guest=described,
                saved=time.time(),
                by=__version__,
            )
            self._head = head = replace(head, offset=offset_for(head))
            self.remember(chosen.settings, facts)
            self.note()
            self._file = NewFile(self.path, self.record.id, replace=options.replace)
            self._file.write_head(head)
            self._tell()
        except BaseException:
            self._close()
            self.leave()
            raise

    async def carry_out(self) -> None:
        await self._save()
        await self._finish()

    # the guest into the file

    async def _save(self) -> None:
        guest, chosen, file, head = self.guest, self._way, self._file, self._head
        facts = self._facts
        assert guest is not None and facts is not None
        assert chosen is not None and file is not None and head is not None
        self.raise_if_cancelled()
        await self.set_up(chosen.settings)
        self.record.update(step="saving RAM")
        self._moving = True
        if self._ran and not self._options.live:
            # One pass, that is sure to end, and no page twice in a stream.
            await guest.stop()
        if chosen.format == MAPPED_RAM:
            name = await self.lend(file, facts)
            await guest.migrate(f"file:{name},offset={head.offset:#x}")
        else:
            await guest.migrate(self._open_stream(file, head, chosen.format == ZSTD))
        self.record.under_way()
        await self._watch()
        await self.sum_up()
        self._moving = False
        if self._options.after == CONTINUE and self._ran:
            # RAM, devices and disks are of one moment.  What is left does not need it stopped.
            await self._go_on()

    def _open_stream(self, file: NewFile, head: Head, packed: bool) -> socket.socket:
        """Return the socket for QEMU to write to; what comes out goes to the file."""
        ours, its = socket.socketpair()
        set_send_buffer(its, SEND_BUFFER)
        self._stream = ours
        self._pouring = True
        cpus = self.services.host.cpus

        def pour(descriptor: int) -> None:
            pour_out(ours, descriptor, head.offset, packed=packed, cpus=cpus)

        self.work(file.descriptor, "save", pour).addBoth(self._poured, ours)
        return its

    def _poured(self, result: Any, ours: socket.socket) -> None:
        """All is in the file that QEMU has said, or no more of it can be."""
        self._pouring = False
        self.poured(result, ours)

    async def _watch(self) -> None:
        """Follow QEMU until all is written.

        :raises QmigdError: it has failed, or must not go on.
        """
        stall = self.services.deadlines.stall
        while True:
            status = await self.look()
            self.raise_if_broken()
            self.raise_if_cancelled()
            if status == "completed" and not self._pouring:
                return
            if status in OVER and status != "completed":
                raise FileError(
                    f"guest {self.record.guest} could not be saved to {self.path}: "
                    f"{await self.reason()}"
                )
            if self.stalled_for() > stall:
                raise MigrationError(
                    f"nothing has been written for {stall:g} seconds (migration status: {status})",
                    code="deadline",
                )
            self._tell()
            await self.rest()

    # the file onto the disk

    async def _finish(self) -> None:
        file, head, stop = self._file, self._head, self._stop
        assert file is not None and head is not None
        self.record.update(step="bringing the file to the disk")
        length = file.size - head.offset
        # Both at once: the one waits for the disk, the other reads what is still in memory.
        work: list[Deferred[Any]] = [self.work(file.descriptor, "sync", sync)]
        if self._options.checksum:
            offset = head.offset
            work.append(
                self.work(
                    file.descriptor,
                    "checksum",
                    lambda descriptor: checksum(descriptor, offset, length, stop),
                )
            )
        results = await self.done(Deferred.fromCoroutine(together(work)))
        digest = results[1] if self._options.checksum else NO_CHECKSUM
        self._head = head = replace(head, length=length, checksum=digest)
        file.write_head(head, complete=True)
        self._tell()
        await self.done(self.work(file.descriptor, "sync", sync))
        self._settled = True
        await in_thread(self.services.reactor, "publish", file.publish)

    def _tell(self) -> None:
        """Put into the record what there is to know of the file."""
        file, head, chosen = self._file, self._head, self._way
        assert file is not None and head is not None and chosen is not None
        self.record.file = {
            "path": str(self.path),
            "format": chosen.format,
            "features": list(chosen.features),
            "size": file.size,
            "on-disk": file.on_disk,
        }

    # the end

    async def settle(self, error: QmigdError | None) -> None:
        step = "saved"
        lingers = False
        if error is not None:
            # First: from here on a daemon that dies has to let the guest run on in any case.
            self.note(given_up=True)
            self._close()
            try:
                step = await self._bring_back()
            except DeadlineError as second:
                lingers = True
                step = f"its process is not done, and qmigd goes on waiting for it: {second.text}"
            except QmigdError as second:
                step = f"its process could not be asked: {second.text}"
        self._close()
        if not lingers:
            await self.take_back()
            await self.put_back()
            if error is None:
                step = await self._after()
            self.leave()
        if error is not None:
            log.warn(
                "guest {guest} was not saved to {path}: {error}; {step}",
                guest=self.record.guest,
                path=self.path,
                error=error.text,
                step=step,
            )
        self.record.end(step, error)
        if lingers:
            Deferred.fromCoroutine(self._bring_back_late())

    async def _bring_back(self) -> str:
        """After a failure: end QEMU's migration, and let the guest run on.

        :raises DeadlineError: QEMU does not end it in time.
        """
        if self._moving:
            await self.end_migration()
        return await self._go_on()

    async def _bring_back_late(self) -> None:
        async def bring_back() -> str:
            step = await self._bring_back()
            await self.take_back()
            await self.put_back()
            return step

        await finish_late(self, bring_back)
        self.leave()

    async def _go_on(self) -> str:
        """Let the guest run, if it ran; returns what it does."""
        assert self.guest is not None
        if not self._ran:
            return "the guest is paused, as it was"
        if await self.guest.query_status() != "running":
            await self.guest.cont()
        return "the guest goes on here"

    async def _after(self) -> str:
        guest, after = self.guest, self._options.after
        assert guest is not None
        try:
            if after == CONTINUE:
                return "saved; " + await self._go_on()
            if after == QUIT:
                await guest.quit()
                return "saved; the process here was ended"
        except QmigdError as error:
            return f"saved; {error.text}"
        return "saved; kept here paused, as it was saved"

    def _close(self) -> None:
        self._stop.set()
        self.cut_stream()
        if self._file is not None:
            self._file.close()

    def note(self, *, given_up: bool = False) -> None:
        """Put down what a daemon has to know that finds the save interrupted.

        A file that has lost its temporary name has got its own, unless it was given up.
        """
        more: dict[str, Any] = {"was-running": self._ran}
        if not given_up:
            more["file"] = str(NewFile.place(self.path, self.record.id))
        self.put_down("saving", **more)
