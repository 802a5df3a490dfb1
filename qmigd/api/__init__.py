"""The management commands and events, each declared once.

From these declarations come the daemon's argument checks, ``query-commands``
and ``query-qmp-schema``, the help of ``qmigctl``, and the reference page of
the documentation.  A command that is not here does not exist; one that is here
and has no handler keeps the daemon from starting.

Nothing in this package does I/O: the daemon and its client both stand on it.
"""

from __future__ import annotations

from .check import check_arguments, mismatch, nearest
from .commands import COMMANDS, command
from .declare import (
    ANY,
    BOOL,
    DICT,
    INT,
    NUMBER,
    STR,
    Builtin,
    Command,
    Enum,
    Event,
    ListOf,
    Member,
    Struct,
    Type,
)
from .events import EVENTS
from .schema import schema, structs
from .where import SOCKET_VARIABLE, default_socket, is_qmigd, package

__all__ = [
    "ANY",
    "BOOL",
    "COMMANDS",
    "DICT",
    "EVENTS",
    "INT",
    "NUMBER",
    "SOCKET_VARIABLE",
    "STR",
    "Builtin",
    "Command",
    "Enum",
    "Event",
    "ListOf",
    "Member",
    "Struct",
    "Type",
    "check_arguments",
    "command",
    "default_socket",
    "is_qmigd",
    "mismatch",
    "nearest",
    "package",
    "schema",
    "structs",
]
