"""What the daemon has to remember of a running migration in case it dies.

One small file a migration and role in ``STATE-DIR/migrations``, gone when the migration
has ended.  Each line is all that there is to know, as JSON, and the last whole one counts:
what is put down is one write to a file that is open, a tenth of the time that a new file
takes, and both sides wait for it.  It protects against the daemon's death, not the host's,
which takes the QEMUs along; so nothing is synced to the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twisted.logger import Logger

from ..errors import MigrationError

__all__ = ["FileJournal"]

log = Logger()


class FileJournal:
    """The journal in a directory of its own, which is made if need be.

    :raises OSError: it cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open: dict[Path, int] = {}
        self._closed = False
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, migration: str, role: str, entry: Mapping[str, Any]) -> None:
        """Put down, or replace, what is known of a migration.

        :raises MigrationError: it cannot be written, and what was known before still is.
        """
        if self._closed:
            return
        path = self._path(migration, role)
        # The line's end comes first as well: there may be the half of one that found no room.
        line = f"\n{json.dumps({'migration': migration, 'role': role, **entry})}\n".encode()
        try:
            if path not in self._open:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                self._open[path] = os.open(path, flags, 0o600)
            if os.write(self._open[path], line) < len(line):
                raise OSError(0, "there is no room left")
        except OSError as error:
            raise MigrationError(
                f"qmigd cannot put down how far this migration is, and so does not go on with it: "
                f"{error.strerror} ({path})"
            ) from None

    def forget(self, migration: str, role: str) -> None:
        """The migration has ended."""
        if self._closed:
            return
        path = self._path(migration, role)
        if path in self._open:
            os.close(self._open.pop(path))
        path.unlink(missing_ok=True)

    def close(self) -> None:
        """Write and forget nothing more: what is there is for the daemon that comes next."""
        self._closed = True
        while self._open:
            os.close(self._open.popitem()[1])

    def entries(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Give id, role and entry of each migration that was not forgotten."""
        for path in sorted(self._directory.glob("*.jsonl")):
            try:
                entry = _last(path.read_text(encoding="utf-8"))
                found = entry["migration"], entry["role"], entry
                assert all(isinstance(entry[key], str) for key in ("guest", "qmp", "peer", "stage"))
            except (OSError, ValueError, KeyError, TypeError, AssertionError):
                log.warn("the journal's {name} cannot be read and is passed over", name=path.name)
                continue
            yield found

    def _path(self, migration: str, role: str) -> Path:
        return self._directory / f"{migration}.{role}.jsonl"


def _last(text: str) -> dict[str, Any]:
    """Return what the last whole line says.

    :raises ValueError: there is none.
    """
    for line in reversed(text.split("\n")[:-1]):
        if line.strip():
            try:
                entry: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            return entry
    raise ValueError("no whole line")
