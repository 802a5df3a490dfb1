"""vsock, by the loopback that a kernel can have (CID 1), between two daemons of one machine."""

from __future__ import annotations

import subprocess

from tests.rig.lane import KernelCase
from tests.test_moves_journeys import JourneyCase


class VsockTests(KernelCase, JourneyCase):
    def test_paths(self) -> None:
        """QEMU connects to the other one by vsock itself, and takes a socket of it."""
        subprocess.run(["modprobe", "vsock_loopback"], check=True)
        self.journey(
            {"precopy": "direct", "postcopy": "handover"},
            *("precopy", "postcopy"),
            by=("10.0", "10.0"),
            daemons=(
                self.daemon("one qmigd", listen=["vsock:1:7000"]),
                self.daemon("other qmigd", listen=["vsock:1:7001"]),
            ),
        )
