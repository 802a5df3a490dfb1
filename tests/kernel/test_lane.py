"""The lane itself: what a test finds in there."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

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
