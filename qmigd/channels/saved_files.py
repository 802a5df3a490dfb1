"""The file of a saved guest on the disk: written so that no crash leaves half of one.

All of this waits for the disk, and what takes long (:func:`checksum`,
:func:`sync`) belongs outside the reactor's thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import struct
import threading
import zlib
from pathlib import Path
from typing import Final

from qmigd.errors import FileError
from qmigd.wire import saved
from qmigd.wire.saved import Head

__all__ = ["BLOCK", "NewFile", "SavedFile", "Stopped", "checksum", "discard", "sync", "write_all"]

#: Bytes of QEMU's part that have a CRC of their own in its checksum (docs/saved-guests).
BLOCK: Final = 1 << 20

_ZEROS: Final = bytes(BLOCK)
_ENTRY: Final = struct.Struct("!QI")
_TEMPORARY: Final = ".qmigd-", ".part"


class Stopped(Exception):
    """Nobody wants the result any more."""


def _said(error: OSError) -> str:
    return error.strerror or str(error)


class NewFile:
    """A file that is being written, under a temporary name in the same directory.

    :ivar path: what it will be called.
    :ivar temporary: what it is called until :meth:`publish`.
    :ivar descriptor: for reading and writing.
    """

    def __init__(self, path: Path, name: str, *, replace: bool = False) -> None:
        """
        :param name: what no other file that is being written has in its name.
        :param replace: a file of that name may be there.
        :raises FileError: it cannot be made.
        """
        self.path = path
        self.temporary = self.place(path, name)
        self._replace = replace
        self.descriptor = -1
        _check_place(path, replace)
        try:
            self.descriptor = os.open(
                self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise FileError(f"nothing can be written into {path.parent}: {_said(error)}") from None

    @staticmethod
    def place(path: Path, name: str) -> Path:
        """Return what the file is called while it is being written."""
        return path.with_name(name.join(_TEMPORARY))

    def opened(self, *, direct: bool = False) -> int:
        """Open it once more, for writing only; the caller closes it.

        :param direct: past the page cache (O_DIRECT).
        :raises FileError: the file system cannot do that.
        """
        return _again(self.descriptor, os.O_WRONLY, direct)

    def write_head(self, head: Head, *, complete: bool = False) -> None:
        """
        :raises FileError: the disk is full, or broken.
        """
        write_all(self.descriptor, saved.encode(head, complete=complete), 0)

    @property
    def size(self) -> int:
        """Bytes that it has by now."""
        return os.fstat(self.descriptor).st_size

    @property
    def on_disk(self) -> int:
        """Bytes that it takes on the disk: where nothing was written it takes none."""
        return os.fstat(self.descriptor).st_blocks * 512

    def publish(self) -> None:
        """Give it its name, for good; everything has to be on the disk by now.

        :raises FileError: there is one of that name meanwhile, or it cannot be renamed.
        """
        try:
            if self._replace:
                os.replace(self.temporary, self.path)
            else:
                self._publish_new()
            directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except FileExistsError:
            raise FileError(_exists(self.path)) from None
        except OSError as error:
            raise FileError(f"{self.path} cannot be given its name: {_said(error)}") from None

    def _publish_new(self) -> None:
        """Rename it, unless there is one of that name."""
        try:
            os.link(self.temporary, self.path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            _check_place(self.path, False)
            os.replace(self.temporary, self.path)
        else:
            os.unlink(self.temporary)

    def close(self) -> None:
        """Close it, and remove it unless it has its name.  Harmless when that was done."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        with contextlib.suppress(OSError):
            self.temporary.unlink(missing_ok=True)


class SavedFile:
    """A file that was written before; its head is read and proved at once.

    :ivar descriptor: for reading.
    """

    def __init__(self, path: Path) -> None:
        """:raises FileError: there is none, or it is not a good one."""
        self.path = path
        try:
            # Not to be kept waiting by a pipe.
            self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise FileError(f"{path} cannot be read: {_said(error)}") from None
        try:
            self.head = self._head()
        except FileError as error:
            self.close()
            raise FileError(f"{path} cannot be restored: {error.text}") from None
        except OSError as error:
            self.close()
            raise FileError(f"{path} cannot be read: {_said(error)}") from None

    def _head(self) -> Head:
        about = os.fstat(self.descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise FileError("it is not a regular file")
        beginning = saved.begin(os.pread(self.descriptor, saved.FIXED, 0), about.st_size)
        return saved.finish(beginning, os.pread(self.descriptor, beginning.size, saved.FIXED))

    def opened(self, *, direct: bool = False) -> int:
        """Open it once more, for reading only; the caller closes it.

        :param direct: past the page cache (O_DIRECT).
        :raises FileError: the file system cannot do that.
        """
        return _again(self.descriptor, os.O_RDONLY, direct)

    def verify(self, descriptor: int, stop: threading.Event) -> None:
        """See that QEMU's part is what was saved.

        :param descriptor: a copy of the file's own, which may be closed meanwhile.
        :raises FileError: it is not.
        """
        head = self.head
        if head.checksum == saved.NO_CHECKSUM:
            return
        if checksum(descriptor, head.offset, head.length, stop) != head.checksum:
            raise FileError(
                f"{self.path} is damaged: the checksum of what was saved is wrong; nothing of "
                f"it was given to the guest's process"
            )

    def close(self) -> None:
        """Close it; harmless when that was done."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def _check_place(path: Path, replace: bool) -> None:
    """:raises FileError: no file can be put there."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise FileError(f"there is no directory {path.parent}") from None
        return
    except OSError as error:
        raise FileError(f"{path} cannot be written: {_said(error)}") from None
    if not stat.S_ISREG(mode):
        raise FileError(f"{path} is there already, and is not a regular file")
    if not replace:
        raise FileError(_exists(path))


def _exists(path: Path) -> str:
    return f"{path} is there already; take another name, or say that it may be replaced"


def _again(descriptor: int, how: int, direct: bool) -> int:
    flags = how | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
    try:
        return os.open(f"/proc/self/fd/{descriptor}", flags)
    except OSError as error:
        hint = "; its file system may not know direct-io" if direct else ""
        raise FileError(f"the file cannot be opened for the guest: {_said(error)}{hint}") from None


def write_all(descriptor: int, data: bytes | memoryview, at: int) -> None:
    """Write ``data`` at a place in the file.

    :raises FileError: the disk is full, or broken.
    """
    view = memoryview(data)
    try:
        while view:
            done = os.pwrite(descriptor, view, at)
            view, at = view[done:], at + done
    except OSError as error:
        raise FileError(f"the file cannot be written: {_said(error)}") from None


def checksum(descriptor: int, offset: int, length: int, stop: threading.Event) -> bytes:
    """Return the checksum of a part of a file (docs/saved-guests, "Checksum").

    SHA-256 over the number and the CRC-32 of each block of :data:`BLOCK` bytes, but for
    those that are all zeros: so a hole in the file, which costs nothing here, and zeros
    that were written are the same.

    :param stop: ends it.
    :raises FileError: the file cannot be read, or has become shorter.
    :raises Stopped: ``stop`` was set.
    """
    total = hashlib.sha256()
    buffer = bytearray(BLOCK)
    view = memoryview(buffer)
    number, blocks = 0, -(-length // BLOCK)
    try:
        while number < blocks:
            if stop.is_set():
                raise Stopped
            number = max(number, _next_data(descriptor, offset, number, blocks))
            if number >= blocks:
                break
            at = number * BLOCK
            wanted = min(BLOCK, length - at)
            if os.preadv(descriptor, [view[:wanted]], offset + at) != wanted:
                raise FileError("the file has become shorter while it was read")
            # Not a slice of the view: comparing these is some ten times slower.
            block = buffer if wanted == BLOCK else bytes(view[:wanted])
            if block != _ZEROS[:wanted]:
                total.update(_ENTRY.pack(number, zlib.crc32(block)))
            number += 1
    except OSError as error:
        raise FileError(f"the file cannot be read: {_said(error)}") from None
    return total.digest()


def _next_data(descriptor: int, offset: int, number: int, blocks: int) -> int:
    """Return the first block from this one on that is not wholly in a hole."""
    try:
        found = os.lseek(descriptor, offset + number * BLOCK, os.SEEK_DATA)
    except OSError:  # a hole up to the end, or a file system that cannot say
        return blocks if _ends_in_hole(descriptor, offset + number * BLOCK) else number
    return (found - offset) // BLOCK


def _ends_in_hole(descriptor: int, at: int) -> bool:
    try:
        return os.lseek(descriptor, at, os.SEEK_HOLE) <= at
    except OSError:
        return False


def sync(descriptor: int) -> None:
    """See that all of a file is on the disk.

    :raises FileError: it cannot be brought there.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise FileError(f"the file cannot be brought to the disk: {_said(error)}") from None


def discard(place: str) -> bool:
    """Remove what a daemon that was killed had begun to write.

    :param place: its temporary name; a file of any other kind of name is left alone.
    :return: whether it was never finished; one that was has its own name by now.
    """
    before, after = _TEMPORARY
    name = os.path.basename(place)
    try:
        links = os.lstat(place).st_nlink
    except OSError:
        return False
    if name.startswith(before) and name.endswith(after):
        with contextlib.suppress(OSError):
            os.unlink(place)
    return links == 1
