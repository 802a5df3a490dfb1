"""Checks a value against its declaration, and says what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ArgumentError
from .declare import Builtin, Command, Enum, ListOf, Member, Struct, Type

__all__ = ["check_arguments", "mismatch", "nearest"]

_PYTHON: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "int": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "value": (object,),
}


def mismatch(type: Type, value: Any, where: str) -> str | None:
    """Say what keeps ``value`` from being of ``type``; ``None`` if nothing does.

    :param where: what the value is called in the sentence, ``"'uri'"``.
    """
    if isinstance(type, Builtin):
        # bool is an int to Python, and is none to anybody else
        fits = isinstance(value, _PYTHON[type.json]) and (
            type.json in ("boolean", "value") or not isinstance(value, bool)
        )
    elif isinstance(type, Enum):
        fits = isinstance(value, str) and value in type.values
    elif isinstance(type, ListOf):
        fits = isinstance(value, list)
    else:
        fits = isinstance(value, dict)
    if not fits:
        return f"{where} must be {type.words}, not {_words(type, value)}"
    if isinstance(type, ListOf):
        for index, element in enumerate(value):
            if problem := mismatch(type.element, element, f"{where}[{index}]"):
                return problem
    if isinstance(type, Struct):
        return _mismatched_members(type.members, value, where, type.open)
    return None


def _mismatched_members(
    members: tuple[Member, ...], value: dict[str, Any], where: str, open: bool
) -> str | None:
    declared = {member.name: member for member in members}
    for name, content in value.items():
        if name in declared:
            if problem := mismatch(declared[name].type, content, f"{where}.{name}"):
                return problem
        elif not open:
            return f"{where} has no member '{name}'{nearest(name, declared)}"
    for member in members:
        if not member.optional and member.name not in value:
            return f"{where} lacks the member '{member.name}'"
    return None


def _words(type: Type, value: Any) -> str:
    if isinstance(type, Enum) and isinstance(value, str):
        return f"'{value}'"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    for python, words in (
        (str, "a string"),
        (int, "an integer"),
        (float, "a number with a fraction"),
        (list, "a list"),
        (dict, "an object"),
    ):
        if isinstance(value, python):
            return words
    return f"a {value.__class__.__name__}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x' or 'y'?"`` for a misspelt name, or ``""``."""

    def likeness(word: str) -> float:
        return difflib.SequenceMatcher(None, word, name).ratio()

    found = difflib.get_close_matches(name, list(known), n=2, cutoff=0.7)
    if not found:
        return ""
    # the second only where it is no worse a guess
    close = [word for word in found if likeness(word) > likeness(found[0]) - 0.1]
    return "; did you mean " + " or ".join(f"'{word}'" for word in close) + "?"


def check_arguments(command: Command, arguments: Mapping[str, Any]) -> None:
    """Check what a client gave against what ``command`` takes.

    :raises ArgumentError: an argument is unknown, missing, or of a wrong type;
        the text names it.
    """
    declared = {member.name: member for member in command.arguments}
    for name, value in arguments.items():
        if name not in declared:
            others = nearest(name, declared) or (
                f"; it takes {', '.join(repr(known) for known in declared)}."
                if declared
                else "; it takes none."
            )
            raise ArgumentError(f"{command.name} has no argument '{name}'{others}")
        if problem := mismatch(declared[name].type, value, f"'{name}'"):
            raise ArgumentError(f"{command.name}: {problem}.")
    for member in command.arguments:
        if not member.optional and member.name not in arguments:
            raise ArgumentError(f"{command.name} needs the argument '{member.name}': {member.help}")
