"""sendmsg() of many buffers that are given as an array: no object of Python's for each page.

So pages go out of the RAM where they are, each behind its head or in a run behind a packet's,
and the interpreter's lock is free until the kernel has taken all of them.

The array is one of struct iovec: addresses and sizes, ``uint64``.  What is at these addresses
has to live until it is sent.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qmigd.guests.memory.kernel import libc
from qmigd.guests.memory.ram import PAGE, Pages

__all__ = ["IOV_MAX", "Records", "Vector", "behind", "packets", "send"]

#: Buffers that one call takes: UIO_MAXIOV (linux/uio.h).
IOV_MAX: Final = 1024

#: Addresses and sizes of buffers.
Vector = NDArray[np.uint64]

libc.sendmsg.restype = ctypes.c_ssize_t
libc.sendmsg.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]


class _MsgHdr(ctypes.Structure):
    """struct msghdr of the C library on 64-bit Linux."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class Records:
    """Heads of 8 bytes, and pages, by turns: as many as one call takes.

    :ivar MOST: pages.
    """

    MOST: Final = IOV_MAX // 2

    def __init__(self) -> None:
        self._heads = np.empty(self.MOST, ">u8")
        self._iov = np.empty((IOV_MAX, 2), np.uint64)
        self._iov[0::2, 0] = self._heads.ctypes.data + 8 * np.arange(self.MOST, dtype=np.uint64)
        self._iov[0::2, 1] = 8
        self._iov[1::2, 1] = PAGE

    def vector(self, heads: NDArray[np.uint64], ram: int, places: Pages) -> Vector:
        """Return where these are, until the next call.

        :param heads: what goes in front of each page, ``>u8``.
        :param ram: the address of the RAM.
        :param places: of the pages in it, bytes.
        """
        count = len(heads)
        self._heads[:count] = heads
        self._iov[1 : 2 * count : 2, 0] = np.uint64(ram) + places.astype(np.uint64)
        return self._iov[: 2 * count]


def packets(
    heads: NDArray[np.uint8], room: int, ram: int, places: Pages
) -> tuple[Vector, NDArray[np.int64]]:
    """Return where heads of packets are, and the pages behind each, neighbours in one; and at
    which of these buffers each packet begins.

    :param heads: a head in each row (:meth:`qmigd.stream.multifd.Packer.heads`).
    :param room: pages behind each but the last.
    :param ram: the address of the RAM.
    :param places: of the pages in it, bytes; from the first to the last, each once.
    """
    numbers = np.arange(len(heads))
    if places[-1] - places[0] == (len(places) - 1) * PAGE:
        # They are all neighbours, as in most of a first pass.
        iov = np.empty((2 * len(heads), 2), np.uint64)
        iov[0::2, 0] = heads.ctypes.data + heads.shape[1] * numbers
        iov[0::2, 1] = heads.shape[1]
        iov[1::2, 0] = places[::room] + ram
        iov[1:-2:2, 1] = room * PAGE
        iov[-1, 1] = (len(places) - room * (len(heads) - 1)) * PAGE
        return iov, 2 * numbers
    begins = np.ones(len(places), np.bool_)
    np.not_equal(places[1:], places[:-1] + PAGE, out=begins[1:])
    begins[::room] = True
    firsts = np.flatnonzero(begins)
    # In front of each run are those before it, and a head for each packet up to its own.
    at = np.arange(len(firsts)) + firsts // room + 1
    iov = np.empty((len(firsts) + len(heads), 2), np.uint64)
    iov[at, 0] = places[firsts] + ram
    iov[at, 1] = np.diff(firsts, append=len(places)) * PAGE
    at = np.searchsorted(firsts, numbers * room) + numbers
    iov[at, 0] = heads.ctypes.data + heads.shape[1] * numbers
    iov[at, 1] = heads.shape[1]
    return iov, at


def send(sock: socket.socket, iov: Vector) -> int:
    """Send it all, and return how many bytes that were.

    :param sock: one that blocks.
    :raises OSError: the connection broke.
    """
    total = 0
    for at in range(0, len(iov), IOV_MAX):
        some = iov[at : at + IOV_MAX]
        wanted = int(some[:, 1].sum())
        sent = _send(sock.fileno(), some)
        while sent < wanted:
            sent += _send(sock.fileno(), behind(some, sent))
        total += wanted
    return total


def _send(descriptor: int, iov: Vector) -> int:
    message = _MsgHdr(iov=iov.ctypes.data, iovlen=len(iov))
    while True:
        count = int(libc.sendmsg(descriptor, ctypes.byref(message), socket.MSG_NOSIGNAL))
        if count >= 0:
            return count
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def behind(iov: Vector, sent: int) -> Vector:
    """Return the buffers that are left when so many bytes of them are sent."""
    ends = np.cumsum(iov[:, 1])
    first = int(np.searchsorted(ends, np.uint64(sent), side="right"))
    left = iov[first:].copy()
    if len(left):
        into = np.uint64(sent) - (ends[first] - left[0, 1])
        left[0, 0] += into
        left[0, 1] -= into
    return left
