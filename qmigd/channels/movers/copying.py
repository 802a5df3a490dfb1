"""``copy``: read into a buffer, write from it; with a codec in between, if there is one."""

from __future__ import annotations

import mmap
import socket
import struct
from typing import Final

from qmigd.channels.movers.common import BUFFER_SIZE, Count, End, said
from qmigd.channels.tls import PeerSocket
from qmigd.interfaces import ICodec

__all__ = ["BULK", "ENOUGH", "GATHER", "PATIENCE", "Gathering", "copy"]

# Gathering: while a stream comes in bulk over TCP, a read is better left to wait until
# GATHER bytes are there than woken for every segment; a tenth of the CPU time of all.
# It begins with a read of BULK bytes, and ends with one that had less than ENOUGH after
# PATIENCE seconds (the kernel rounds that up to its next tick but one): a stream slower
# than that, and whatever goes to and fro, is passed on at once.  The numbers come from
# tests/bench/relay.py.
GATHER: Final = 512 << 10
ENOUGH: Final = GATHER // 2
BULK: Final = 64 << 10
PATIENCE: Final = 0.001


def copy(
    source: PeerSocket,
    sink: PeerSocket,
    count: Count,
    *,
    encoder: ICodec | None = None,
    decoder: ICodec | None = None,
) -> End:
    """Move bytes by copying them; what is counted is before encoding and after decoding.

    :raises ValueError: a codec says that the bytes are not its own.
    """
    # A mapping of its own: page-aligned, and touched only as far as it is used.
    area = mmap.mmap(-1, BUFFER_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(area)
    receive, send = source.recv_into, sink.sendall
    gathering = Gathering(source)
    took = gathering.took
    while True:
        try:
            size = receive(area)
        except BlockingIOError:
            gathering.nothing_came()
            continue
        except OSError as error:
            return End("source", said(error))
        took(size)
        data: bytes | memoryview = view[:size]
        if encoder is not None:
            data = encoder.encode(view[:size]) if size else encoder.finish()
        elif decoder is not None and size:
            data = decoder.decode(view[:size])
        if len(data):
            try:
                send(data)
            except OSError as error:
                return End("sink", said(error))
        if not size:
            return End("eof")
        count(size if decoder is None else len(data))


class Gathering:
    """Whether reads from a socket wait for more: after each it is said what came.

    On a socket that is not TCP nothing is gathered.
    """

    def __init__(self, sock: PeerSocket) -> None:
        self._sock = sock
        self._can = sock.family in (socket.AF_INET, socket.AF_INET6)
        self._on = False

    def took(self, size: int) -> None:
        """A read had so many bytes."""
        if self._can and self._on != (size >= (ENOUGH if self._on else BULK)):
            self._set(not self._on)

    def nothing_came(self) -> None:
        """A read ended with EAGAIN, as it does only while gathering, which ends here."""
        self._set(False)

    def _set(self, on: bool) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, GATHER if on else 1)
        patience = struct.pack("ll", 0, int(PATIENCE * 1e6) if on else 0)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
        self._on = on
