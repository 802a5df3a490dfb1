"""What a daemon finds out about its host."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from qmigd.daemon.host import gather, rdma_devices


class GatherTests(SynchronousTestCase):
    def test_kernel(self) -> None:
        """CPUs, the kernel's release, and what it allows TCP sockets."""
        host = gather()
        self.assertEqual(host.cpus, len(os.sched_getaffinity(0)))
        self.assertEqual(host.kernel, os.uname().release)
        wmem = Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()
        self.assertEqual(host.tcp_send_buffer, int(wmem[2]))

    def test_zero_copy(self) -> None:
        """The answer is that of a TCP socket of this test's own."""
        with socket.socket() as sock:
            try:
                sock.setsockopt(socket.SOL_SOCKET, 60, 1)
                taken = True
            except OSError:
                taken = False
        self.assertIs(gather().zero_copy_sockets, taken)


class RdmaTests(SynchronousTestCase):
    """The devices, out of a tree like the one in /sys."""

    def setUp(self) -> None:
        self.root = Path(self.mktemp())
        self.devices, self.network = self.root / "infiniband", self.root / "net"

    def device(self, name: str, state: str, *interfaces: str) -> None:
        """Make a device with one port, whose GIDs belong to these network interfaces."""
        port = self.devices / name / "ports" / "1"
        (port / "gid_attrs" / "ndevs").mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        for index, interface in enumerate(interfaces):
            (port / "gid_attrs" / "ndevs" / str(index)).write_text(f"{interface}\n")

    def found(self) -> dict[str, tuple[str, ...]]:
        return {one.name: one.addresses for one in rdma_devices(self.devices, self.network)}

    def test_none(self) -> None:
        """A kernel without RDMA has no such folder."""
        self.assertEqual(self.found(), {})

    def test_addresses_of_the_interfaces(self) -> None:
        """A device serves the addresses of the interfaces of its GIDs, each interface once."""
        self.device("rxe0", "4: ACTIVE", "lo", "lo", "there-is-no-such-interface")
        (addresses,) = self.found().values()
        self.assertEqual(addresses[0], "127.0.0.1/8")
        self.assertEqual(len(set(addresses)), len(addresses))

    def test_ip_over_infiniband(self) -> None:
        """Where the GIDs belong to no interface, those whose parent the device is count."""
        self.device("ib0", "4: ACTIVE")
        (self.network / "lo" / "device" / "infiniband" / "ib0").mkdir(parents=True)
        (self.network / "lo2" / "device" / "infiniband" / "ib1").mkdir(parents=True)
        self.assertIn("127.0.0.1/8", self.found()["ib0"])

    def test_port_that_is_down(self) -> None:
        """A device whose ports are all down does not count."""
        self.device("rxe0", "1: DOWN", "lo")
        self.assertEqual(self.found(), {})
