"""``splice``: from the one socket into a pipe, and from the pipe into the other one.

The kernel moves references to pages and copies nothing.  The pipe is empty before each
read, so that a read takes whatever has come and never waits for more.  All sockets of a
relay can do it, those with TLS in the kernel as well, which give a record at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket

from qmigd.channels.movers.common import BUFFER_SIZE, Count, End, said
from qmigd.channels.movers.copying import Gathering, copy

__all__ = ["splice"]


def splice(source: socket.socket, sink: socket.socket, count: Count) -> End:
    """Move bytes by splicing them."""
    try:
        out, into = os.pipe()
    except OSError:
        # No descriptor is left for it.
        return copy(source, sink, count)
    try:
        # Refused beyond what /proc/sys/fs/pipe-user-pages-soft leaves: 64 KiB will do.
        with contextlib.suppress(PermissionError):
            fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, BUFFER_SIZE)
        return _through(out, into, source, sink, count)
    finally:
        os.close(out)
        os.close(into)


def _through(out: int, into: int, source: socket.socket, sink: socket.socket, count: Count) -> End:
    reading, writing = source.fileno(), sink.fileno()
    gathering = Gathering(source)
    took = gathering.took
    while True:
        try:
            size = os.splice(reading, into, BUFFER_SIZE, flags=os.SPLICE_F_MOVE)
        except BlockingIOError:
            gathering.nothing_came()
            continue
        except OSError as error:
            return End("source", said(error))
        if not size:
            return End("eof")
        took(size)
        left = size
        while left:
            try:
                left -= os.splice(out, writing, left, flags=os.SPLICE_F_MOVE)
            except OSError as error:
                return End("sink", said(error))
        count(size)
