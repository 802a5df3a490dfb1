"""vsock, by the loopback that a kernel can have (CID 1), between two daemons of one machine."""

from __future__ import annotations

import subprocess

from tests.rig.certificates import Authority
from tests.rig.lane import KernelCase
from tests.rig.pair import Pair, PairCase


class VsockTests(KernelCase, PairCase):
    def vsock_pair(self, label: str, port: int) -> Pair:
        subprocess.run(["modprobe", "vsock_loopback"], check=True)
        form = "in-band:" if self.in_band else ""
        return self.pair(label, there={"listen": [f"{form}vsock:1:{port}"]})

    def test_direct(self) -> None:
        """QEMU connects to the other one by vsock itself."""
        pair = self.vsock_pair("10.0", 7000).start()
        pair.move("direct")
        pair.prove_moved()

    def test_tls(self) -> None:
        """Channels are relayed in TLS, which the kernel is not asked to do: it can for TCP only.

        The handshake has its in-band form here.
        """
        self.in_band = True
        authority = Authority(self.mktemp())
        pair = self.vsock_pair("7.2", 7001)
        for daemon, name in ((pair.here, "hosta.example"), (pair.there, "hostb.example")):
            daemon.config["tls"] = authority.host(name).table()
        plan = pair.start().move("relay", tls_hostname="hostb.example")["plan"]
        pair.prove_moved()
        self.assertIn("tls", plan["features"])
        [reason] = [one["reason"] for one in plan["left-out"] if one["name"] == "ktls"]
        self.assertIn("it goes over tcp only, and the peer is reached over vsock", reason)
