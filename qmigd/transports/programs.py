"""Programs that carry connections: ``exec:``, one process for each connection.

A program is run with one end of a pair of unix sockets as both its standard input and its
standard output; the other end is the connection.  What it prints on its standard error
output goes to the log by line, and into the error of a migration that fails.  Each program
leads a session and process group of its own, without a terminal on which it could ask for
a password, and every group is ended with the migration that it was started for::

    connection closed    the program reads the end of its input, and has a moment to end
    SIGTERM              then, to the group; which has another moment
    SIGKILL              to whatever is left of the group

A leader that has ended is not reaped before that: as long as it is a zombie, no other
group can have its number.  What a daemon that was killed has left is ended by the next one
(:mod:`qmigd.transports.leftovers`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import (
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
)
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from qmigd.errors import DeadlineError, MigrationError, PeerGone, QmigdError

from .leftovers import TERMINATION, Leftovers
from .program import Program
from .uri import ExecAddress, Place, Reachable

__all__ = ["Programs", "reach"]

log = Logger()

#: Seconds that a program has to end once its connection is closed: more than the control
#: connection keeps its half open for a peer that was refused.
GRACE = 3.0
#: Seconds between two looks at what was killed, and after which it is but a zombie that
#: whoever has adopted it does not care for.
_LOOK, _DYING = 0.01, 0.2
#: Seconds that a program whose connection broke has to end, so that it can be said why.
VERDICT = 1.0


def reach(
    reactor: Any, address: Place, owner: str, leftovers: Leftovers
) -> tuple[Reachable, Programs | None]:
    """Return what connects to an address, and the programs that it takes for that.

    :param owner: which migration it is for, in the log.
    """
    if isinstance(address, ExecAddress):
        programs = Programs(reactor, address.argv, str(address), owner, leftovers)
        return programs, programs
    return address, None


class Programs:
    """The programs of one migration: all run the same command, each for one connection."""

    def __init__(
        self,
        reactor: Any,
        argv: tuple[str, ...],
        uri: str,
        owner: str,
        leftovers: Leftovers,
    ) -> None:
        """
        :param argv: the program and its arguments.
        :param uri: what stands for them in texts for people.
        :param owner: which migration it is, for the log.
        :param leftovers: gets to know each, should this daemon be killed.
        """
        self._leftovers = leftovers
        self._reactor = reactor
        self._argv = argv
        self._uri = uri
        self._owner = owner
        self._programs: list[Program] = []
        self._waiting: list[Deferred[None]] = []
        self._shutdown: Any = None

    def __str__(self) -> str:
        return self._uri

    def client(self, reactor: object, timeout: float = 30.0) -> IStreamClientEndpoint:
        """What starts a program, and connects to it."""
        return _ProgramEndpoint(self._connect)

    def hand_over(self, sock: socket.socket) -> None:
        """A connection is QEMU's from here on: programs stay when the daemon is stopped."""
        inode = os.fstat(sock.fileno()).st_ino
        for program in self._programs:
            program.handed_over |= program.connection == inode

    async def explain(self, error: QmigdError) -> None:
        """Add to the error of a migration what the programs have to say to it."""
        if not isinstance(error, PeerGone | DeadlineError | MigrationError):
            return
        if not isinstance(error, DeadlineError):
            # The end of a connection is seen before that of its program.
            await self._until(lambda: any(one.failed for one in self._programs), VERDICT)
        told = [one for one in self._programs if one.failed]
        if not told and not isinstance(error, MigrationError):
            told = [one for one in self._programs if one.ended] or [
                one for one in self._programs if one.said
            ]
        if told:
            error.text = f"{error.text.rstrip('.')}; {told[0].describe()}"

    async def end(self, grace: float = GRACE, *, but_handed_over: bool = False) -> None:
        """End all of them.  Returns when nothing is left; harmless when repeated.

        :param grace: seconds that they have to end by themselves, their connections being
            closed.
        :param but_handed_over: where the connection of one is QEMU's, all are left.
        """
        if but_handed_over and self._carries_on:
            return
        await self._end(grace)
        self._programs = []
        if self._shutdown is not None:
            trigger, self._shutdown = self._shutdown, None
            with contextlib.suppress(ValueError, KeyError):  # the daemon is just being stopped
                self._reactor.removeSystemEventTrigger(trigger)

    @property
    def _carries_on(self) -> bool:
        """Whether one carries QEMU's connection; it may go through another of them.

        With ssh's ``ControlMaster`` that is the first one, which waits for the others.
        """
        return any(one.handed_over and not one.ended for one in self._programs)

    async def _end(self, grace: float) -> None:
        programs = self._programs

        def ended() -> bool:
            return all(one.ended for one in programs)

        if not await self._until(ended, grace):
            for program in programs:
                program.signal(signal.SIGTERM)
            await self._until(ended, TERMINATION)
        for program in programs:
            program.close()
        end = self._reactor.seconds() + _DYING
        while any(one.is_dying for one in programs) and self._reactor.seconds() < end:
            await deferLater(self._reactor, _LOOK)

    def _stopped(self) -> Deferred[None]:
        """The daemon is stopped, and what carries its connections ends with it."""
        return Deferred.fromCoroutine(self.end(0.0, but_handed_over=True))

    def _connect(self, factory: IProtocolFactory) -> IProtocol:
        """:raises ConnectError: it cannot be started."""
        try:
            return self._start(factory)
        except OSError as error:
            raise ConnectError(
                string=f"the program '{self._argv[0]}' cannot be started: {error.strerror}"
            ) from None

    def _start(self, factory: IProtocolFactory) -> IProtocol:
        """:raises OSError: it cannot be started."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            connection = os.fstat(ours.fileno()).st_ino
            note = self._leftovers.note(connection, self._owner)
            self._programs.append(
                Program(
                    *(self._reactor, self._argv, theirs, connection, self._owner),
                    on_end=self._news,
                    note=note,
                )
            )
            if self._shutdown is None:
                self._shutdown = self._reactor.addSystemEventTrigger(
                    "before", "shutdown", self._stopped
                )
            ours.setblocking(False)
            transport = self._reactor.adoptStreamConnection(ours.fileno(), ours.family, factory)
        protocol: IProtocol = transport.protocol
        return protocol

    def _news(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.callback(None)

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for something that the end of a program may bring; returns whether it is so."""
        end = self._reactor.seconds() + seconds
        while not condition():
            left = end - self._reactor.seconds()
            if left <= 0 or all(one.ended for one in self._programs):
                return False
            news: Deferred[None] = Deferred()
            self._waiting.append(news)
            timer = self._reactor.callLater(left, self._news)
            await news
            if timer.active():
                timer.cancel()
        return True


@implementer(IStreamClientEndpoint)
class _ProgramEndpoint:
    def __init__(self, connect: Callable[[IProtocolFactory], IProtocol]) -> None:
        self._connect = connect

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        done: Deferred[IProtocol] = Deferred()
        try:
            done.callback(self._connect(protocolFactory))
        except ConnectError:
            done.errback(Failure())
        return done
