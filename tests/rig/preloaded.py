"""Starts daemons without the time that Python takes to load them: a process forks that has.

It has loaded Twisted and all of qmigd, and nothing has run in it.  A daemon that is forked
off it is one like any other, a process and a session of its own with its own command line,
directory and environment; but that comes at once, where loading takes 0.2 s, and seconds
on an emulated CPU.  So is a memory guest, for which more is loaded when the first one is
asked for.  What is about starting itself (the demo, the benchmarks, the packages) starts a
Python of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.rig.keeper import keep_process
from tests.rig.news import DEADLINE

__all__ = ["MEMORY", "Child", "fork"]

#: The module of the memory guest.
MEMORY = "qmigd.guests.memory"

_ROOT = Path(__file__).resolve().parents[2]

#: Bytes of a question; the environment of a daemon is in it.
_QUESTION = 1 << 18

_link: socket.socket | None = None
_lock = threading.Lock()


class Child:
    """A process that was forked off; in this it is like a ``Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, or ``None`` while it runs."""
        return self._reap(block=False)

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        code = self._reap(block=True)
        assert code is not None
        return code

    def _reap(self, *, block: bool) -> int | None:
        if self._code is None:
            self._code = _ask({"reap": self.pid, "block": block})["code"]
        return self._code


def fork(
    argv: Sequence[str], output: int, *, directory: str | None, environment: Mapping[str, str]
) -> Child:
    """Start ``twistd``, or a memory guest.

    :param argv: its command line, which begins with ``twistd``, or with :data:`MEMORY`.
    :param output: the descriptor for what it prints.
    :param environment: all of it.
    """
    question = {"argv": list(argv), "directory": directory, "environment": dict(environment)}
    return Child(_ask(question, [output])["pid"])


def _ask(question: Mapping[str, Any], descriptors: Sequence[int] = ()) -> dict[str, Any]:
    global _link
    with _lock:
        if _link is None:
            _link = _start()
        try:
            socket.send_fds(_link, [json.dumps(question).encode()], descriptors)
            answer: dict[str, Any] = json.loads(_link.recv(_QUESTION))
        except BaseException:
            # What it answers after all would be taken for the answer to the next question.
            _link.close()
            _link = None
            raise
        return answer


def _start() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(DEADLINE)
    for end in ours, theirs:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * _QUESTION)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    pidfd = os.pidfd_open(process.pid)
    keep_process(pidfd)
    os.close(pidfd)
    return ours


def _load() -> None:
    """Load all that a daemon loads."""
    import gc
    from importlib.metadata import entry_points

    import twisted.internet.epollreactor
    import twisted.scripts.twistd  # noqa: F401
    from twisted.application.service import IServiceMaker
    from twisted.plugin import getPlugins

    import qmigd.daemon.service  # noqa: F401

    list(getPlugins(IServiceMaker))
    for point in entry_points(group="qmigd.features"):
        point.load()
    _no_reactor()
    gc.freeze()


def _main(link: socket.socket) -> None:
    _load()
    while True:
        message, descriptors, _, _ = socket.recv_fds(link, _QUESTION, 1)
        if not message:
            return
        question = json.loads(message)
        if "reap" in question:
            pid, status = os.waitpid(question["reap"], 0 if question["block"] else os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
            link.send(json.dumps(answer).encode())
            continue
        if question["argv"][0] == MEMORY:
            _load_memory()
        if pid := os.fork():
            os.close(descriptors[0])
            answer = {"pid": pid}
        else:
            _become(question, descriptors[0])
            return
        link.send(json.dumps(answer).encode())


def _load_memory() -> None:
    """Load all that a memory guest loads."""
    import gc

    from qmigd.guests.memory import verbs

    # The drivers of RDMA devices.
    with contextlib.suppress(Exception):
        verbs.load().device.get_device_list()
    _no_reactor()
    gc.freeze()


def _no_reactor() -> None:
    if "twisted.internet.reactor" in sys.modules:
        raise AssertionError("A reactor was made, which all that are forked would share.")


def _become(question: Mapping[str, Any], output: int) -> None:
    """Be the daemon or the guest; returns when that has ended."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.closerange(3, 256)
    os.chdir(question["directory"] or "/")
    os.environ.clear()
    os.environ.update(question["environment"])
    sys.argv = question["argv"]
    if sys.argv[0] == MEMORY:
        from qmigd.guests.memory.__main__ import main

        main()
        return
    sys.path[0] = os.path.dirname(sys.argv[0])
    from twisted.scripts.twistd import run

    run()


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
