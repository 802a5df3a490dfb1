"""Where in a TOML text its keys stand, which :mod:`tomllib` does not tell.

This is no second parser: it looks at lines that begin like a header or like a
key, outside strings of several lines, and has tomllib take their names apart.
It serves error messages; a key that it does not find has no line in them.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any

__all__ = ["Key", "find_lines", "syntax_error_line"]

#: The names that lead to a value, outermost first.
Key = tuple[str, ...]

_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
_NAME = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEADER = re.compile(rf"[ \t]*\[\[?[ \t]*({_NAME})[ \t]*\]")
_ASSIGNMENT = re.compile(rf"[ \t]*({_NAME})[ \t]*=")
_TRIPLE = re.compile(r'"""|\'\'\'')


def find_lines(text: str) -> dict[Key, int]:
    """Return the line, from 1, on which each key or table first stands."""
    lines: dict[Key, int] = {}
    table: Key = ()
    inside: str | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if inside is None:
            if header := _HEADER.match(line):
                table = _split(header[1])
                lines.setdefault(table, number)
            elif assignment := _ASSIGNMENT.match(line):
                key = table + _split(assignment[1])
                lines.setdefault(key, number)
        for quotes in _TRIPLE.findall(line):
            if inside is None:
                inside = quotes
            elif inside == quotes:
                inside = None
    return lines


def syntax_error_line(error: tomllib.TOMLDecodeError) -> int | None:
    """Return the line that tomllib has in its error's text, if it has one."""
    found = re.search(r"at line (\d+)", str(error))
    return int(found[1]) if found else None


def _split(name: str) -> Key:
    try:
        value: Any = tomllib.loads(f"{name} = 0")
    except tomllib.TOMLDecodeError:
        return (name,)
    key: list[str] = []
    while isinstance(value, dict):
        ((part, value),) = value.items()
        key.append(part)
    return tuple(key)
