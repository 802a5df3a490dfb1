"""What a memory guest is made of: from the configuration, and from its command line.

The command line takes QEMU's own words where QEMU has some, so that whatever starts a QEMU
can start this guest: ``-name``, ``-m``, ``-S``, ``-incoming``, ``-qmp``.
"""

from __future__ import annotations

import argparse
import mmap
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmigd.backend import Tunable
from qmigd.errors import ArgumentError
from qmigd.guests.schema import coerce

__all__ = [
    "DEFER",
    "FILLS",
    "PATTERNS",
    "MemoryOptions",
    "Start",
    "from_table",
    "moved_away",
    "moved_note",
    "parse",
]

#: In which order the workload writes pages (:mod:`qmigd.guests.memory.contents`).
PATTERNS = ("sequential", "random")
#: What is in the RAM before the first write: nothing, or noise that cannot be compressed.
FILLS = ("zero", "random")
#: The argument of ``-incoming`` with which it waits to be told where the stream comes from.
DEFER = "defer"

#: Bytes of RAM that are enough for a workload, and more than any host has.
_LEAST, _MOST = 1 << 20, 1 << 46
_RATE_MOST = 1 << 40
#: Makes a guest's UUID out of its name.
_NAMESPACE = uuid.UUID("9d1a4f5e-5a0c-4c55-8d5b-0c8f5b0f3f10")


@dataclass(frozen=True)
class MemoryOptions:
    """A memory guest.

    :ivar size: bytes of RAM.
    :ivar dirty_rate: bytes a second that it writes while it runs.
    :ivar pattern: one of :data:`PATTERNS`.
    :ivar working_set: bytes at the end of the RAM that it writes over and over; ``None``: half
        of it.
    :ivar fill: one of :data:`FILLS`.
    :ivar prealloc: all of its RAM gets its memory when it starts.
    :ivar incoming: it is not started with the daemon: it waits for a guest to come in.
    """

    size: int = 256 << 20
    dirty_rate: int = 16 << 20
    pattern: str = PATTERNS[0]
    working_set: int | None = None
    fill: str = FILLS[0]
    prealloc: bool = False
    incoming: bool = False

    @property
    def window(self) -> int:
        """Bytes that are written, whole pages."""
        size = self.size // 2 if self.working_set is None else self.working_set
        return max(mmap.PAGESIZE, size // mmap.PAGESIZE * mmap.PAGESIZE)

    @property
    def program(self) -> dict[str, Any]:
        """What the workload does, JSON; it moves with the guest."""
        return {
            "dirty-rate": self.dirty_rate,
            "pattern": self.pattern,
            "working-set": self.window,
            "fill": self.fill,
        }

    def with_program(self, program: Mapping[str, Any]) -> MemoryOptions:
        """Return these with what a guest that has come in does.

        :raises ValueError: that is nothing that a workload can do here.
        """
        try:
            return replace(self, **_checked(program, _PROGRAM, self.size))
        except ArgumentError as error:
            raise ValueError(f"its workload cannot go on here: {error.text}") from None

    def argv(self, name: str) -> list[str]:
        """Return the command line that starts it, without ``-incoming`` and ``-qmp``."""
        return [
            *(
                sys.executable,
                "-P",
                "-m",
                "qmigd.guests.memory",
                "-name",
                name,
                "-m",
                f"{self.size >> 10}K",
            ),
            *("-dirty-rate", str(self.dirty_rate), "-pattern", self.pattern),
            *("-working-set", str(self.window), "-fill", self.fill),
            *(("-mem-prealloc",) if self.prealloc else ()),
        ]


@dataclass(frozen=True)
class Start:
    """A command line.

    :ivar qmp: path of the unix socket for QMP.
    :ivar incoming: ``"defer"``, a URI, or ``None``.
    :ivar paused: it does not run by itself (``-S``).
    """

    name: str
    options: MemoryOptions
    qmp: str
    incoming: str | None
    paused: bool
    uuid: uuid.UUID


def _size(name: str, value: Any, least: int, most: int) -> int:
    number: int = coerce(Tunable(name, "int"), value)
    if not least <= number <= most:
        raise ArgumentError(f"{name} cannot be {value}: it has to be from {least} to {most} bytes")
    return number


def _read(name: str, value: Any) -> Any:
    match name:
        case "size":
            size = _size(name, value, _LEAST, _MOST)
            if size % mmap.PAGESIZE:
                raise ArgumentError(
                    f"{name} cannot be {value}: it has to be whole pages of {mmap.PAGESIZE} bytes"
                )
            return size
        case "dirty-rate":
            if isinstance(value, str):
                value = value.strip().removesuffix("/s")
            return _size(name, value, 0, _RATE_MOST)
        case "working-set":
            return _size(name, value, mmap.PAGESIZE, _MOST)
        case "pattern":
            return coerce(Tunable(name, "enum", PATTERNS), value)
        case "fill":
            return coerce(Tunable(name, "enum", FILLS), value)
        case _:
            if not isinstance(value, bool):
                raise ArgumentError(f"{name} must be true or false")
            return value


_PROGRAM = ("dirty-rate", "pattern", "working-set", "fill")
_KEYS = ("size", *_PROGRAM, "prealloc", "incoming")


def _checked(table: Mapping[str, Any], keys: Sequence[str], size: int) -> dict[str, Any]:
    unknown = [name for name in table if name not in keys]
    if unknown:
        raise ArgumentError(f"there is no '{unknown[0]}'; there are {', '.join(keys)}")
    found = {name.replace("-", "_"): _read(name, value) for name, value in table.items()}
    size = found.get("size", size)
    if (window := found.get("working_set")) is not None and window > size:
        raise ArgumentError(f"working-set cannot be more than the size, {size} bytes")
    return found


def from_table(table: Mapping[str, Any]) -> MemoryOptions:
    """Read the configuration's ``memory = { ... }``.

    :raises ArgumentError: something in it is wrong; the text says what would do.
    """
    return MemoryOptions(**_checked(table, _KEYS, MemoryOptions.size))


def parse(argv: Sequence[str]) -> Start:
    """Read a command line.

    :raises SystemExit: it is wrong; what is was printed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m qmigd.guests.memory",
        description="A guest of RAM and a workload, which moves by QEMU's migration stream.",
        allow_abbrev=False,
    )
    parser.add_argument("-name", default="memory", help="what it is called")
    parser.add_argument(
        "-m", dest="size", default="256M", help="RAM, without a suffix in MiB (default: 256M)"
    )
    parser.add_argument("-dirty-rate", default="16M", help="bytes a second that it writes")
    parser.add_argument("-pattern", default=PATTERNS[0], help=" or ".join(PATTERNS))
    parser.add_argument("-working-set", help="bytes that it writes (default: half of the RAM)")
    parser.add_argument("-fill", default=FILLS[0], help=f"at first: {' or '.join(FILLS)}")
    parser.add_argument(
        "-mem-prealloc",
        dest="prealloc",
        action="store_true",
        help="allocate all of its RAM at once",
    )
    parser.add_argument("-uuid", type=uuid.UUID, help="default: made of the name")
    parser.add_argument("-S", dest="paused", action="store_true", help="do not run by itself")
    parser.add_argument("-incoming", help="'defer', or the URI that the guest comes from")
    parser.add_argument("-qmp", required=True, help="unix:PATH,server=on,wait=off")
    given = parser.parse_args(argv)
    table = {
        name: value
        for name in ("size", *_PROGRAM, "prealloc")
        if (value := getattr(given, name.replace("-", "_"))) is not None
    }
    if table["size"].isdigit():  # MiB, as with QEMU
        table["size"] += "M"
    try:
        options = from_table(table)
        path = _socket(given.qmp)
    except ArgumentError as error:
        parser.error(error.text)
    identity = given.uuid or uuid.uuid5(_NAMESPACE, given.name)
    return Start(given.name, options, path, given.incoming, given.paused, identity)


def moved_note(qmp: str) -> Path:
    """Return the file that is there for as long as the guest is elsewhere: it was moved away.

    :param qmp: path of the guest's QMP socket.
    """
    return Path(f"{qmp}.moved")


def moved_away(qmp: str) -> bool:
    """Whether the guest with this QMP socket, ``unix:PATH``, was moved away from here.

    It is not to be started again then: it runs elsewhere.
    """
    return moved_note(qmp.removeprefix("unix:")).exists()


def _socket(value: str) -> str:
    """Return the path in ``unix:PATH,server=on,wait=off``, in which a comma is doubled."""
    path, *_ = value.replace(",,", "\0").split(",")
    if not path.startswith("unix:"):
        raise ArgumentError("-qmp has to be unix:PATH,server=on,wait=off")
    return path.removeprefix("unix:").replace("\0", ",")
