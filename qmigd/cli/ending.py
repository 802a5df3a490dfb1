"""How qmigctl ends other than by success: one sentence, or one object, and an exit code."""

from __future__ import annotations

import json
import sys
from contextlib import suppress

from . import render
from .options import Exit

__all__ = ["INTERRUPTED", "Ending", "bug", "fail"]


class Ending(Exception):
    """The end of qmigctl other than by success.

    :ivar code: the exit code.
    :ivar kind: a word for programs.
    :ivar text: a sentence for people; none where nobody is there to read it.
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
    """Say it, and return the exit code.

    On stdout as JSON, but where that cannot be written, or it is what ``error`` is about.
    """
    if as_json and error.kind != "output":
        text = json.dumps({"error": {"class": error.kind, "desc": error.text}}, indent=2)
        with suppress(Ending):
            print(text, flush=True)
            return error.code
    if error.text:
        print(f"qmigctl: {render.clean(error.text)}", file=sys.stderr, flush=True)
    return error.code
