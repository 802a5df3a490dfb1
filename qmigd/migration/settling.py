"""The end of a migration at the source: whatever happened, both hosts are left in order.

After a failure the guest runs here again, unless it may run at the destination
(:mod:`qmigd.migration.ownership`), and what was set on its QEMU is put back.  That has to
wait until QEMU is done with its migration, which can be long after the user has been told.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from ..errors import DeadlineError, QmigdError
from ..handshake.events import Outcome
from .move import LOOK
from .ownership import SAID, Act, Peer, Released, on_source_failure
from .parting import finish_late, goes_on, part_late
from .proposing import Cancelled, Proposing
from .source_path import SourcePath
from .status import outcome
from .verdicts import ask

__all__ = ["Settling"]

log = Logger()


class Settling(Proposing):
    """A source that knows how far it has come, and how to end from there."""

    _path: SourcePath | None = None
    _started = False
    _released = Released.NO
    _peer = Peer.NEVER_RAN
    _outcome: Outcome | None = None
    _stage = ""
    _lingers = False
    _asked = -1

    async def _ask(self) -> None:
        """RELEASE was sent and the connection lost: find out whether the guest arrived."""
        self.record.update(step="asking the destination whether the guest has arrived")
        end = self.now() + self.services.deadlines.ask
        while self._peer is Peer.UNKNOWN and self.now() < end:
            try:
                self._asked += 1
                answer = await ask(
                    self.services.reactor,
                    # Where it was reached before; or else wherever its name leads.
                    self.uri if self._asked % 2 else self.reached,
                    self.record.id,
                    self.secret,
                    self.services.deadlines.handshake,
                    self.tls_side() if self.in_tls else None,
                    in_band=self.in_band,
                )
            except QmigdError as error:
                log.info("no answer from {peer}: {error}", peer=self.uri, error=error.text)
            else:
                self._peer = SAID[answer.get("ran")]
            if self._peer is Peer.UNKNOWN:
                await deferLater(self.services.reactor, LOOK)

    async def settle(self, error: QmigdError | None) -> None:
        step = "moved"
        if error is not None:
            self._announce(error)
            step = await self._recover(error)
        if self.control is not None:
            self._part(error)
        if self._path is not None:
            self._path.close()
        later = self._lingers or (error is not None and goes_on(self))
        if not later:
            await self.put_back()
            if error is None and self.services.source_after == "quit":
                step = await self._quit()
            self.leave()
        await self._end_programs(error)
        if error is not None:
            log.warn(
                "migration {id} of guest {guest} {status}: {error}",
                id=self.record.id,
                guest=self.record.guest,
                status=outcome(error),
                error=error.text,
            )
        self.record.end(step, error)
        if error is not None and later:
            Deferred.fromCoroutine(self._part_late(error))

    def _announce(self, error: QmigdError) -> None:
        """Tell the destination that its stream is about to end, by the user's wish.

        It is told to cancel only when QEMU here is done: before, its QEMU has to go on.
        """
        control = self.control
        if not isinstance(error, Cancelled) or not self._started or control is None:
            return
        if control.failure is None and self._outcome is None and not (self.plain or self.baseline):
            control.machine.status({"cancelling": error.text})
            control.flush()

    async def _end_programs(self, error: QmigdError | None) -> None:
        """Leave none of the programs that have carried the connections.

        But for one that carries the stream of a QEMU that goes on.

        :param error: gets to say what they have said to it.
        """
        if self.programs is not None:
            if error is not None and not isinstance(error, Cancelled):
                await self.programs.explain(error)
            await self.programs.end(but_handed_over=goes_on(self))

    async def _recover(self, error: QmigdError) -> str:
        """After a failure: bring the guest back here; returns what has become of it."""
        if self.guest is None or not self._started:
            return "not begun; the guest goes on here"
        try:
            return await self._bring_back(error)
        except DeadlineError as second:
            self._lingers = True
            step = (
                f"the guest's process is not done, and qmigd goes on waiting for it: {second.text}"
            )
        except QmigdError as second:
            step = f"the guest's process could not be asked: {second.text}"
        log.warn("guest {guest}: {step}", guest=self.record.guest, step=step)
        return step

    async def _part_late(self, error: QmigdError) -> None:
        async def bring_back() -> str:
            step = await self._bring_back(error)
            if not goes_on(self):
                await self.put_back()
            return step

        if self._lingers:
            await finish_late(self, bring_back)
        if goes_on(self):
            await part_late(self)
            await self._end_programs(None)
        self.leave()

    async def _bring_back(self, error: QmigdError) -> str:
        """Let the guest run here again, unless it may run there; returns which.

        :raises DeadlineError: QEMU does not answer, or not end its migration, in time.
        """
        guest = self.guest
        assert guest is not None
        if self._released is Released.YES:
            await self._ask()
        await self._end_qemus_migration(error)
        act = on_source_failure(self._released, self._peer)
        if act is Act.LEAVE and goes_on(self):
            return (
                "stopped here; it is the destination's, which may still need RAM that is "
                "here: do not end this process before the guest there has all of it"
            )
        if act is Act.LEAVE:
            return (
                "stopped here, because it may run at the destination; if it is lost there "
                "for good, let it go on here with 'cont' on its QMP socket"
            )
        if self.was_running and await guest.query_status() != "running":
            await guest.cont()
        return "the guest goes on here"

    async def _end_qemus_migration(self, error: QmigdError) -> None:
        """Bring it to its end, where that is still safe, and wait until QEMU is done with it."""
        if self._path is not None:
            await self._path.steady()
        over = await self.is_over()
        if over or (self._released is Released.YES and self._peer is not Peer.NEVER_RAN):
            return
        if not isinstance(error, Cancelled) and self._path is not None:
            # Its channels are broken, or are now.
            self._path.close()
            if await self.fails_by_itself():
                return
        await self.end_migration()

    def _part(self, error: QmigdError | None) -> None:
        control = self.control
        assert control is not None
        # The connection is QEMU's, or nobody is there who would understand.
        streams = self.plain or (self.baseline and self._started)
        # Who waits for the peer has been told of a cancel like this; the connection is good.
        lost = control.failure is not None and not isinstance(control.failure, Cancelled)
        if error is None or lost or self._outcome is not None or streams:
            control.close()
        elif isinstance(error, Cancelled) and self._started:
            control.machine.cancel(error.text)
            control.flush()
            control.close()
        else:
            control.refuse(error)

    async def _quit(self) -> str:
        if self.baseline:
            return "moved; kept here paused, because nobody reported that it runs there"
        try:
            assert self.guest is not None
            await self.guest.quit()
        except QmigdError as error:
            return f"moved; the process here could not be ended: {error.text}"
        return "moved; the process here was ended"

    def _note(self, stage: str) -> None:
        self._stage = stage
        more = {
            "baseline": self.baseline,
            "path": self.plan.path if self.plan is not None else None,
            "tls-hostname": self.hostname if self.in_tls else None,
            "secret": self.secret.hex(),
            "was-running": self.was_running,
        }
        self.put_down(stage, **more)
