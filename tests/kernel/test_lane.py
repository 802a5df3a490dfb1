"""The lane itself: what a test finds in there."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from tests.rig.inside import answer
from tests.rig.lane import KernelCase


class LaneTests(KernelCase):
    def test_kernel(self) -> None:
        """The tests run on a kernel of Debian's, as root, on the working tree."""
        self.assertIn("Debian", os.uname().version)
        self.assertEqual(os.geteuid(), 0)
        self.assertTrue(Path(__file__).parents[2].joinpath("Makefile").exists())

    def test_loopback(self) -> None:
        """There is a loopback interface."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname()).close()

    def test_temporary(self) -> None:
        """What is written in there is written to RAM."""
        with tempfile.NamedTemporaryFile() as file:
            mounts = Path("/proc/self/mounts").read_text()
            self.assertTrue(file.name.startswith("/tmp/"))
            self.assertIn(" /tmp tmpfs ", mounts)


class CallTests(SynchronousTestCase):
    """A function that is to be called in the lane."""

    def call(self, name: str, *arguments: object) -> dict[str, Any]:
        return answer({"call": {"name": name, "arguments": [*arguments]}})

    def test_value(self) -> None:
        """What it returns comes back."""
        found = self.call("os.path.join", "a", "b")
        self.assertEqual((found["kind"], found["value"]), ("success", "a/b"))

    def test_failure(self) -> None:
        """If it fails, its traceback does."""
        found = self.call("os.listdir", "/nowhere")
        self.assertEqual(found["kind"], "error")
        self.assertIn("FileNotFoundError", found["text"])
