"""vsock, by the loopback that a kernel can have (CID 1), between two daemons of one machine."""

from __future__ import annotations

import itertools
import subprocess

from tests.rig.lane import KernelCase
from tests.rig.pair import PairCase

_ports = itertools.count(7000)


class VsockTests(KernelCase, PairCase):
    """Guests that go over vsock."""

    def setUp(self) -> None:
        subprocess.run(["modprobe", "vsock_loopback"], check=True)

    def test_direct(self) -> None:
        """QEMU 7.2 and 11 connect to each other by vsock, with several channels."""
        pair = self.pair("7.2", "11", there={"listen": [f"vsock:1:{next(_ports)}"]}).start()
        plan = pair.move("direct", "multifd")["plan"]
        pair.prove_moved()
        [reason] = [one["reason"] for one in plan["left-out"] if one["name"] == "zero-copy-send"]
        self.assertIn("it goes over tcp only, and the peer is reached over vsock", reason)

    def test_handover(self) -> None:
        """A socket is handed over; where nobody listens, that is said, and the guest goes on."""
        pair = self.pair("10.0", there={"listen": [f"vsock:1:{next(_ports)}"]}).start()
        pair.begin("handover", uri="vsock:1:6000")
        self.assertIn("no qmigd can be reached at vsock:1:6000: ", pair.failed(pair.here))
        pair.prove_stayed()
        pair.move("handover")
        pair.prove_moved()
