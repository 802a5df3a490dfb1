"""Single values of the configuration: what TOML has is checked and turned into ours.

What is wrong is raised as :class:`BadValue` with the end of a sentence that begins
with the key: ``[daemon] listen`` *must be a list of strings, not a string*.
"""

from __future__ import annotations

import grp
import math
import re
from pathlib import Path
from typing import Any, Literal

from ..errors import ArgumentError
from ..guests.memory.options import MemoryOptions, from_table
from ..interfaces import COPY, MOVERS
from ..negotiation.allow import Allow
from ..negotiation.policy import LEGACY, Legacy
from ..transports.uri import (
    DEFAULT_PORT,
    Door,
    ExecAddress,
    FdAddress,
    InBandAddress,
    UnixAddress,
    bare,
    parse_uri,
)

__all__ = [
    "LISTEN",
    "MEASURE",
    "OFF",
    "PORTS",
    "TLS_POLICIES",
    "BadValue",
    "TlsPolicy",
    "address",
    "allow",
    "door",
    "flag",
    "group",
    "guest_name",
    "kind",
    "launch",
    "legacy",
    "listen",
    "memory",
    "names",
    "path",
    "ports",
    "seconds",
    "source_after",
    "text",
    "texts",
    "tls_policy",
    "unix_path",
    "zero_copy",
]

#: Bytes in a guest's name: what a file name may have.
_GUEST_NAME = 255
#: Seconds in the longest deadline that makes sense.
_DAY = 86400
_PORT = re.compile("[0-9]{1,5}")

TlsPolicy = Literal["off", "prefer", "require"]
TLS_POLICIES: tuple[TlsPolicy, ...] = ("off", "prefer", "require")

#: The ports that are offered where nothing was said: the first of those that
#: RFC 6335 leaves to anybody.
PORTS = "49152-49215"
#: Where a daemon listens where nothing was said.
LISTEN = f"tcp:127.0.0.1:{DEFAULT_PORT}"


#: What ``zero-copy`` can be: the default, another one, and the names of movers.
MEASURE = "measure"
OFF = "off"
_ZERO_COPY = (MEASURE, OFF, *(mover for mover in MOVERS if mover != COPY))


class BadValue(Exception):
    """The value is of no use; the text ends a sentence that began with the key."""


def text(value: Any) -> str:
    """A string with something in it."""
    if not isinstance(value, str):
        raise BadValue(f"must be a string, not {kind(value)}")
    if not value or "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise BadValue("must not be empty, nor contain zero bytes or halves of characters")
    return value


def flag(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise BadValue(f"must be true or false, not {kind(value)}")
    return value


def seconds(value: Any) -> float:
    """A deadline in seconds, whole or with a fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadValue(f"must be a number of seconds, not {kind(value)}")
    if not (math.isfinite(value) and 0 < value <= _DAY):
        raise BadValue(f"must be more than 0 and at most {_DAY} seconds, not {value}")
    return float(value)


def texts(value: Any) -> tuple[str, ...]:
    """A list of strings; it may be empty."""
    if not isinstance(value, list):
        raise BadValue(f"must be a list of strings, not {kind(value)}")
    for element in value:
        if not isinstance(element, str):
            raise BadValue(f"must be a list of strings; {kind(element)} is in it")
        if not element or "\0" in element:
            raise BadValue("must not have an empty string or a zero byte in it")
    return tuple(value)


def names(value: Any) -> tuple[str, ...]:
    """A list of names, each once."""
    names = texts(value)
    for name in names:
        if names.count(name) > 1:
            raise BadValue(f"names '{name}' twice")
    return names


def listen(value: Any) -> tuple[Door | InBandAddress[Door], ...]:
    """A list of addresses to listen on; it may be empty."""
    addresses = tuple(address(uri) for uri in texts(value))
    places = [bare(one) for one in addresses]
    for one in places:
        if places.count(one) > 1:
            raise BadValue(f'has "{one}" twice')
    return addresses


def door(value: Any) -> Door:
    """A place to listen on where there is no handshake."""
    found = address(value)
    if isinstance(found, InBandAddress):
        raise BadValue(
            f'cannot be "{found}": there is no handshake in a plain stream, in-band or other'
        )
    return found


def address(value: Any) -> Door | InBandAddress[Door]:
    """An address to listen on."""
    try:
        address = parse_uri(text(value))
    except ArgumentError as error:
        raise BadValue(f"cannot be used: {error.text.rstrip('.')}") from None
    place = bare(address)
    if isinstance(place, ExecAddress):
        raise BadValue(
            f'cannot be "{address}": a program is what a source connects through, and nobody can '
            f"listen on it; at its far end there is 'qmigctl connect', or a port"
        )
    if isinstance(place, FdAddress):
        raise BadValue(
            'cannot be "fd:", on which nothing can be listened: a management app hands connections '
            "in with the command 'incoming', whatever 'listen' says"
        )
    return InBandAddress(place) if isinstance(address, InBandAddress) else place


def group(value: Any) -> str | None:
    """A group of this host's users, or ``""`` for none."""
    if value == "":
        return None
    name = text(value)
    try:
        grp.getgrnam(name)
    except KeyError:
        raise BadValue(f"names the group '{name}', which does not exist on this host") from None
    return name


def launch(value: Any) -> tuple[str, ...]:
    """A command: a program and its arguments."""
    command = texts(value)
    if not command:
        raise BadValue("must have a program in it")
    if "-incoming" in command:
        raise BadValue("must not have -incoming in it: qmigd adds '-incoming defer' itself")
    return command


def memory(value: Any) -> MemoryOptions:
    """A memory guest."""
    if not isinstance(value, dict):
        raise BadValue(f'must be a table, {{ size = "256M", ... }}, not {kind(value)}')
    try:
        return from_table(value)
    except ArgumentError as error:
        raise BadValue(f"cannot be used: {error.text}") from None


def unix_path(value: Any) -> str:
    """The path in ``unix:/path``."""
    # Looked at first: what else an address can be is of no interest here.
    found = address(value) if text(value).startswith("unix:/") else None
    if not isinstance(found, UnixAddress):
        raise BadValue(f'must be a unix socket with its whole path, "unix:/...", not "{value}"')
    return found.path


def path(value: Any) -> Path:
    """The whole path of a file or a directory."""
    found = Path(text(value))
    if not found.is_absolute():
        raise BadValue(f'must be a whole path, "/...", not "{value}"')
    return found


def ports(value: Any) -> range:
    """A range of ports, ``"FIRST-LAST"``, ``"ONE"``, or ``""`` for none."""
    if not isinstance(value, str):
        raise BadValue(f'must be a string such as "{PORTS}", not {kind(value)}')
    if not value:
        return range(0)
    first, dash, last = (part.strip() for part in value.partition("-"))
    if not dash:
        last = first
    if not (_PORT.fullmatch(first) and _PORT.fullmatch(last)):
        raise BadValue(f'must be two ports such as "{PORTS}", or "" for none, not "{value}"')
    low, high = int(first), int(last)
    if not 1 <= low <= high <= 65535:
        raise BadValue(
            f'must go from a lower port to a higher one between 1 and 65535, not "{value}"'
        )
    return range(low, high + 1)


def source_after(value: Any) -> Literal["keep", "quit"]:
    """What becomes of the source."""
    if value == "keep":
        return "keep"
    if value == "quit":
        return "quit"
    raise BadValue('must be "keep" or "quit"')


def tls_policy(value: Any) -> TlsPolicy:
    """Whether there is TLS."""
    for known in TLS_POLICIES:
        if value == known:
            return known
    raise BadValue('must be "off", "prefer" or "require"')


def legacy(value: Any) -> Legacy:
    """What is done where nobody greets."""
    for known in LEGACY:
        if value == known:
            return known
    raise BadValue('must be "refuse" or "allow"')


def allow(value: Any) -> Allow:
    """Which peers may send guests here: a list, or a table with lists of guests."""
    peers: Any
    if isinstance(value, dict):
        peers = {}
        for peer, guests in value.items():
            try:
                peers[peer] = texts(guests)
            except BadValue as error:
                raise BadValue(f'"{peer}" {error}') from None
    elif isinstance(value, list):
        peers = names(value)
    else:
        raise BadValue(
            f"must be a list of names of peers, or a table from them to lists of guests, not "
            f"{kind(value)}"
        )
    try:
        return Allow.of(peers)
    except ValueError as error:
        raise BadValue(f"cannot be used: {error}") from None


def zero_copy(value: Any) -> str:
    """How a relay moves bytes."""
    if not isinstance(value, str) or value not in _ZERO_COPY:
        words = ", ".join(f'"{word}"' for word in _ZERO_COPY)
        raise BadValue(f"must be one of {words}")
    return value


def guest_name(name: Any) -> str:
    """A guest's name."""
    if name == "":
        raise BadValue("a guest must have a name")
    name = text(name)
    # it becomes part of file names and of lines in the log
    if name in (".", "..") or "/" in name or not name.isprintable() or name != name.strip():
        raise BadValue(
            f"the name {name!r} is of no use: it must be printable, without '/' and "
            f"without a space at either end"
        )
    if len(name.encode()) > _GUEST_NAME:
        raise BadValue(f"the name is longer than {_GUEST_NAME} bytes")
    return str(name)


def kind(value: Any) -> str:
    """Return what a person calls the type of a TOML value."""
    for python, words in (
        (bool, "true or false"),
        (str, "a string"),
        (int, "a whole number"),
        (float, "a number"),
        (list, "a list"),
        (dict, "a table"),
    ):
        if isinstance(value, python):
            return words
    return "a date or time"
