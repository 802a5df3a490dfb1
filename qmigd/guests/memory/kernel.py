"""userfaultfd and PAGEMAP_SCAN, as far as the guest needs them.

A userfaultfd here handles faults of user space only (``UFFD_USER_MODE_ONLY``, Linux 5.11),
which every user may do: the guest touches its RAM itself, never through the kernel.

Numbers are those of ``linux/userfaultfd.h`` and ``linux/fs.h``, for 64-bit machines.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

__all__ = [
    "MISSING",
    "WRITE_PROTECT",
    "PagemapScan",
    "Userfaultfd",
    "libc",
    "map_shared",
    "populate",
    "punch",
    "unmap",
]

#: The C library.  A call through it lets go of the interpreter's lock, so that a thread
#: that waits in it, for a page say, keeps no other one from running.
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
libc.syscall.restype = ctypes.c_long

#: ``__NR_userfaultfd``: the same on x86-64 and, since it is newer than the split, not elsewhere.
_NR_USERFAULTFD = {"x86_64": 323}.get(os.uname().machine, 282)
_USER_MODE_ONLY = 1

_API = 0xAA
_FEATURE_WP_SHMEM = 1 << 12  # UFFD_FEATURE_WP_HUGETLBFS_SHMEM
_FEATURE_WP_ASYNC = 1 << 15

#: Modes of :meth:`Userfaultfd.register`.
MISSING = 1 << 0
WRITE_PROTECT = 1 << 1

_UFFDIO_API = 0xC018AA3F
_UFFDIO_REGISTER = 0xC020AA00
_UFFDIO_UNREGISTER = 0x8010AA01
_UFFDIO_COPY = 0xC028AA03
_UFFDIO_ZEROPAGE = 0xC020AA04
_MESSAGE = struct.Struct("=B7x3Q")  # struct uffd_msg, with arg.pagefault
_EVENT_PAGEFAULT = 0x12

_PAGEMAP_SCAN = 0xC0606610
_SCAN_WP_MATCHING = 1 << 0
_SCAN_CHECK_WPASYNC = 1 << 1
_PAGE_IS_WRITTEN = 1 << 1
_REGION = struct.Struct("=3Q")  # struct page_region
_REGIONS = 4096

_MADV_POPULATE_WRITE = 23  # Linux 5.14

_FALLOC_KEEP_SIZE = 1
_FALLOC_PUNCH_HOLE = 2


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")


def map_shared(descriptor: int, size: int) -> int:
    """Map a file for reading and writing, and return the address.

    :raises OSError: there is no room.
    """
    flags = mmap.PROT_READ | mmap.PROT_WRITE
    address = libc.mmap(None, size, flags, mmap.MAP_SHARED, descriptor, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise _error("mmap")
    return int(address)


def unmap(address: int, size: int) -> None:
    """Undo :func:`map_shared`."""
    libc.munmap(address, size)


def populate(address: int, size: int) -> None:
    """Have the kernel give a range its memory now, and not page by page as it is touched.

    :raises OSError: there is not so much.
    """
    if libc.madvise(address, size, _MADV_POPULATE_WRITE):
        if ctypes.get_errno() == errno.EINVAL:
            return  # an older kernel: it is touched when it is touched
        raise _error("madvise")


def punch(descriptor: int, offset: int, size: int) -> None:
    """Make a hole in a file: whoever touches it next finds nothing there.

    :raises OSError: the file system cannot.
    """
    if libc.fallocate(descriptor, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, size):
        raise _error("fallocate")


class Userfaultfd:
    """One userfaultfd of this process."""

    def __init__(self, features: int = 0) -> None:
        """:raises OSError: the kernel has none, lacks a feature, or does not let us."""
        flags = os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY
        self._descriptor = int(libc.syscall(_NR_USERFAULTFD, flags))
        if self._descriptor < 0:
            raise _error("userfaultfd")
        try:
            fcntl.ioctl(self._descriptor, _UFFDIO_API, struct.pack("=3Q", _API, features, 0))
        except OSError:
            self.close()
            raise

    @classmethod
    def asynchronous(cls) -> Userfaultfd:
        """One whose write protection the kernel lifts by itself and remembers (Linux 6.7)."""
        return cls(_FEATURE_WP_ASYNC | _FEATURE_WP_SHMEM)

    def fileno(self) -> int:
        return self._descriptor

    def register(self, address: int, size: int, mode: int) -> None:
        """Take on the faults of a range: :data:`MISSING`, :data:`WRITE_PROTECT`."""
        fcntl.ioctl(self._descriptor, _UFFDIO_REGISTER, struct.pack("=4Q", address, size, mode, 0))

    def unregister(self, address: int, size: int) -> None:
        fcntl.ioctl(self._descriptor, _UFFDIO_UNREGISTER, struct.pack("=2Q", address, size))

    def copy(self, to: int, source: int, size: int) -> None:
        """Fill missing pages, and wake who waits for them; those that are there stay as they are.

        :param source: the address of what they are to hold.
        """
        end = to + size
        while to < end:
            argument = bytearray(struct.pack("=4Qq", to, source, end - to, 0, 0))
            try:
                fcntl.ioctl(self._descriptor, _UFFDIO_COPY, argument)
                return
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.EAGAIN):
                    raise
                done = max(0, struct.unpack_from("=q", argument, 32)[0])
                if error.errno == errno.EEXIST and not done:
                    done = mmap.PAGESIZE  # this one is there already
                to, source = to + done, source + done

    def zero(self, to: int, size: int) -> None:
        """The same with zero bytes."""
        end = to + size
        while to < end:
            argument = bytearray(struct.pack("=3Qq", to, end - to, 0, 0))
            try:
                fcntl.ioctl(self._descriptor, _UFFDIO_ZEROPAGE, argument)
                return
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.EAGAIN):
                    raise
                done = max(0, struct.unpack_from("=q", argument, 24)[0])
                if error.errno == errno.EEXIST and not done:
                    done = mmap.PAGESIZE
                to += done

    def faults(self) -> list[int]:
        """Return the addresses that somebody waits for, as far as they have come."""
        try:
            data = os.read(self._descriptor, 64 * _MESSAGE.size)
        except BlockingIOError:
            return []
        return [
            address
            for event, _, address, _ in _MESSAGE.iter_unpack(data)
            if event == _EVENT_PAGEFAULT
        ]

    def close(self) -> None:
        """End it; every range is let go of, and who waits goes on with what is there."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class PagemapScan:
    """Which pages of a range were written, by the kernel's page tables (Linux 6.7).

    The range has to be registered with :meth:`Userfaultfd.asynchronous` for
    :data:`WRITE_PROTECT`.
    """

    def __init__(self, address: int, size: int) -> None:
        """:raises OSError: the pagemap cannot be opened."""
        self._descriptor = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._start, self._end = address, address + size
        self._regions = ctypes.create_string_buffer(_REGIONS * _REGION.size)

    def take(self) -> Iterator[tuple[int, int]]:
        """Yield the runs of pages written since the last call, and protect them anew.

        :raises OSError: the kernel has no PAGEMAP_SCAN.
        """
        at = self._start
        while at < self._end:
            argument = bytearray(
                struct.pack(
                    "=12Q",
                    *(96, _SCAN_WP_MATCHING | _SCAN_CHECK_WPASYNC, at, self._end, 0),
                    *(ctypes.addressof(self._regions), _REGIONS, 0),
                    *(0, _PAGE_IS_WRITTEN, 0, _PAGE_IS_WRITTEN),
                )
            )
            count = fcntl.ioctl(self._descriptor, _PAGEMAP_SCAN, argument)
            found = _REGION.iter_unpack(self._regions.raw[: count * _REGION.size])
            for start, end, _ in found:
                yield (start - self._start) // mmap.PAGESIZE, (end - self._start) // mmap.PAGESIZE
            at = struct.unpack_from("=Q", argument, 32)[0]

    def close(self) -> None:
        os.close(self._descriptor)
