"""What the daemon has to remember of a running migration in case it dies.

One small JSON file a migration and role in ``STATE-DIR/migrations``, replaced in one
go and gone when the migration has ended.  It protects against the daemon's death,
not the host's, which takes the QEMUs along; so nothing is synced to the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twisted.logger import Logger

__all__ = ["FileJournal"]

log = Logger()


class FileJournal:
    """The journal in a directory of its own, which is made if need be.

    :raises OSError: it cannot be made or written.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, migration: str, role: str, entry: Mapping[str, Any]) -> None:
        """Put down, or replace, what is known of a migration."""
        path = self._path(migration, role)
        fresh = path.with_suffix(".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            # In one go: what dump() does by the piece takes four times as long.
            file.write(json.dumps({"migration": migration, "role": role, **entry}).encode())
        os.replace(fresh, path)

    def forget(self, migration: str, role: str) -> None:
        """The migration has ended."""
        self._path(migration, role).unlink(missing_ok=True)

    def entries(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Give id, role and entry of each migration that was not forgotten."""
        for path in sorted(self._directory.glob("*.json")):
            try:
                entry = json.loads(path.read_text(encoding="utf-8"))
                found = entry["migration"], entry["role"], entry
                assert all(isinstance(entry[key], str) for key in ("guest", "qmp", "peer", "stage"))
            except (OSError, ValueError, KeyError, TypeError, AssertionError):
                log.warn("the journal's {name} cannot be read and is passed over", name=path.name)
                continue
            yield found

    def _path(self, migration: str, role: str) -> Path:
        return self._directory / f"{migration}.{role}.json"
