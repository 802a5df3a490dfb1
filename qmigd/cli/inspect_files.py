"""What ``qmigctl inspect`` reads: streams in files of any kind, and from pipes.

Offers :func:`opened`, which looks at a file's first bytes: from that of a saved guest it takes
off the head, and what is compressed with zstd it unpacks.  Whatever it is gives its bytes by
:meth:`Source.read`, never more than :data:`PIECE` of them at once.
"""

from __future__ import annotations

import fcntl
import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from ..errors import FileError, StreamError
from ..stream.format import MAX_DESCRIPTION
from ..wire import saved

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["PIECE", "STANDARD_INPUT", "Source", "opened"]

#: Bytes that are read at once.
PIECE: Final = 1 << 20

#: How standard input is named on the command line.
STANDARD_INPUT: Final = "-"

#: How a zstd frame begins (ZSTD_MAGICNUMBER in zstd.h).
_ZSTD: Final = b"\x28\xb5\x2f\xfd"

#: Binary logarithm of the window that a zstd frame may ask for: 16 MiB.  zstd's default level
#: takes 2 MiB, and the highest but ``--ultra`` 8 MiB.
_WINDOW: Final = 24

_LARGE_WINDOW: Final = "Frame requires too much memory"


class Source:
    """The bytes of one stream.

    :ivar name: the file's, for messages.
    :ivar head: of a saved guest, or None.
    :ivar packed: it is compressed with zstd.
    :ivar start: the offset in the file at which QEMU's part begins; 0 where it is compressed.
    :ivar size: bytes of the file; None for a pipe.
    :ivar seekable: other places of the stream than the next can be read.
    :ivar done: the offset in the file up to which it was read.
    """

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self.head: saved.Head | None = None
        self.packed = False
        self.start = 0
        status = os.fstat(descriptor)
        regular = stat.S_ISREG(status.st_mode)
        self.size = status.st_size if regular else None
        self.done = 0
        self._descriptor = descriptor
        self._area: memoryview | None = None
        self._first = b""
        self._end: int | None = None
        self._unpack: Callable[[], memoryview] | None = None
        if stat.S_ISFIFO(status.st_mode):
            with suppress(OSError):  # the user has many pipes: then it is slower
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIECE)
        self._look(regular)
        self.seekable = regular and not self.packed

    def read(self) -> memoryview:
        """Return the next bytes, nothing at the end; what was returned before may change.

        :raises FileError: the file cannot be read, or what is compressed in it is damaged.
        """
        return self._read() if self._unpack is None else self._unpack()

    @property
    def first(self) -> bytes:
        """How what is not packed begins; to be asked before anything is read."""
        return b"" if self.packed else self._first[:4]

    def close(self) -> None:
        """Close the file, and forget what was read."""
        self._area = None
        os.close(self._descriptor)

    def skip(self, offset: int) -> None:
        """Go on at another offset in the file."""
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        self._first = b""
        self.done = offset

    def tail(self) -> tuple[bytes, int]:
        """Return the end of the file, long enough for a description, and where that begins."""
        assert self.size is not None
        start = max(self.start, self.size - MAX_DESCRIPTION - 16)
        try:
            return os.pread(self._descriptor, self.size - start, start), start
        except OSError as error:
            raise FileError(f"{self.name} cannot be read: {error.strerror}.") from None

    def _look(self, regular: bool) -> None:
        self._first = self._some(saved.FIXED)
        if self._first.startswith(saved.MAGIC):
            self._saved()
        if self._first.startswith(_ZSTD):
            self.packed = True
            self._unpack = self._unpacked()
            self.start = 0
        if self.head is not None and self.packed != (self.head.format == "zstd"):
            raise FileError(
                f"{self.name}: its head says that it is {self.head.format}, and it is not."
            )

    def _saved(self) -> None:
        """Take off the head of a saved guest."""
        data = self._first
        # of a pipe the size is not known, and is seen at the end
        size = self.size
        if size is None and len(data) == saved.FIXED:
            size = int.from_bytes(data[24:32], "big") + int.from_bytes(data[32:40], "big")
        try:
            beginning = saved.begin(data, size or len(data))
            self.done = saved.FIXED
            self.head = saved.finish(beginning, self._some(beginning.size))
        except FileError as error:
            raise FileError(f"{self.name} cannot be read: {error.text}.") from None
        self.done = saved.FIXED + beginning.size
        while (left := self.head.offset - self.done) > 0:
            self.done += len(self._some(left)) or left
        self.start = self.done = self.head.offset
        self._end = self.head.offset + self.head.length
        self._first = self._some(len(_ZSTD))

    def _some(self, count: int) -> bytes:
        """Read ``count`` bytes, or up to the end."""
        data = b""
        while len(data) < count:
            try:
                piece = os.read(self._descriptor, min(count - len(data), PIECE))
            except OSError as error:
                raise FileError(f"{self.name} cannot be read: {error.strerror}.") from None
            if not piece:
                break
            data += piece
        return data

    def _read(self) -> memoryview:
        if self._area is None:
            self._area = memoryview(bytearray(PIECE))
        size = len(self._first)
        if size:
            self._area[:size] = self._first
            self._first = b""
        else:
            size = self._fill(self._area)
        self.done += size
        if not size and self._end is not None and self.done < self._end:
            # of a saved guest out of a pipe; the size of a file has been compared already
            raise StreamError(self.done, f"a saved guest of {self._end} bytes", "the end")
        return self._area[:size]

    def _fill(self, area: memoryview) -> int:
        """Read as much as there is room for, or up to the end: a pipe gives little at once."""
        size = 0
        try:
            while size < len(area) and (count := os.readv(self._descriptor, [area[size:]])):
                size += count
        except OSError as error:
            raise FileError(f"{self.name} cannot be read: {error.strerror}.") from None
        return size

    def _unpacked(self) -> Callable[[], memoryview]:
        parameter = zstd.DecompressionParameter.window_log_max
        unpacker = zstd.ZstdDecompressor(options={parameter: _WINDOW})

        def read() -> memoryview:
            data = b""
            while not data and not unpacker.eof:
                piece = self._read() if unpacker.needs_input else memoryview(b"")
                if not piece and unpacker.needs_input:
                    raise StreamError(self.done, "the rest of what zstd has compressed", "the end")
                try:
                    data = unpacker.decompress(piece, PIECE)
                except zstd.ZstdError as error:
                    raise FileError(self._damaged(error)) from None
            return memoryview(data)

        return read

    def _damaged(self, error: Exception) -> str:
        if _LARGE_WINDOW in str(error):
            return (
                f"{self.name} cannot be read: zstd would need more than {1 << _WINDOW >> 20} MiB "
                f"for it. 'zstd -d --long=31' makes a stream of it that can be."
            )
        return f"{self.name} is damaged: {error}, about {self.done} bytes from its beginning."


def opened(name: str) -> Source:
    """Open a file, or standard input, and find out what it is.

    :raises FileError: it cannot be read, or its head is damaged.
    """
    try:
        descriptor = 0 if name == STANDARD_INPUT else os.open(name, os.O_RDONLY | os.O_CLOEXEC)
        return Source("standard input" if name == STANDARD_INPUT else name, descriptor)
    except OSError as error:
        raise FileError(f"{name} cannot be read: {error.strerror}.") from None
