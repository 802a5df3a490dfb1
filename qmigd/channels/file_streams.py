"""A guest's stream, from its QEMU into a file and back, compressed if wanted.

QEMU has the one end of a pair of sockets and qmigd the other, and these functions move
the bytes: outside the reactor's thread, in which they would stand in everybody's way.
Shutting the socket ends them.

No version of QEMU knows the difference to a migration.  Giving it the file itself would
save a copy, but QEMU 11 takes no file as a descriptor any more.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from typing import Any, Final

from qmigd.channels.saved_files import write_all
from qmigd.errors import FileError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["pour_in", "pour_out"]

#: Bytes read at one time, and the most that is held unpacked.
_BUFFER: Final = 1 << 20

#: More threads than this gain nothing: one QEMU's stream is not faster.
_MOST_WORKERS: Final = 4


def _nothing() -> bytes:
    return b""


def _packer(cpus: int) -> tuple[Callable[[Any], Any], Callable[[], bytes]]:
    """Return what compresses a piece, and what gives the rest."""
    parameter = zstd.CompressionParameter
    _, most = parameter.nb_workers.bounds()  # 0: a library without threads
    options: dict[int, int] = {
        parameter.compression_level: zstd.COMPRESSION_LEVEL_DEFAULT,
        parameter.checksum_flag: 1,
        parameter.nb_workers: min(most, _MOST_WORKERS, cpus),
    }
    packer = zstd.ZstdCompressor(options=options)
    return packer.compress, packer.flush


def pour_out(
    stream: socket.socket,
    descriptor: int,
    offset: int,
    *,
    packed: bool,
    cpus: int,
) -> None:
    """Write what QEMU sends into a file, up to the stream's end.

    :param offset: where it begins in the file.
    :param packed: as zstd, with ``cpus`` threads or some fewer.
    :raises FileError: the file cannot be written.
    """
    pack: Callable[[Any], Any] = lambda data: data  # noqa: E731
    rest: Callable[[], bytes] = _nothing
    if packed:
        pack, rest = _packer(cpus)
    area = memoryview(bytearray(_BUFFER))
    size = -1
    while size:
        try:
            size = stream.recv_into(area)
        except OSError:  # QEMU is gone, and whoever looks at it will say so
            size = 0
        data = pack(area[:size]) if size else rest()
        write_all(descriptor, data, offset)
        offset += len(data)


def pour_in(
    descriptor: int,
    offset: int,
    length: int,
    stream: socket.socket,
    *,
    packed: bool,
    moved: Callable[[int], None] = lambda size: None,
) -> None:
    """Give QEMU what is in a file, and the stream's end after it.

    That QEMU closes its end is no error here: it may have all that it wants.

    :param moved: told of the bytes that were read from the file.
    :raises FileError: the file cannot be read, or what is in it is not zstd, or was cut.
    """
    plain = _plain(descriptor, offset, length, moved)
    read = _unpacked(plain) if packed else plain
    while data := read():
        try:
            stream.sendall(data)
        except OSError:
            return
    with contextlib.suppress(OSError):
        stream.shutdown(socket.SHUT_WR)


def _plain(
    descriptor: int, offset: int, length: int, moved: Callable[[int], None]
) -> Callable[[], bytes]:
    at, end = offset, offset + length

    def read() -> bytes:
        nonlocal at
        try:
            data = os.pread(descriptor, min(_BUFFER, end - at), at)
        except OSError as error:
            raise FileError(f"the file cannot be read: {error.strerror}") from None
        at += len(data)
        moved(len(data))
        return data

    return read


def _unpacked(packed: Callable[[], bytes]) -> Callable[[], bytes]:
    """Return what unpacks, never more than a buffer at one time.

    The window that a file may ask for is bounded by the library: 128 MiB
    (ZSTD_WINDOWLOG_LIMIT_DEFAULT in zstd.h).
    """
    unpacker = zstd.ZstdDecompressor()

    def read() -> bytes:
        data = b""
        while not data and not unpacker.eof:
            piece = packed() if unpacker.needs_input else b""
            if not piece and unpacker.needs_input:
                raise FileError("the file is damaged: what was compressed in it was cut")
            try:
                data = unpacker.decompress(piece, _BUFFER)
            except zstd.ZstdError as error:
                raise FileError(f"the file is damaged: {error}") from None
        return data

    return read
