"""One process with its log: started by the rig, or adopted by its number."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO

from tests.rig.keeper import keep_directory, keep_process
from tests.rig.news import DEADLINE, Hang, tell
from tests.rig.preloaded import Child, fork

__all__ = ["Process", "temporary_directory"]

#: Seconds that what an ended process has printed may take to arrive.
_LAST_WORDS = 5.0


def temporary_directory() -> str:
    """Make a directory whose path is short enough for unix sockets in it (107 bytes)."""
    path = tempfile.mkdtemp(prefix="qmigd-")
    if len(path) > 60:
        os.rmdir(path)
        path = tempfile.mkdtemp(prefix="qmigd-", dir="/tmp")
    keep_directory(path)
    return path


class Process:
    """A process that is known by a pidfd, and that does not outlive the rig.

    :ivar pid: its number.
    """

    def __init__(self, pid: int, popen: subprocess.Popen[bytes] | Child | None = None) -> None:
        """Know a process; see :meth:`start` and :meth:`adopt`."""
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._popen = popen
        self._lock = threading.Lock()
        keep_process(self._pidfd)
        self._copier: threading.Thread | None = None
        self._watcher = threading.Thread(target=self._watch, name=f"end of {pid}", daemon=True)

    @classmethod
    def start(
        cls,
        argv: Sequence[str],
        *,
        log: str,
        environment: Mapping[str, str] | None = None,
        directory: str | None = None,
    ) -> Process:
        """Start a process in a session of its own, what it prints appended to ``log``.

        Each piece of what it prints is news (see ``news``), and so is its end.

        :param environment: what is added to this process's environment.
        """
        popen = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        assert popen.stdout is not None
        return cls(popen.pid, popen)._logged(popen.stdout, log)

    @classmethod
    def fork(
        cls, argv: Sequence[str], *, log: str, environment: Mapping[str, str], directory: str
    ) -> Process:
        """Like :meth:`start`, for what is loaded already (see ``preloaded``)."""
        source, output = os.pipe()
        try:
            child = fork(
                argv, output, directory=directory, environment={**os.environ, **environment}
            )
        finally:
            os.close(output)
        return cls(child.pid, child)._logged(open(source, "rb", buffering=0), log)

    @classmethod
    def adopt(cls, pid: int) -> Process:
        """Return a process that somebody else has started; its end is news."""
        self = cls(pid)
        self._watcher.start()
        return self

    def _logged(self, source: IO[bytes], log: str) -> Process:
        self._copier = threading.Thread(
            target=_copy, args=(source, log), name=f"log {log}", daemon=True
        )
        self._copier.start()
        self._watcher.start()
        return self

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.poll()
        if self._copier is not None:
            # A child of its own may hold the pipe open; what it prints can wait.
            self._copier.join(_LAST_WORDS)
        tell()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return not self._ended(0)

    @property
    def exit_code(self) -> int | None:
        """Its exit code, or minus the signal that killed it; ``None`` if it runs or was adopted."""
        return None if self._popen is None else self._popen.poll()

    def _ended(self, seconds: float) -> bool:
        with self._lock:
            if self._pidfd < 0:
                return True
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens if it has ended."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, number)

    def wait(self, deadline: float = DEADLINE) -> int | None:
        """Wait for its end and return the exit code (``None`` for an adopted process).

        All that it has printed is in the log then.

        :raises Hang: it did not end within ``deadline`` seconds.
        """
        if not self._ended(deadline):
            raise Hang(f"Process {self.pid} did not end within {deadline:g} s.")
        self._watcher.join()
        return None if self._popen is None else self._popen.wait()

    def kill(self) -> None:
        """Kill it with SIGKILL, and return once it is gone."""
        self.signal(signal.SIGKILL)
        self.wait()

    def close(self) -> None:
        """Kill it if it still runs, and let go of it."""
        self.kill()
        with self._lock:
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1


def _copy(source: IO[bytes], log: str) -> None:
    with source, open(log, "ab", buffering=0) as output:
        while data := os.read(source.fileno(), 65536):
            output.write(data)
            tell()
