"""Starts the QEMU that a guest comes into, from this host's own configuration.

The QEMU is a session of its own and outlives the daemon.  What it prints goes to
``NAME.log`` in the state directory, its QMP socket is ``NAME.qmp`` there: by that
one the next life of the daemon finds it again.  Its end is noticed through a
pidfd, which works for a child and for one that an earlier life started alike.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReadDescriptor
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from zope.interface import implementer

from qmigd.errors import GuestBusy, GuestError, GuestGone

__all__ = ["CONNECT_POLL", "Launcher"]

#: Seconds between two tries to connect to a QEMU that is starting.
CONNECT_POLL = 0.01
#: Bytes from the end of the log that go into an error.
_TAIL = 2000
#: Bytes in the path of a unix socket (sun_path in unix(7), less the final zero).
_SUN_PATH = 107
#: What SO_PEERCRED tells: pid, uid and gid.
_UCRED = struct.Struct("3i")


class Launcher:
    """One guest's QEMU, started on demand.

    :ivar qmp: the address of its QMP socket.
    :ivar log: the file that has what it printed.
    :ivar failure: why it could not be started the last time, or empty.
    """

    def __init__(
        self,
        reactor: Any,
        name: str,
        argv: Sequence[str],
        state_dir: Path,
        *,
        deadline: float = 30.0,
    ) -> None:
        """:param argv: its command line, without ``-incoming``, from the configuration.
        :param deadline: seconds that it has from its start to an open QMP socket,
            and from an asked-for end to its end.
        :raises GuestError: the state directory's path is too long for a socket.
        """
        self._socket = state_dir / f"{name}.qmp"
        self.qmp = f"unix:{self._socket}"
        self.log = state_dir / f"{name}.log"
        self._reactor = reactor
        self._name = name
        self._argv = tuple(argv)
        self._deadline = deadline
        self.failure = ""
        self._process: _Process | None = None
        if len(os.fsencode(self._socket)) > _SUN_PATH:
            raise GuestError(
                f"the path of guest {name}'s QMP socket, {self._socket}, is longer than"
                f" {_SUN_PATH} bytes; choose a shorter state-dir"
            )

    async def running(self) -> bool:
        """Return whether its QEMU is there, whichever life of the daemon started it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(os.fspath(self._socket))
            except BlockingIOError:  # it is there, with a queue of clients
                return True
            except OSError:
                return False
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        pid, _, _ = _UCRED.unpack(credentials)
        if self._process is None and pid > 0:
            try:
                self._process = _Process(self._reactor, pid, None)
            except ProcessLookupError:
                return False
        return True

    async def start(self, *, incoming: bool = True) -> None:
        """Start it; returns when its QMP socket accepts connections.

        One that is just ending is waited for.

        :param incoming: it is to wait for a stream.
        :raises GuestBusy: one is running already.
        :raises GuestError: it cannot be started, or ended at once; the text has
            the last of what it printed.
        """
        if self._process is not None:
            try:
                await self._process.end(self._deadline)
            except TimeoutError:
                raise GuestBusy(f"the process of guest {self._name} is still running") from None
            self._process = None
        try:
            self._process = process = self._spawn(incoming)
            try:
                await self._opened(process)
            except BaseException:
                process.kill()
                raise
        except GuestError as error:
            self.failure = error.text
            raise
        self.failure = ""

    def _spawn(self, incoming: bool) -> _Process:
        path = os.fspath(self._socket).replace(",", ",,")  # QEMU's way to write a comma
        waiting = ("-incoming", "defer") if incoming else ()
        argv = [*self._argv, *waiting, "-qmp", f"unix:{path},server=on,wait=off"]
        try:
            self._socket.unlink(missing_ok=True)
            with open(self.log, "wb", opener=_private) as log:
                child = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise GuestError(
                f"the process of guest {self._name} cannot be started: {error.strerror}"
                f" ({error.filename})"
            ) from None
        return _Process(self._reactor, child.pid, child)

    async def _opened(self, process: _Process) -> None:
        end = self._reactor.seconds() + self._deadline
        while not await self.running():
            if process.ended:
                raise GuestGone(
                    f"the process of guest {self._name} ended as soon as it was started"
                    f" ({process.outcome}): {self._tail()}"
                )
            if self._reactor.seconds() >= end:
                raise GuestError(
                    f"the process of guest {self._name} did not open its QMP socket within"
                    f" {self._deadline:g} s: {self._tail()}",
                    code="deadline",
                )
            await deferLater(self._reactor, CONNECT_POLL)

    def _tail(self) -> str:
        """Return the last of what it printed, on one line."""
        with open(self.log, "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL))
            lines = log.read().decode("utf-8", "replace").split("\n")
        said = " | ".join(line.strip() for line in lines if line.strip())
        return said or f"it printed nothing ({self.log})"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@implementer(IReadDescriptor)
class _Process:
    """A process whose end the reactor notices: a child's, or another's."""

    def __init__(self, reactor: Any, pid: int, child: subprocess.Popen[bytes] | None) -> None:
        """:raises ProcessLookupError: there is no such process (any more)."""
        self._reactor = reactor
        self._child = child
        self._pidfd = os.pidfd_open(pid)
        self._waiting: list[Deferred[None]] = []
        self.ended = False
        reactor.addReader(self)

    @property
    def outcome(self) -> str:
        """How it ended, for people."""
        code = None if self._child is None else self._child.returncode
        if code is None:
            return "how is not known"
        return f"exit code {code}" if code >= 0 else f"killed by signal {-code}"

    async def end(self, seconds: float) -> None:
        """Return once it has ended.

        :raises TimeoutError: it has not within ``seconds``.
        """
        if self.ended:
            return
        waited: Deferred[None] = Deferred()
        self._waiting.append(waited)
        await waited.addTimeout(seconds, self._reactor, onTimeoutCancel=_time_out)

    def kill(self) -> None:
        """Kill it, if it has not ended."""
        if not self.ended:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    # IReadDescriptor: a pidfd becomes readable when its process ends.

    def fileno(self) -> int:
        return self._pidfd

    def doRead(self) -> None:
        self._reactor.removeReader(self)
        os.close(self._pidfd)
        self._pidfd = -1
        self.ended = True
        if self._child is not None:
            self._child.wait()  # it has ended: this does not block, and leaves no zombie
        waiting, self._waiting = self._waiting, []
        for waited in waiting:
            waited.callback(None)

    def connectionLost(self, reason: Failure) -> None:
        """Part of the interface; a pidfd is not lost."""

    def logPrefix(self) -> str:
        return "qemu"


def _time_out(result: Any, seconds: float) -> Failure:
    return Failure(TimeoutError(f"{seconds:g} s have passed"))
