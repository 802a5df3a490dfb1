"""Programs that a daemon has left behind when it was killed: the next one ends them.

Each running program (:mod:`qmigd.transports.programs`) has a small file of its own in
``STATE-DIR/programs``, from just before it is started until it has ended.  It names the
mark that the program has in its environment, its process, and the connection's other end::

    QMIGD_PROGRAM=MARK in the environment      written before it is started
    process, and when that was started         written after

What a daemon finds there when it starts has lost its migration.  Where the connection's
other end is open, QEMU has it, and may still need what comes over it: the programs of that
migration are left until the end is closed, or until qmigd knows that the migration is over.
All of them, since one may go through another (ssh with ``ControlMaster``).  Any others are
ended, with their process groups.

Nothing else is ever ended.  A process is recognised by its number together with the
moment of its start, or by the mark; and a file counts only on the same boot of the host
and in the same namespaces, elsewhere its numbers mean something else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from twisted.internet.defer import CancelledError, Deferred, DeferredList
from twisted.internet.task import deferLater
from twisted.logger import Logger
from twisted.python.failure import Failure

__all__ = ["MARK", "TERMINATION", "Leftovers", "Note"]

log = Logger()

#: The variable in a program's environment that has its mark.
MARK: Final = "QMIGD_PROGRAM"

#: Seconds that a program has to end after SIGTERM.
TERMINATION: Final = 1.0

#: Seconds between two looks at what was told to end, and after which what was killed is but
#: a zombie that nobody reaps.
_POLL, _DYING = 0.02, 0.5
#: Seconds between two looks at connections that are QEMU's.
_LOOK = 1.0


@dataclass(frozen=True)
class _Process:
    """A process, as /proc has it.

    :ivar group: its process group, by number; so ``session``.
    :ivar started: in clock ticks since the host's start.
    """

    pid: int
    group: int
    session: int
    started: int

    @classmethod
    def look(cls, pid: int) -> _Process | None:
        """Return what it is; ``None``: there is none, or only a zombie."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        # proc(5): the name, in parentheses, may have anything in it.
        fields = text.rpartition(")")[2].split()
        if fields[0] in "ZX":
            return None
        return cls(pid, int(fields[2]), int(fields[3]), int(fields[19]))

    def has(self, mark: str) -> bool:
        """Whether its environment has that mark, as far as it can be read."""
        try:
            environment = Path(f"/proc/{self.pid}/environ").read_bytes()
        except OSError:
            return False
        return f"{MARK}={mark}".encode() in environment.split(b"\0")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it, and to no other that has got its number since."""
        with contextlib.suppress(OSError):
            pidfd = os.pidfd_open(self.pid)
            try:
                if self.look(self.pid) == self:
                    signal.pidfd_send_signal(pidfd, number)
            finally:
                os.close(pidfd)


def _processes() -> Iterator[_Process]:
    for name in os.listdir("/proc"):
        if name.isdecimal() and (found := _Process.look(int(name))):
            yield found


class Note:
    """What is put down of one program.

    :ivar environment: what it has to have in its environment.
    """

    def __init__(self, path: Path, mark: str, head: Mapping[str, Any]) -> None:
        """:raises OSError: it cannot be written."""
        self.environment = {MARK: mark}
        self._path = path
        self._write(os.O_CREAT | os.O_EXCL, head)

    def started(self, pid: int) -> None:
        """It has been started.

        :raises OSError: it cannot be written.
        """
        found = _Process.look(pid)
        if found is not None:
            self._write(os.O_APPEND, {"pid": pid, "started": found.started})

    def forget(self) -> None:
        """It has ended, with all of its group."""
        self._path.unlink(missing_ok=True)

    def _write(self, flags: int, line: Mapping[str, Any]) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | flags, 0o600)
        try:
            os.write(descriptor, f"{json.dumps(line)}\n".encode())
        finally:
            os.close(descriptor)


@dataclass
class _Left:
    """A program that was found.

    :ivar connection: the inode of the connection's other end.
    :ivar pid: 0: the daemon was killed just when it was being started.
    """

    path: Path
    owner: str
    connection: int
    mark: str
    pid: int
    started: int

    def members(self) -> list[_Process]:
        """Return what is left of its process group."""
        if not self.pid:
            return [one for one in _processes() if one.group == one.session and one.has(self.mark)]
        group = [one for one in _processes() if one.group == self.pid]
        leader = (self.pid, self.started)
        if any((one.pid, one.started) == leader or one.has(self.mark) for one in group):
            return group
        return []


class Leftovers:
    """The files of one daemon's programs, and what an earlier life of it has left."""

    def __init__(self, reactor: Any, directory: Path) -> None:
        """
        :param directory: is made if need be.
        :raises OSError: it cannot be made or read.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._reactor = reactor
        self._directory = directory
        self._here = _here()
        self._left = [left for path in sorted(directory.iterdir()) if (left := self._read(path))]
        self._looking: Deferred[None] | None = None

    def note(self, connection: int, owner: str) -> Note:
        """Put down a program that is going to be started.

        :param connection: the inode of the connection's other end.
        :param owner: which migration it is for, as the log has it.
        :raises OSError: it cannot be written.
        """
        mark = str(uuid.uuid4())
        head = {"here": self._here, "mark": mark, "connection": connection, "owner": owner}
        return Note(self._directory / f"{mark}.jsonl", mark, head)

    def start(self) -> None:
        """End what was left, now or when it is not needed any more."""
        if self._left and self._looking is None:
            self._looking = Deferred.fromCoroutine(self._end_all())
            self._looking.addErrback(_log_failure)

    def stop(self) -> None:
        """Look no more: what is still needed is left to the next daemon."""
        if self._looking is not None:
            looking, self._looking = self._looking, None
            looking.cancel()

    async def end_for(self, owner: str) -> None:
        """A migration of the earlier life is over: whatever is left of it ends."""
        await self._end([left for left in self._left if left.owner == owner])

    # inside

    def _read(self, path: Path) -> _Left | None:
        """Return what a file says; one that says nothing of a program is removed."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            # The last line may be half of one.
            head, *more = path.read_text(encoding="utf-8").split("\n")
            said = {"pid": 0, "started": 0, **json.loads(head), **_whole(more)}
            if said["here"] == self._here:
                return _Left(
                    path,
                    str(said["owner"]),
                    int(said["connection"]),
                    str(said["mark"]),
                    int(said["pid"]),
                    int(said["started"]),
                )
        path.unlink()
        return None

    async def _end_all(self) -> None:
        while True:
            connections = _connections()
            needed = {left.owner for left in self._left if left.connection in connections}
            await self._end([left for left in self._left if left.owner not in needed])
            if not self._left:
                return
            await deferLater(self._reactor, _LOOK)

    async def _end(self, ending: list[_Left]) -> None:
        self._left = [left for left in self._left if left not in ending]
        await DeferredList([Deferred.fromCoroutine(self._end_one(left)) for left in ending])

    async def _end_one(self, left: _Left) -> None:
        if left.members():
            log.warn(
                "{owner}: a program that an earlier qmigd has left behind is ended",
                owner=left.owner,
            )
        for number, seconds in ((signal.SIGTERM, TERMINATION), (signal.SIGKILL, _DYING)):
            end = self._reactor.seconds() + seconds
            told: set[_Process] = set()
            while (members := left.members()) and self._reactor.seconds() < end:
                # And whom it starts meanwhile.
                for one in set(members) - told:
                    one.signal(number)
                told.update(members)
                await deferLater(self._reactor, _POLL)
        left.path.unlink(missing_ok=True)


def _log_failure(failure: Failure) -> None:
    if not failure.check(CancelledError):
        log.failure("programs that an earlier qmigd has left behind", failure)


def _whole(lines: list[str]) -> dict[str, Any]:
    """Return what the second line of a file says, if it is there whole."""
    with contextlib.suppress(ValueError):
        found: dict[str, Any] = json.loads(lines[0])
        return found
    return {}


def _here() -> dict[str, str]:
    """Return what numbers of processes and of sockets are good for."""
    return {
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        **{kind: os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net")},
    }


def _connections() -> frozenset[int]:
    """Return the inodes of all unix sockets here that somebody has open."""
    _, *lines = Path("/proc/net/unix").read_text().splitlines()
    # Num RefCount Protocol Flags Type St Inode, and perhaps a path (unix(7) has no more on it).
    return frozenset(int(line.split(maxsplit=7)[6]) for line in lines)
