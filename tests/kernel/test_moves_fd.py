"""Connections that were handed over, on a kernel that has vsock and kernel TLS."""

from __future__ import annotations

import socket
import subprocess

from qmigd.transports.handed_over import is_local
from tests.rig.certificates import Authority
from tests.rig.lane import KernelCase
from tests.test_moves_fd import App, FdCase


def vsock_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a vsock connection within this machine."""
    subprocess.run(["modprobe", "vsock_loopback"], check=True)
    with socket.socket(socket.AF_VSOCK) as server:
        server.bind((1, socket.VMADDR_PORT_ANY))  # VMADDR_CID_LOCAL
        server.listen()
        near = socket.socket(socket.AF_VSOCK)
        near.connect((1, server.getsockname()[1]))
        return near, server.accept()[0]


class DescriptorTests(KernelCase, FdCase):
    def test_vsock(self) -> None:
        """The guest crosses vsock connections, in TLS, which the kernel does for TCP only."""
        authority = Authority(self.mktemp())
        pair = self.pair("7.2")
        for daemon in (pair.here, pair.there):
            daemon.config["tls"] = authority.host("host.example").table()
        pair.start()
        app = App(pair)
        pair.begin("relay", "postcopy", uri="fd:", tls_hostname="host.example")
        for channel in ("control", "main"):
            app.asked(channel)
            here, there = vsock_pair()
            self.assertTrue(is_local(here))
            app.take_in(there)
            app.add(pair.here, channel, 0, here)
        plan = pair.completed()["plan"]
        pair.prove_moved()
        self.assertIn("tls", plan["features"])
        (ktls,) = [one for one in plan["left-out"] if one["name"] == "ktls"]
        self.assertEqual("path", ktls["where"])
        self.assertIn("it goes over tcp only", ktls["reason"])
