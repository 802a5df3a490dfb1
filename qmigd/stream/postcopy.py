"""The commands of postcopy, and what is in them, both ways.

::

    ADVISE        nothing, or  sizes:u64 target page size:u64
    LISTEN, RUN, RESUME  nothing
    RAM_DISCARD   version:u8 = 0  name  0:u8  (start:u64 length:u64)*
    PACKAGED      length:u32, and that many bytes behind the command: LISTEN, the devices, RUN
    RECV_BITMAP   name

A name is a byte with its length, and that many bytes.  ``sizes`` has a bit for each size of page
that any block of RAM has.  Integers are big-endian.  Functions named after a command
return it whole; those that read get its data.

Source: migration/savevm.c and postcopy-ram.c of QEMU.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmigd.errors import StreamError
from qmigd.stream.format import CommandNumber
from qmigd.stream.names import counted, read_counted
from qmigd.stream.pieces import Buffer
from qmigd.stream.writer import command

__all__ = [
    "MAX_PACKAGE",
    "PACKAGED_LOADED",
    "Advice",
    "Discard",
    "advise",
    "discard",
    "listen",
    "packaged",
    "read_advise",
    "read_discard",
    "read_packaged",
    "read_recv_bitmap",
    "recv_bitmap",
    "resume",
    "run",
]

#: MAX_VM_CMD_PACKAGED_SIZE.
MAX_PACKAGE: Final = (1 << 32) - 1

#: QEMU_VM_PING_PACKAGED_LOADED: the ping behind a package.
PACKAGED_LOADED: Final = 0x42

#: MAX_DISCARDS_PER_COMMAND: QEMU puts so many into one; it takes more.
_DISCARDS: Final = 12

_ADVICE: Final = struct.Struct(">QQ")


@dataclass(frozen=True)
class Advice:
    """What ADVISE says of the source.

    :ivar sizes: all the sizes of page behind any block of RAM, or-ed together.
    :ivar page_size: the target's.
    """

    sizes: int
    page_size: int


@dataclass(frozen=True)
class Discard:
    """Parts of a block that were sent and have become dirty since.

    :ivar ranges: start and length of each, bytes.
    """

    block: str
    ranges: NDArray[np.uint64]


def advise(advice: Advice | None) -> bytes:
    """Return ADVISE.

    :param advice: None: RAM takes no part in it (``postcopy-ram`` is off, and dirty bitmaps do).
    """
    data = b"" if advice is None else _ADVICE.pack(advice.sizes, advice.page_size)
    return command(CommandNumber.POSTCOPY_ADVISE, data)


def listen() -> bytes:
    """Return LISTEN."""
    return command(CommandNumber.POSTCOPY_LISTEN)


def run() -> bytes:
    """Return RUN."""
    return command(CommandNumber.POSTCOPY_RUN)


def resume() -> bytes:
    """Return RESUME."""
    return command(CommandNumber.POSTCOPY_RESUME)


def recv_bitmap(block: str) -> bytes:
    """Return RECV_BITMAP: the destination is to say what it has of a block."""
    return command(CommandNumber.RECV_BITMAP, counted(block))


def packaged(contents: Iterable[Buffer]) -> list[Buffer]:
    """Return PACKAGED with its package.

    :raises ValueError: it is larger than :data:`MAX_PACKAGE`.
    """
    parts = list(contents)
    length = sum(memoryview(part).nbytes for part in parts)
    if length > MAX_PACKAGE:
        raise ValueError(f"A package of {length} bytes is longer than {MAX_PACKAGE}.")
    return [command(CommandNumber.PACKAGED, struct.pack(">I", length)), *parts]


def discard(block: str, ranges: ArrayLike) -> Iterator[bytes]:
    """Return as many RAM_DISCARD as it takes.

    :param ranges: a row for each: start and length, bytes.
    """
    pairs = np.asarray(ranges, ">u8").reshape(-1, 2)
    head = b"\0" + counted(block) + b"\0"
    for first in range(0, len(pairs), _DISCARDS):
        part = pairs[first : first + _DISCARDS]
        yield command(CommandNumber.POSTCOPY_RAM_DISCARD, head + part.tobytes())


def read_advise(data: Buffer, at: int = 0) -> Advice | None:
    """Read what is in ADVISE.

    :param at: where ``data`` is, for the error, as in what follows.
    :raises StreamError: it is nothing that ADVISE has.
    """
    if not len(data):
        return None
    if len(data) != _ADVICE.size:
        raise StreamError(at, "no data or 16 bytes in POSTCOPY_ADVISE", f"{len(data)}")
    return Advice(*_ADVICE.unpack(data))


def read_discard(data: Buffer, at: int = 0) -> Discard:
    """Read what is in RAM_DISCARD.

    :raises StreamError: it is nothing that it has.
    """
    if len(data) < 2 or data[0] != 0:
        raise StreamError(at, "version 0 of POSTCOPY_RAM_DISCARD", _shown(data[:1]))
    end = 2 + data[1]
    name = read_counted(data[1:end], at + 1)
    if bytes(data[end : end + 1]) != b"\0":
        raise StreamError(at + end, "a zero behind the block's name", _shown(data[end : end + 1]))
    ranges = data[end + 1 :]
    if not len(ranges) or len(ranges) % 16:
        raise StreamError(at + end + 1, "pairs of start and length", f"{len(ranges)} bytes")
    pairs = np.frombuffer(ranges, ">u8").reshape(-1, 2).astype(np.uint64)
    if (wrong := pairs[:, 0] + pairs[:, 1] < pairs[:, 0]).any():
        row = int(wrong.argmax())
        raise StreamError(
            at + end + 1 + 16 * row,
            "a range within 64 bits",
            f"{int(pairs[row, 1])} bytes from {int(pairs[row, 0])}",
        )
    return Discard(name, pairs)


def read_packaged(data: Buffer, at: int = 0) -> int:
    """Return how many bytes of a package follow.

    :raises StreamError: it is nothing that PACKAGED has.
    """
    if len(data) != 4:
        raise StreamError(at, "4 bytes in PACKAGED", f"{len(data)}")
    return int.from_bytes(data, "big")


def read_recv_bitmap(data: Buffer, at: int = 0) -> str:
    """Return the name of the block that RECV_BITMAP asks about.

    :raises StreamError: it is nothing that RECV_BITMAP has.
    """
    return read_counted(data, at)


def _shown(data: Buffer) -> str:
    return f"0x{bytes(data).hex()}" if len(data) else "nothing"
