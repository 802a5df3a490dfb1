"""Where qmigctl writes to, which may be closed, full, or read by nobody.

Whoever starts qmigctl with its output closed does not want to have it: that is no reason to
fail.  An output that cannot be written to is one, whatever the command has done: nobody
would hear of it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, TypeVar

from .ending import Ending
from .options import Exit

__all__ = ["prepare", "write"]

T = TypeVar("T")


def prepare() -> None:
    """Make standard input, output and error fit for use; to be called once, before all else."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # Or the next thing that is opened would get its number: this one does, as the lowest.
            os.open(os.devnull, os.O_RDWR)
    # Python has nothing in place of those that were closed.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    for name, descriptor, kind in (("stdout", 1, _Output), ("stderr", 2, _Errors)):
        stream = getattr(sys, name) or open(descriptor, "w", closefd=False)  # noqa: SIM115
        # a guest's name that the terminal cannot show is no reason to fail
        stream.reconfigure(errors="replace")
        setattr(sys, name, kind(stream))


def write(out: TextIO, text: str) -> None:
    """Write a text and a line's end, now."""
    out.write(f"{text}\n")
    out.flush()


class _Output:
    """A text stream; one that cannot be written to ends qmigctl, once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self._stream.write(text), 0)

    def flush(self) -> None:
        self._try(self._stream.flush, None)

    def _try(self, act: Callable[[], T], otherwise: T) -> T:
        try:
            return act()
        except OSError as error:
            # What is left of it goes nowhere, and is not tried again as Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self.failed(error)
            return otherwise

    def failed(self, error: OSError) -> None:
        """:raises Ending: always; it has nothing to say where the reader has gone."""
        text = ""
        if not isinstance(error, BrokenPipeError):
            text = f"The output could not be written: {error.strerror}."
        raise Ending(Exit.UNKNOWN, "output", text) from None


class _Errors(_Output):
    """Standard error: where it cannot be written to, there is nowhere to say so."""

    def failed(self, error: OSError) -> None:
        """Go on; the exit code tells."""
