"""``zerocopy`` from the network: TCP_ZEROCOPY_RECEIVE, into a mapping of the socket.

The kernel maps pages in which nothing but payload has come, as a network card with header
split delivers them, and copies what lies between them.  A *look* at the socket yields
mapped pages, or bytes that were copied, or both in this order; looks go on until nothing
more is there or there is no room left, and all pieces are written at once.  Then the
pages are given back.

Where nothing that comes can be mapped, the rest of the stream is copied openly.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
from typing import Any, Final

from qmigd.channels.movers.common import BUFFER_SIZE, Count, End, said
from qmigd.channels.movers.copying import BULK, ENOUGH, GATHER, PATIENCE, copy

__all__ = ["UNMAPPED_ENOUGH", "Receiving", "receive"]

#: TCP_ZEROCOPY_RECEIVE of linux/tcp.h, and the one of its flags that says that nothing
#: is mapped at present.
_ZEROCOPY_RECEIVE: Final = 35
_NOTHING_MAPPED: Final = 1

#: What one look may copy at the most.  All that is there, if it is no more than this, is
#: copied at once; otherwise the kernel maps what it can, and tells how much it cannot.
_COPY_ROOM: Final = 32 << 10

#: After so many bytes in bulk out of which nothing could be mapped, it is copied openly.
UNMAPPED_ENOUGH: Final = 16 << 20


class _Request(ctypes.Structure):
    """struct tcp_zerocopy_receive of linux/tcp.h, as of 5.12."""

    _fields_ = (
        ("address", ctypes.c_uint64),
        ("length", ctypes.c_uint32),
        ("recv_skip_hint", ctypes.c_uint32),
        ("inq", ctypes.c_uint32),
        ("err", ctypes.c_int32),
        ("copybuf_address", ctypes.c_uint64),
        ("copybuf_len", ctypes.c_int32),
        ("flags", ctypes.c_uint32),
        ("msg_control", ctypes.c_uint64),
        ("msg_controllen", ctypes.c_uint64),
        ("msg_flags", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
    )


_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.getsockopt.argtypes = (
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
)
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


def receive(source: socket.socket, sink: socket.socket, count: Count) -> End:
    """Move bytes from a TCP socket without copying them on the way in."""
    try:
        receiving = Receiving(source)
    except OSError:
        return copy(source, sink, count)
    try:
        while receiving.unmapped < UNMAPPED_ENOUGH:
            try:
                pieces = receiving.next()
            except OSError as error:
                return End("source", said(error))
            if not pieces:
                return End("eof")
            size = sum(map(len, pieces))
            try:
                _write(sink, pieces)
            except OSError as error:
                return End("sink", said(error))
            receiving.give_back()
            count(size)
        receiving.gather(False)
    finally:
        receiving.close()
    return copy(source, sink, count)


class Receiving:
    """A TCP socket that is read from by mapping it.

    :ivar unmapped: bytes that came in bulk since a page could be mapped.
    """

    def __init__(self, source: socket.socket) -> None:
        """:raises OSError: the kernel cannot do it with this socket."""
        self.unmapped = 0
        self._source = source
        self._poll = select.poll()
        self._poll.register(source, select.POLLIN)
        self._gathering = False
        self._lost: OSError | None = None
        self._mapped = 0
        self._room = mmap.mmap(-1, BUFFER_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._copies: Any = memoryview(self._room)
        self._copies_at = ctypes.addressof(ctypes.c_char.from_buffer(self._room))
        self._pages_at = _libc.mmap(
            *(None, BUFFER_SIZE, mmap.PROT_READ, mmap.MAP_SHARED, source.fileno(), 0)
        )
        if self._pages_at == _MAP_FAILED:
            raise _error()
        # For system calls only, which fail where nothing is mapped: for Python itself it
        # would be a SIGBUS.
        self._pages: Any = memoryview((ctypes.c_char * BUFFER_SIZE).from_address(self._pages_at))
        try:
            # Takes nothing: there is no room in it.
            self._look(BUFFER_SIZE, BUFFER_SIZE)
        except OSError:
            self.close()
            raise

    def next(self) -> list[Any]:
        """Wait for bytes; return all that are there and that there is room for.

        An empty list is the end of the stream.  Mapped pages are to be given back before
        the next call.

        :raises OSError: the connection is lost.
        """
        if self._lost is not None:
            raise self._lost
        if self._gathering and not self._poll.poll(PATIENCE * 1000):
            self.gather(False)
        if not self._gathering:
            self._poll.poll()
        pieces = self._pieces()
        size = sum(map(len, pieces))
        if not size:
            # The end, or an error: reading tells.  Should something have come meanwhile,
            # it must not wait for more.
            self.gather(False)
            size = self._source.recv_into(self._copies)
            return [self._copies[:size]] if size else []
        if self._gathering != (size >= (ENOUGH if self._gathering else BULK)):
            self.gather(not self._gathering)
        if self._mapped:
            self.unmapped = 0
        elif size >= BULK:
            self.unmapped += size
        return pieces

    def _pieces(self) -> list[Any]:
        pieces = []
        pages = copies = 0
        while pages < BUFFER_SIZE and copies <= BUFFER_SIZE - _COPY_ROOM:
            try:
                look = self._look(pages, copies)
            except OSError:
                # EIO at the end of the stream; whatever else it is, reading will tell.
                break
            self._mapped = pages + look.length
            if look.length:
                pieces.append(self._pages[pages : self._mapped])
            pages = self._mapped
            sizes = [max(0, look.copybuf_len)]
            if look.recv_skip_hint:
                # It is there, so that this does not wait.
                at = copies + sizes[0]
                end = min(BUFFER_SIZE, at + look.recv_skip_hint)
                sizes.append(self._source.recv_into(self._copies[at:end]) if end > at else 0)
            for size in filter(None, sizes):
                pieces.append(self._copies[copies : copies + size])
                copies += size
            if look.inq <= sum(sizes[1:]) or not (look.length or copies):
                break
        if not pieces and self._lost is not None:
            raise self._lost
        return pieces

    def _look(self, pages: int, copies: int) -> Any:
        """Have the kernel map and copy behind what has been mapped and copied before."""
        look = _Request(
            address=self._pages_at + min(pages, BUFFER_SIZE - mmap.PAGESIZE),
            length=BUFFER_SIZE - pages,
            copybuf_address=self._copies_at + copies,
            copybuf_len=min(_COPY_ROOM, BUFFER_SIZE - copies),
            flags=_NOTHING_MAPPED,
        )
        size = ctypes.c_uint32(ctypes.sizeof(look))
        if _libc.getsockopt(
            *(self._source.fileno(), socket.IPPROTO_TCP, _ZEROCOPY_RECEIVE),
            *(ctypes.byref(look), ctypes.byref(size)),
        ):
            raise _error()
        if look.err:
            # Now it is with us: the socket does not tell it twice.
            self._lost = OSError(-look.err, os.strerror(-look.err))
        return look

    def gather(self, on: bool) -> None:
        """Have :meth:`next` wait for more, or not."""
        if self._gathering != on:
            self._source.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, GATHER if on else 1)
            self._gathering = on

    def give_back(self) -> None:
        """Let the kernel have the pages that were mapped."""
        if self._mapped:
            _libc.madvise(self._pages_at, self._mapped, mmap.MADV_DONTNEED)
            self._mapped = 0

    def close(self) -> None:
        """Let go of the mapping, which keeps the connection open like a descriptor."""
        _libc.munmap(self._pages_at, BUFFER_SIZE)


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def _write(sink: socket.socket, pieces: list[Any]) -> None:
    while pieces:
        taken = sink.sendmsg(pieces)
        while pieces and taken >= len(pieces[0]):
            taken -= len(pieces.pop(0))
        if taken:
            pieces[0] = pieces[0][taken:]
