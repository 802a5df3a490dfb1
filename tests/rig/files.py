"""A guest that is saved into a file by one daemon, and restored from it by another."""

from __future__ import annotations

import os
import subprocess
from typing import Any
from unittest import SkipTest

from tests.rig.daemons import Daemon
from tests.rig.pair import NAME, Pair, PairCase

__all__ = ["FileCase", "small_disk"]

#: Bytes a second: so few that a save is not over before something was done about it.
SLOWLY = 1 << 20


def small_disk(directory: str, size: str) -> list[str]:
    """Return what a command line begins with to find a small tmpfs in a directory.

    Nobody else sees it: it is mounted in a namespace of the command's own.

    :raises SkipTest: this user may have none; under ``CI`` the test goes on and fails.
    """
    own = [] if os.geteuid() == 0 else ["--map-root-user"]
    tried = subprocess.run(["unshare", "--mount", *own, "true"], capture_output=True, check=False)
    if tried.returncode and not os.environ.get("CI"):
        raise SkipTest(f"No namespace for a disk of its own: {tried.stderr.decode().strip()}")
    script = f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    return ["unshare", "--mount", *own, "--", "sh", "-c", script, directory]


class FileCase(PairCase):
    """A pair whose source's daemon saves the guest, and whose destination's restores it.

    :ivar path: the file.
    """

    def files(self, source: str, destination: str | None = None, **options: Any) -> Pair:
        """Prepare and start a guest, a QEMU that waits, and their daemons."""
        self.path = os.path.abspath(self.mktemp())
        return self.pair(source, destination, **options).start()

    def begin(self, pair: Pair, command: str, **arguments: Any) -> None:
        """Begin to ``save`` the guest, or to ``restore`` it."""
        daemon = self.side(pair, command)
        pair.listen(daemon)
        arguments = {"guest": NAME, "file": self.path, **arguments}
        pair.id = daemon.execute(command, arguments)["id"]

    def side(self, pair: Pair, command: str) -> Daemon:
        return pair.here if command == "save" else pair.there

    def over(self, pair: Pair, command: str, status: str = "completed") -> dict[str, Any]:
        """Wait for the end, and return what is known of it."""
        entry = pair.ended(self.side(pair, command))
        self.assertEqual(entry["status"], status, entry)
        return entry

    def done(self, pair: Pair, command: str, **arguments: Any) -> dict[str, Any]:
        """Save or restore the guest."""
        self.begin(pair, command, **arguments)
        return self.over(pair, command)

    def failed(self, pair: Pair, command: str, *words: str, **arguments: Any) -> dict[str, Any]:
        """Save or restore the guest, which has to fail, with these words."""
        self.begin(pair, command, **arguments)
        entry = self.over(pair, command, "failed")
        for word in words:
            self.assertIn(word, entry["error"]["desc"])
        return entry

    def left(self) -> list[str]:
        """What there is beside nothing where the file was to be."""
        return sorted(
            name
            for name in os.listdir(os.path.dirname(self.path))
            if name.endswith(".part") or name == os.path.basename(self.path)
        )
