"""``qmigctl connect``: joins standard input and output with a unix socket of the daemon's.

::

    source's qmigd == ssh hostb qmigctl connect SOCKET == sshd -- this -- SOCKET -- qmigd

There is one of these for each channel, so that it gets by without a reactor: 18 MB of
memory, and not 48.  Bytes are moved by a thread for each direction, as they come.
The end of one direction is passed on and is not the end of the other.  It is over when both
have ended, or when one of the two sides is gone altogether, whatever the other one might
still have to say.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import socket
import sys
import threading
from collections.abc import Callable

from .ending import Ending
from .options import Exit

__all__ = ["join", "run"]

#: Bytes that are read at a time.
_BUFFER = 1 << 20

_HALF = socket.SHUT_WR


def run(options: argparse.Namespace) -> Exit:
    """Carry out ``qmigctl connect``; returns the exit code.

    :raises Ending: there is nobody to connect to; the text says why.
    """
    path = _path(options.uri)
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
        except OSError as error:
            raise Ending(Exit.UNREACHABLE, "unreachable", _why(path, error)) from None
        join(sock, sys.stdin.fileno(), sys.stdout.fileno())
    return Exit.OK


def _path(given: str) -> str:
    path = given.removeprefix("unix:")
    if not path or (":" in path and not path.startswith(("/", "."))):
        raise Ending(Exit.REFUSED, "usage", f"'{given}' is no unix socket: name its path.")
    return path


def _why(path: str, error: OSError) -> str:
    keys = "'listen' and 'listen-group' in [daemon] of its configuration"
    if isinstance(error, FileNotFoundError):
        return f"There is no socket {path}: this host's qmigd does not listen on it ({keys})."
    if isinstance(error, ConnectionRefusedError):
        return f"Nobody listens on {path}: this host's qmigd does not run, or elsewhere ({keys})."
    if isinstance(error, PermissionError):
        return f"User {os.geteuid()} may not connect to {path} ({keys}, and its directory)."
    return f"{path} cannot be connected to: {error.strerror or error}."


def join(sock: socket.socket, reading: int, writing: int) -> None:
    """Move bytes both ways until it is over.

    :param sock: connected, blocking.
    :param reading: a descriptor whose bytes go to the socket.
    :param writing: a descriptor that gets the bytes of the socket.
    """
    to_daemon = _begin(lambda: _copy(reading, sock.fileno(), lambda: sock.shutdown(_HALF)))
    to_peer = _begin(lambda: _copy(sock.fileno(), writing, lambda: _end_of(writing)))
    poll = select.poll()
    for descriptor, events in (
        (to_daemon, select.POLLIN),
        (to_peer, select.POLLIN),
        (sock.fileno(), 0),  # POLLHUP: the daemon has closed it, and not only its half
        (writing, 0),  # POLLERR or POLLHUP: nobody reads it any more
    ):
        poll.register(descriptor, events)
    over: set[int] = set()
    # What one side has said last is passed on even if that side is gone.
    while over.isdisjoint((to_daemon, sock.fileno())) or over.isdisjoint((to_peer, writing)):
        for descriptor, _ in poll.poll():
            over.add(descriptor)
            poll.unregister(descriptor)


def _begin(copy: Callable[[], None]) -> int:
    """Copy in a thread; returns a descriptor that becomes readable when it is done."""

    def work() -> None:
        with contextlib.suppress(OSError):  # either end has broken: that is an end as well
            copy()
        os.eventfd_write(done, 1)

    done = os.eventfd(0)
    threading.Thread(target=work, daemon=True).start()
    return done


def _copy(source: int, destination: int, at_end: Callable[[], None]) -> None:
    buffer = memoryview(bytearray(_BUFFER))
    try:
        while size := os.readv(source, [buffer]):
            left = buffer[:size]
            while left:
                left = left[os.write(destination, left) :]
    finally:
        at_end()


def _end_of(writing: int) -> None:
    """Pass on the end of the stream: of a socket one half, for standard input may be the other."""
    try:
        with socket.socket(fileno=os.dup(writing)) as end:
            end.shutdown(_HALF)
    except OSError:  # a pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)
