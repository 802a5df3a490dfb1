"""sendmsg() of many buffers that are given as an array: no object of Python's for each page.

So pages go out of the RAM where they are, each behind its head, and the interpreter's lock
is free until the kernel has taken all of them.
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

__all__ = ["MOST", "Vector", "behind"]

#: Pages with a head each that one call takes: half of IOV_MAX (linux/uio.h).
MOST: Final = 512

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


class Vector:
    """Heads of 8 bytes, and pages, by turns."""

    def __init__(self) -> None:
        self._heads = np.empty(MOST, ">u8")
        self._iov = np.empty((2 * MOST, 2), np.uint64)  # struct iovec: where, and how long
        self._iov[0::2, 0] = self._heads.ctypes.data + 8 * np.arange(MOST, dtype=np.uint64)
        self._iov[0::2, 1] = 8
        self._iov[1::2, 1] = PAGE

    def send(self, sock: socket.socket, heads: NDArray[np.uint64], ram: int, places: Pages) -> int:
        """Send up to :data:`MOST` pages, and return how many bytes that were.

        :param sock: one that blocks.
        :param heads: what goes in front of each page, ``>u8``.
        :param ram: the address of the RAM.
        :param places: of the pages in it, bytes.
        :raises OSError: the connection broke.
        """
        count = len(heads)
        if not count:
            return 0
        self._heads[:count] = heads
        self._iov[1 : 2 * count : 2, 0] = np.uint64(ram) + places.astype(np.uint64)
        iov = self.buffers(count)
        sent, wanted = _send(sock.fileno(), iov), count * (8 + PAGE)
        while sent < wanted:
            sent += _send(sock.fileno(), behind(iov, sent))
        return wanted

    def buffers(self, count: int) -> NDArray[np.uint64]:
        """Return where the last heads and pages are, ``count`` of them: addresses and sizes."""
        return self._iov[: 2 * count]


def _send(descriptor: int, iov: NDArray[np.uint64]) -> int:
    message = _MsgHdr(iov=iov.ctypes.data, iovlen=len(iov))
    while True:
        count = int(libc.sendmsg(descriptor, ctypes.byref(message), socket.MSG_NOSIGNAL))
        if count >= 0:
            return count
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def behind(iov: NDArray[np.uint64], sent: int) -> NDArray[np.uint64]:
    """Return the buffers that are left when so many bytes of them are sent."""
    ends = np.cumsum(iov[:, 1])
    first = int(np.searchsorted(ends, np.uint64(sent), side="right"))
    left = iov[first:].copy()
    if len(left):
        into = np.uint64(sent) - (ends[first] - left[0, 1])
        left[0, 0] += into
        left[0, 1] -= into
    return left
