"""Processes that somebody else has started, found by a word on their command lines."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["processes_with"]


def processes_with(word: str) -> dict[int, str]:
    """Return the command lines, by process, that have ``word`` in them; not this process's."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        # One that has just ended.
        with contextlib.suppress(OSError):
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if word in line and int(folder.name) != os.getpid():
                found[int(folder.name)] = line
    return found
