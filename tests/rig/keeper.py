"""Sees to it that nothing started by this process outlives it, however it ends.

A small process of its own is told of each child (by a pidfd, so that a number
used again can do no harm), of each temporary directory, and of each command
that undoes something.  Between the two is a socket; when it reports end of
file the rig's process is gone, by an exit as well as by SIGKILL, and the keeper
kills, undoes and removes what is still there.  It reaches processes that
somebody else started too: a QEMU launched by a daemon that has been killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

__all__ = ["keep_command", "keep_directory", "keep_process"]

_PROCESS = "process"
_DIRECTORY = "directory"
_COMMAND = "command"

_link: socket.socket | None = None
_lock = threading.Lock()


def keep_process(pidfd: int) -> None:
    """Have the process behind ``pidfd`` killed when this one has ended."""
    _tell(_PROCESS, None, [pidfd])


def keep_directory(path: str) -> None:
    """Have the directory removed when this process has ended, if it is still there."""
    _tell(_DIRECTORY, path)


def keep_command(argv: Sequence[str]) -> None:
    """Have the command run, its outcome ignored, when this process has ended."""
    _tell(_COMMAND, list(argv))


def _tell(kind: str, value: object, descriptors: Sequence[int] = ()) -> None:
    global _link
    with _lock:
        if _link is None:
            _link = _start()
        socket.send_fds(_link, [json.dumps([kind, value]).encode()], descriptors)


def _start() -> socket.socket:
    """Start the keeper, and return the socket to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-I", __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # a Ctrl-C at the terminal is not for the keeper
            cwd="/",
            stdin=subprocess.DEVNULL,
        )
    return ours


def _main(link: socket.socket) -> None:
    processes = selectors.DefaultSelector()
    directories: list[str] = []
    commands: list[list[str]] = []
    processes.register(link, selectors.EVENT_READ)
    while True:
        for key, _ in processes.select():
            if key.fileobj is not link:
                # A pidfd is readable once its process has ended.
                processes.unregister(key.fileobj)
                os.close(key.fd)
                continue
            message, descriptors, _, _ = socket.recv_fds(link, 65536, 1)
            if not message:
                processes.unregister(link)
                pidfds = [key.fd for key in processes.get_map().values()]
                _clean(pidfds, commands, directories)
                return
            kind, value = json.loads(message)
            if kind == _PROCESS:
                processes.register(descriptors[0], selectors.EVENT_READ)
            elif kind == _DIRECTORY:
                directories.append(value)
            else:
                commands.append(value)


def _clean(pidfds: list[int], commands: list[list[str]], directories: list[str]) -> None:
    for pidfd in pidfds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    for argv in reversed(commands):
        with contextlib.suppress(OSError):
            subprocess.run(argv, check=False, capture_output=True)
    for path in directories:
        shutil.rmtree(path, ignore_errors=True)


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
