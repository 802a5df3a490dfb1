"""The destination's side of a migration: a guest that comes in.

It does not run by itself.  Its QEMU is told to ``stop`` before the stream flows, and to
``cont`` when RELEASE has come (see :mod:`qmigd.migration.ownership`); only in the
baseline form, where nobody would send RELEASE, QEMU decides as it always did.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from ..backend import Guest
from ..errors import (
    DeadlineError,
    GuestGone,
    MigrationError,
    QmigdError,
)
from ..handshake.events import (
    CancelAsked,
    Event,
    Released,
    Selected,
    StatusSaid,
)
from ..interfaces import Settings
from ..transports.descriptors import DescriptorAddress
from ..waiting import together
from .answering import Answering
from .control import Control
from .move import OVER
from .ownership import Act, on_destination_failure
from .ownership import Released as Owned
from .parting import finish_late, goes_on, part_late
from .services import Services
from .status import outcome

__all__ = ["Incoming"]

log = Logger()


class Incoming(Answering):
    """One guest on its way in."""

    def __init__(self, services: Services, control: Control, selected: Selected) -> None:
        super().__init__(services, control, selected)
        self._receiving = False
        self._owned = Owned.NO
        self._ran: bool | None = False
        self._told_running = False
        self._since: dict[str, float] = {}
        self._waits = True
        self._cancelled: str | None = None
        self._cancelling: str | None = None
        self._failure: QmigdError | None = None

    async def carry_out(self) -> None:
        await self.negotiate()
        await self._receive()

    # the stream

    async def _receive(self) -> None:
        guest, plan, control = self.guest, self.plan, self.control
        assert guest is not None and plan is not None
        self.record.update(step="receiving RAM")
        self.note("receiving")
        self._receiving = True
        if self.baseline:
            log.info(
                "guest {guest} comes in from {peer} with no feature selected",
                guest=guest.name,
                peer=self.record.peer,
            )
            await guest.incoming(await control.take_socket())
            await self.until_completed()
            return
        control.listen(self._said)
        control.stay_alive(self.services.deadlines.peer)
        assert self.path is not None  # with a feature there is one
        # QEMU is told both at once, in this order.
        _, ready = await together(
            [
                Deferred.fromCoroutine(guest.stop()),
                Deferred.fromCoroutine(self.path.open(self.at)),
            ]
        )
        if isinstance(control.transport.getPeer(), DescriptorAddress):
            self.services.requests.plan(
                *(self.record.id, self.record.guest, "destination", plan.channels),
                in_band=control.in_band,
            )
        control.machine.status({"ready": True, **ready})
        control.flush()
        await self._watch()

    async def _watch(self) -> None:
        """Follow QEMU until the guest is here for good.

        :raises QmigdError: it has failed, or must not go on.
        """
        while True:
            try:
                if await self._is_here():
                    return
            except DeadlineError as error:
                # A QEMU that is busy does not cost a guest that is nowhere else.
                if self._owned is Owned.NO or error is self._failure:
                    raise
                self._raise_if_torn(self.qemu_status)
            await self.rest()

    async def _is_here(self) -> bool:
        """Have a look; returns whether all of the guest is here, and ours.

        :raises QmigdError: it has failed, or must not go on.
        """
        status = await self.look()
        if status in OVER and status != "completed":
            raise MigrationError(f"the guest's migration {status}: {await self.reason()}")
        if self._failure is not None:
            raise self._failure
        if self._owned is Owned.NO:
            self._raise_if_over()
            if status == "completed":
                self.record.update(step="waiting for the source to release the guest")
            return False
        if await self._settled(status):
            return True
        self._raise_if_torn(status)
        return False

    async def _settled(self, status: str) -> bool:
        """The guest is ours: let it run; returns whether all of it is here."""
        assert self.guest is not None
        state = await self.guest.query_status()
        if status == "completed" and self.run and state != "running":
            await self.guest.cont()
            state = await self.guest.query_status()
        self._waits = state == "inmigrate"
        if state == "running" or (state != "inmigrate" and not self.run):
            self._ran = True
            self.services.verdicts.settle(self.record.id, True)
            if not self._told_running:
                self._told_running = True
                self._tell({"running": True, "status": status})
            return status == "completed"
        return False

    def _raise_if_torn(self, status: str) -> None:
        """Give up where the guest is ours and the rest of it cannot come any more."""
        torn = status == "postcopy-paused"
        if self.path is not None and self.path.failure is not None:
            # All may have come before; then QEMU needs a moment to say so.
            torn = torn or self._late("stream")
        if self._waits and status.startswith("postcopy"):
            # The devices come first in postcopy.  QEMU does not always say so when it cannot
            # load them: it may just close the stream, which only a relay would see.
            torn = torn or self._late("load")
        else:
            self._since.pop("load", None)
        if torn and self._waits:
            raise MigrationError(
                "the stream broke, or the guest's devices could not be loaded from it; "
                "the guest has not run here"
            )
        if torn:
            raise MigrationError(
                "the stream broke in postcopy; the guest runs here, and RAM that had not "
                "arrived is still at the source: do not end its process there"
            )

    def _late(self, what: str) -> bool:
        """Whether this has been so, look for look, for longer than a stream may stall."""
        since = self._since.setdefault(what, self.now())
        return self.now() - since > self.services.deadlines.stall

    def _raise_if_over(self) -> None:
        if self._cancelled is not None:
            raise MigrationError(self._cancelled, code="cancelled")
        if self.path is not None and self.path.failure is not None:
            raise self.path.failure
        if self.control.failure is not None:
            raise self.control.failure

    def _said(self, event: Event | None) -> None:
        """The source speaks."""
        if isinstance(event, CancelAsked):
            self._cancelled = event.reason or "cancelled at the source"
        elif isinstance(event, StatusSaid) and "cancelling" in event.body:
            self._cancelling = str(event.body["cancelling"])
        elif isinstance(event, Released):
            self.run = bool(event.body.get("run", True))
            Deferred.fromCoroutine(self._take_over())
        self.wake()

    async def _take_over(self) -> None:
        """RELEASE has come: the guest is ours from here on."""
        assert self.guest is not None
        try:
            self.note("released")
        except QmigdError as error:
            # Not ours then: a daemon that dies now must not come back to end its QEMU.
            self._failure = error
            self.wake()
            return
        self._owned = Owned.YES
        self.record.owner = "destination"
        if self.path is not None:
            self.path.hold()
        try:
            # A QEMU that is gone before it was told to run has never run.
            await self.guest.query_status()
            self._ran = None
            if self.run:
                # While it still waits for the stream this only lets it run later.
                await self.guest.cont()
            self._tell({"released": True})
        except QmigdError as error:
            self._failure = error
        self.wake()

    def _tell(self, body: Mapping[str, Any]) -> None:
        """Tell the source, if it is still there: it may be lost, but not what it released."""
        if self.control.failure is None:
            self.control.machine.status(body)
            self.control.flush()

    # the end

    async def settle(self, error: QmigdError | None) -> None:
        lingers = False
        if error is not None and self._cancelling is not None and self._owned is Owned.NO:
            # Whatever it was that broke: it was the user who has had it broken.
            error = MigrationError(self._cancelling, code="cancelled")
        if error is not None:
            lingers = await self._recover()
            self.services.verdicts.settle(self.record.id, self._ran)
        self._report(error)
        if error is None:
            await self._drain()
        self.control.close()
        if self.path is not None:
            self.path.close()
        self.services.requests.forget(self.record.id)
        later = error is not None and goes_on(self)
        if not (lingers or later):
            await self._leave()
        if error is None:
            self.record.end("arrived")
            return
        log.warn(
            "incoming migration {id} of guest {guest} {status}: {error}",
            id=self.record.id,
            guest=self.record.guest or "?",
            status=outcome(error),
            error=error.text,
        )
        self.record.end("runs here" if self._ran else "not here", error)
        if lingers:
            Deferred.fromCoroutine(self._end_late())
        elif later:
            Deferred.fromCoroutine(part_late(self))

    async def _leave(self) -> None:
        await self.put_back()
        self.leave()

    async def _end_late(self) -> None:
        """End a QEMU that is of no use any more, as soon as it hears of it.

        It may hang in a connection that was cut, for as long as the kernel believes in that.
        """

        async def end() -> str:
            assert self.guest is not None
            await self.guest.quit()
            return "its process here was ended"

        await finish_late(self, end)
        await self._leave()

    async def _recover(self) -> bool:
        """After a failure: nothing must run here that may run at the source.

        :return: its QEMU has to be ended, and does not answer.
        """
        if self.taking is not None:
            # A QEMU may just be starting for it.
            with suppress(QmigdError):
                await self.taking
        guest = self.guest
        if guest is None:
            return False
        ending = False
        try:
            if not self._receiving:
                if self.services.guests.launched_for(guest, self.record.id):
                    await guest.quit()
                return False
            if self._owned is Owned.YES:
                self._ran = await self._arrived(guest)
            if on_destination_failure(self._owned, bool(self._ran)) is Act.QUIT:
                self.saved = Settings()
                ending = True
                await guest.quit()
        except GuestGone:
            # It ended by itself, as QEMU does when a load fails.
            self.saved = Settings()
            if self._ran is None and not guest.told_to_run:
                self._ran = False
        except QmigdError as second:
            log.warn("guest {guest}: {error}", guest=guest.name, error=second.text)
            return ending and isinstance(second, DeadlineError)
        return False

    async def _arrived(self, guest: Guest) -> bool:
        """Whether the guest is here; if not, its QEMU can be ended without a doubt."""
        state = await guest.query_status()
        if state == "inmigrate":
            # From here on it does not run as soon as it is loaded.
            await guest.stop()
            state = await guest.query_status()
            if state != "inmigrate" and self.run:
                await guest.cont()
        return state != "inmigrate"

    def _report(self, error: QmigdError | None) -> None:
        """Tell the source what became of it."""
        control = self.control
        if self.baseline and self._receiving:
            return
        if error is not None and not self._receiving:
            control.refuse(error)
            return
        if control.failure is None:
            body: dict[str, Any] = {"ran": self._ran, "status": self.qemu_status}
            if error is not None:
                body["error"] = {"class": error.code, "desc": error.text}
            control.machine.outcome(body)
            control.flush()
            control.said_all()

    async def _drain(self) -> None:
        """Let a relay pass on what QEMU has still to say.

        QEMU calls a migration completed before it tells the source so on the return path,
        without which the source's QEMU never ends.  The source closes the control
        connection when all has arrived.
        """
        end = self.now() + self.services.deadlines.guest
        while self.path is not None and self.path.busy and self.now() < end:
            if self.control.failure is not None:
                return
            await self.rest()
