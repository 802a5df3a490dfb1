"""QEMU's own RDMA over the lane's soft RoCE: what a move by RDMA can be built on."""

from __future__ import annotations

import subprocess

from tests.rig.bootsector import Program
from tests.rig.lane import KernelCase
from tests.rig.pair import PairCase, same_ram
from tests.rig.proofs import counted_without_a_gap, only_one_runs
from tests.rig.rdma import DEVICE, require, soft_roce


class DeviceTests(KernelCase):
    def test_device(self) -> None:
        """There is an RDMA device, which is up, on the network device with the address."""
        soft_roce()
        shown = subprocess.run(["rdma", "link"], capture_output=True, text=True, check=True).stdout
        self.assertIn(f"link {DEVICE}/1 state ACTIVE", shown)


class QemuTests(KernelCase, PairCase):
    def move(self, label: str, *capabilities: str) -> None:
        """Move a guest by RDMA, and check that it has gone over whole."""
        require(label)
        address = soft_roce()
        source, destination = self.two_guests(label, program=Program(pages=256, pages_per_tick=2))
        for guest in (source, destination):
            guest.start()
            guest.set_capabilities("events", *capabilities)
        source.qmp("migrate-set-parameters", downtime_limit=60_000)
        destination.qmp("migrate-incoming", uri=f"rdma:{address}:16517")
        source.qmp("migrate", uri=f"rdma:{address}:16517")
        for guest in (source, destination):
            self.assertEqual(guest.wait_migration("completed", "failed"), "completed")
        destination.wait_running()
        with destination.stopped():
            same_ram(source, destination)
        only_one_runs(destination, source)
        counted_without_a_gap(source, destination)
        destination.check_ram()

    def test_7_2(self) -> None:
        """QEMU 7.2, which registers memory as it goes."""
        self.move("7.2")

    def test_7_2_pinned(self) -> None:
        """QEMU 7.2, with all of the guest's memory registered at once."""
        self.move("7.2", "rdma-pin-all")

    def test_10_0(self) -> None:
        """QEMU 10.0."""
        self.move("10.0")

    def test_10_0_pinned(self) -> None:
        """QEMU 10.0, with all of the guest's memory registered at once."""
        self.move("10.0", "rdma-pin-all")

    def test_11(self) -> None:
        """QEMU 11."""
        self.move("11")

    def test_11_pinned(self) -> None:
        """QEMU 11, with all of the guest's memory registered at once."""
        self.move("11", "rdma-pin-all")
