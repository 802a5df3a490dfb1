"""The journal: what survives the daemon's death."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qmigd.daemon.journal import FileJournal
from qmigd.errors import MigrationError


def _entry(stage: str) -> dict[str, Any]:
    return {"guest": "vm", "qmp": "unix:/qmp", "peer": "tcp:host:1", "stage": stage}


class JournalTests(SynchronousTestCase):
    """What is written, and what a daemon finds that is started again."""

    def setUp(self) -> None:
        self.directory = Path(self.mktemp())
        self.journal = FileJournal(self.directory)
        self.addCleanup(self.journal.close)

    def stages(self) -> dict[tuple[str, str], str]:
        """What the next daemon finds."""
        found = FileJournal(self.directory).entries()
        return {(migration, role): entry["stage"] for migration, role, entry in found}

    def file(self) -> Path:
        return self.directory / "1.source.jsonl"

    def test_last_one_counts(self) -> None:
        """What was put down last counts, for each migration and role by itself."""
        for stage in ("started", "released"):
            self.journal.write("1", "source", _entry(stage))
        self.journal.write("1", "destination", _entry("prepared"))
        self.assertEqual(
            self.stages(), {("1", "source"): "released", ("1", "destination"): "prepared"}
        )

    def test_forget(self) -> None:
        """What has ended is gone, and its descriptor as well; it may begin anew."""
        before = os.listdir("/proc/self/fd")
        for _ in range(2):
            self.journal.write("1", "source", _entry("started"))
            self.journal.forget("1", "source")
            self.assertEqual(os.listdir(self.directory), [])
        self.journal.forget("1", "source")
        self.assertEqual(os.listdir("/proc/self/fd"), before)

    def test_closed(self) -> None:
        """Once the daemon is being stopped, what seems to end is left to the next one."""
        self.journal.write("1", "source", _entry("released"))
        self.journal.close()
        self.journal.write("1", "source", _entry("started"))
        self.journal.forget("1", "source")
        self.assertEqual(self.stages(), {("1", "source"): "released"})

    def test_forget_what_an_earlier_daemon_wrote(self) -> None:
        """An entry need not be this daemon's own."""
        self.journal.write("1", "source", _entry("started"))
        FileJournal(self.directory).forget("1", "source")
        self.assertEqual(self.stages(), {})

    def test_cut_short(self) -> None:
        """A line that was cut short does not count, nor does it spoil the next one."""
        self.journal.write("1", "source", _entry("started"))
        whole = self.file().read_bytes()
        self.journal.write("1", "source", _entry("released"))
        second = self.file().read_bytes()[len(whole) :]
        for length in range(len(second)):
            self.file().write_bytes(whole + second[:length])
            expected = "started" if length < len(second) else "released"
            self.assertEqual(self.stages(), {("1", "source"): expected}, length)
            self.file().write_bytes(whole + second[:length] + second)
            self.assertEqual(self.stages(), {("1", "source"): "released"}, length)

    def test_no_room(self) -> None:
        """Where there is no room it is said so, and what was known before still is."""
        self.journal.write("1", "source", _entry("started"))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        for room in (0, 20):
            size = self.file().stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, limits[1]))
            try:
                error = self.assertRaises(
                    MigrationError, self.journal.write, "1", "source", _entry("released")
                )
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            self.assertIn("put down how far this migration is", str(error))
            self.assertEqual(self.stages(), {("1", "source"): "started"})
        self.journal.write("1", "source", _entry("released"))
        self.assertEqual(self.stages(), {("1", "source"): "released"})

    def test_no_directory(self) -> None:
        """A directory that is gone is an error with its name."""
        self.directory.rmdir()
        error = self.assertRaises(MigrationError, self.journal.write, "1", "source", _entry("x"))
        self.assertIn(str(self.directory), str(error))

    def test_nonsense(self) -> None:
        """What cannot be read is passed over, with a line in the log."""
        for text in ("", "{}\n", "[]\n", "nonsense\n", '{"migration": "1", "role": "source"}\n'):
            self.file().write_text(text)
            self.assertEqual(self.stages(), {})
