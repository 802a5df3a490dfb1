"""What a declaration of a command or an event is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ANY",
    "BOOL",
    "DICT",
    "INT",
    "NUMBER",
    "STR",
    "Builtin",
    "Command",
    "Enum",
    "Event",
    "ListOf",
    "Member",
    "Struct",
    "Type",
]


@dataclass(frozen=True)
class Builtin:
    """A type that JSON has; ``json`` is its name in QEMU's ``JSONType``."""

    name: str
    json: Literal["string", "int", "number", "boolean", "object", "value"]
    #: What a person calls it.
    words: str


@dataclass(frozen=True)
class Enum:
    """A string out of ``values``."""

    name: str
    values: tuple[str, ...]

    @property
    def words(self) -> str:
        return "one of " + ", ".join(f"'{value}'" for value in self.values)


@dataclass(frozen=True)
class ListOf:
    """A list of elements of one type."""

    element: Type

    @property
    def name(self) -> str:
        return f"[{self.element.name}]"

    @property
    def words(self) -> str:
        return "a list"


@dataclass(frozen=True)
class Struct:
    """An object with named members.

    :ivar open: there may be members beside the declared ones.
    """

    name: str
    help: str
    members: tuple[Member, ...]
    open: bool = False
    words = "an object"


Type = Builtin | Enum | ListOf | Struct


@dataclass(frozen=True)
class Member:
    """An argument of a command, or a member of an object."""

    name: str
    type: Type
    help: str
    optional: bool = False


@dataclass(frozen=True)
class Command:
    """A management command.

    :ivar help: the first line says what it does; the rest teaches.
    :ivar returns: the type of the answer, ``None`` for the empty object.
    :ivar errors: code (:mod:`qmigd.errors`) and when it comes.  ``argument``
        is not listed: every command that takes arguments has it.
    :ivar since: the version of qmigd that brought it.
    :ivar descriptors: it works with the file descriptors that the client has sent.
    """

    name: str
    help: str
    arguments: tuple[Member, ...] = ()
    returns: Type | None = None
    errors: tuple[tuple[str, str], ...] = ()
    since: str = "0.1"
    descriptors: bool = False


@dataclass(frozen=True)
class Event:
    """Something that the daemon tells every management client."""

    name: str
    help: str
    data: tuple[Member, ...]
    since: str = "0.1"


STR = Builtin("str", "string", "a string")
INT = Builtin("int", "int", "an integer")
NUMBER = Builtin("number", "number", "a number")
BOOL = Builtin("bool", "boolean", "true or false")
#: An object whose members depend on the guest's QEMU or on the features.
DICT = Builtin("dict", "object", "an object")
ANY = Builtin("any", "value", "any value")
