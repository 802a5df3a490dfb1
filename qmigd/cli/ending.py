"""How qmigctl ends other than by success: one sentence, or one object, and an exit code."""

from __future__ import annotations

import json
import os
import sys
from typing import TextIO

from . import render
from .options import Exit

__all__ = ["INTERRUPTED", "Ending", "bug", "fail", "unread", "write"]


def write(out: TextIO, text: str) -> None:
    """Write a text and a line's end, now."""
    out.write(f"{text}\n")
    out.flush()


class Ending(Exception):
    """The end of qmigctl other than by success.

    :ivar code: the exit code.
    :ivar kind: a word for programs.
    :ivar text: a sentence for people.
    """

    def __init__(self, code: Exit, kind: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.kind = kind
        self.text = text


INTERRUPTED = Ending(
    Exit.UNKNOWN,
    "interrupted",
    "Interrupted before qmigd had answered; whether it did what was asked is not known.",
)


def bug(error: Exception) -> Ending:
    """Return the end that an error of qmigctl's own comes to."""
    return Ending(Exit.BUG, "internal", f"An error inside qmigctl, {type(error).__name__}: {error}")


def fail(error: Ending, as_json: bool) -> Exit:
    """Say it, and return the exit code."""
    if as_json:
        write(
            sys.stdout, json.dumps({"error": {"class": error.kind, "desc": error.text}}, indent=2)
        )
    else:
        write(sys.stderr, f"qmigctl: {render.clean(error.text)}")
    return error.code


def unread() -> Exit:
    """End where whoever read the output has gone."""
    # Python must not find that out once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Exit.UNKNOWN
