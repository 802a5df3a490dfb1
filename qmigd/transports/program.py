"""One program that carries a connection, with the process group that it leads.

How its end is brought about is :mod:`qmigd.transports.programs`'s affair.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IReadDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from .leftovers import Note

__all__ = ["Program"]

log = Logger()

#: Characters of a line that are logged, and of the last lines that get into an error.
_LINE = 1000
_SAID = 400
#: Lines that are kept for an error.
_LINES = 3

#: Bytes that a pipe holds, unless somebody changes that (pipe(7)).
_PIPE = 65536


class Program:
    """One program, and the process group that it leads.

    :ivar connection: the inode of the connection's end that is not the program's.
    :ivar handed_over: that end is QEMU's.
    :ivar ended: the program itself has ended.
    """

    def __init__(
        self,
        reactor: Any,
        argv: tuple[str, ...],
        theirs: socket.socket,
        connection: int,
        owner: str,
        *,
        on_end: Callable[[], None],
        note: Note,
    ) -> None:
        """:param theirs: the program's end of its connection.
        :param owner: which migration it is for, in the log.
        :param on_end: called when it has ended by itself, or as it was told to.
        :param note: what a later daemon finds of it.
        :raises OSError: it cannot be started.
        """
        self.connection = connection
        self.handed_over = False
        self.ended = False
        self._argv = argv
        self._owner = owner
        self._on_end = on_end
        self._note = note
        self._outcome: tuple[int, int] | None = None
        self._told_to_end = False
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._rest = b""
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            self._child = subprocess.Popen(
                argv,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=writing,
                start_new_session=True,
                env={**os.environ, **note.environment},
            )
        except BaseException:
            os.close(reading)
            note.forget()
            raise
        finally:
            os.close(writing)
        try:
            note.started(self._child.pid)
            pidfd = os.pidfd_open(self._child.pid)
        except OSError:
            os.close(reading)
            self._child.kill()
            self._child.wait()
            note.forget()
            raise
        os.set_blocking(reading, False)
        self._errors = _Readable(reactor, reading, self._read)
        self._end = _Readable(reactor, pidfd, self._note_end)

    # how it goes

    @property
    def failed(self) -> bool:
        """Whether it has ended with anything but success, and not because it was told to."""
        return self._outcome not in (None, (os.CLD_EXITED, 0))

    @property
    def said(self) -> str:
        """The last of what it has printed, on one line."""
        return " | ".join(self._lines)[-_SAID:]

    def describe(self) -> str:
        """Return what there is to be said of it, half a sentence."""
        name = f"'{shlex.join(self._argv)}'"
        if self._argv[:2] == ("/bin/sh", "-c"):
            name = f"'{self._argv[2]}'"
        if self._outcome is None:
            return f"{name} says: {self.said}"
        kind, number = self._outcome
        how = f"exit code {number}" if kind == os.CLD_EXITED else f"signal {number}"
        return f"{name} ended with {how}: {self.said or 'it said nothing'}"

    def _read(self) -> None:
        try:
            data = os.read(self._errors.fileno(), _PIPE)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _LINE:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._say(line)
        if not data:
            self._errors.close()

    def _say(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").strip()[:_LINE]
        text = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
        if text:
            self._lines.append(text)
            log.info(
                "{owner}: program {pid}: {line}", owner=self._owner, pid=self._child.pid, line=text
            )

    def _note_end(self) -> None:
        found = os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if found is None:
            return
        self._end.close()
        # What it has said last is in the pipe already, and behind it the pipe's end, unless
        # somebody else in its group can still write.
        for _ in range(2):
            if self._errors.open:
                self._read()
        self.ended = True
        if not self._told_to_end:
            self._outcome = (found.si_code, found.si_status)
        self._on_end()

    # the end

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its whole group."""
        if self._child.returncode is None:
            self._told_to_end = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, number)

    def close(self) -> None:
        """Kill what is left of its group, and reap it; harmless when repeated."""
        self.signal(signal.SIGKILL)
        self._child.wait()  # it was killed: this takes no time
        self._note.forget()
        self._end.close()
        self._errors.close()

    @property
    def is_dying(self) -> bool:
        """Whether something is left of the group that was killed; who reaps it is not our child."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child.pid, 0)
            return True
        return False


@implementer(IReadDescriptor)
class _Readable:
    """A descriptor that the reactor watches; closed, it is closed for good."""

    def __init__(self, reactor: Any, descriptor: int, read: Callable[[], None]) -> None:
        self._reactor = reactor
        self._descriptor = descriptor
        self._read = read
        reactor.addReader(self)

    def fileno(self) -> int:
        return self._descriptor

    @property
    def open(self) -> bool:
        return self._descriptor >= 0

    def doRead(self) -> None:
        self._read()

    def close(self) -> None:
        if self.open:
            self._reactor.removeReader(self)
            os.close(self._descriptor)
            self._descriptor = -1

    def connectionLost(self, reason: Failure) -> None:
        """Part of the interface; neither a pipe nor a pidfd is lost."""

    def logPrefix(self) -> str:
        return "program"
