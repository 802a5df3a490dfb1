"""Multipath TCP on a kernel that has it, whatever this host's can."""

from __future__ import annotations

from tests.rig.lane import KernelCase
from tests.test_moves_mptcp import MptcpCase


class MptcpTests(KernelCase, MptcpCase):
    def test_direct(self) -> None:
        """QEMU makes such a connection itself."""
        self.move("7.2", path="direct", mode="precopy", least=2)


class InBandTests(KernelCase, MptcpCase):
    """Where the handshake has its in-band form."""

    in_band = True

    def test_handover(self) -> None:
        """The framing goes over such a connection, and QEMU's stream behind it."""
        self.move("7.2", path="handover", mode="precopy", least=2)
