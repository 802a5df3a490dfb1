"""RDMA of the memory guest, as far as it can be seen without a device."""

from __future__ import annotations

import socket
import uuid
from pathlib import Path
from unittest import SkipTest

import numpy as np
from twisted.internet import reactor
from twisted.trial.unittest import SynchronousTestCase, TestCase

from qmigd.guests.memory import roce
from qmigd.guests.memory.channels import Channel, Lost
from qmigd.guests.memory.pairing import (
    Endpoint,
    Hello,
    Kind,
    Message,
    Role,
    hear,
    piece_size,
    say,
)
from qmigd.guests.memory.ram import PAGE, Ram
from qmigd.guests.qemu import QemuGuest
from qmigd.interfaces import No
from tests.rig.memory import MemoryGuest
from tests.rig.qmp import QmpError

_GID = "0000:0000:0000:0000:0000:ffff:c000:0201"
_END = Endpoint(qpn=0x123456, psn=0xFFFFFF, gid=bytes(range(16)), mtu=5)


class DeviceTests(SynchronousTestCase):
    """What sysfs has of devices."""

    def setUp(self) -> None:
        self.root = Path(self.mktemp())

    def port(self, device: str, state: str, **gids: str) -> None:
        """Have a port 1 with these GIDs, each called ``v1_`` or ``v2_`` and its index."""
        port = self.root / device / "ports" / "1"
        for place in ("gids", "gid_attrs/types"):
            (port / place).mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
        for name, gid in gids.items():
            version, index = name[:2], name[3:]
            (port / "gids" / index).write_text(f"{gid}\n")
            kind = "RoCE v2" if version == "v2" else "IB/RoCE v1"
            (port / "gid_attrs" / "types" / index).write_text(f"{kind}\n")

    def test_address(self) -> None:
        """An address is that of a GID of RoCE v2, on a port that is up."""
        v6 = "2001:0db8:0000:0000:0000:0000:0000:0007"
        self.port("mlx5_0", "4: ACTIVE", v1_0=_GID, v2_2=v6, v2_10=_GID)
        self.port("mlx5_1", "1: DOWN", v2_0="0000:0000:0000:0000:0000:ffff:c000:0202")
        self.assertEqual(["mlx5_0"], roce.devices(self.root))
        found = roce.of("192.0.2.1", self.root)
        assert found is not None
        self.assertEqual(("mlx5_0", 1, 10), (found.device, found.number, found.index))
        self.assertEqual(found, roce.of("::ffff:192.0.2.1", self.root))
        found = roce.of("2001:db8::7", self.root)
        assert found is not None
        self.assertEqual(2, found.index)
        for address in ("192.0.2.2", "192.0.2.3"):
            self.assertIsNone(roce.of(address, self.root))

    def test_none(self) -> None:
        """A host without devices has none, and a device without RoCE v2 is none."""
        self.assertEqual([], roce.devices(self.root / "nothing"))
        self.port("ib0", "4: ACTIVE", v1_0=_GID)
        self.assertEqual([], roce.devices(self.root))


class PairingTests(SynchronousTestCase):
    """What is said between the two sides."""

    def setUp(self) -> None:
        here, there = socket.socketpair()
        self.here, self.there = Channel(here), Channel(there)
        for channel in (self.here, self.there):
            self.addCleanup(channel.close)

    def test_hello(self) -> None:
        """It comes as it was said, from the role that is due and no other."""
        hello = Hello(Role.SOURCE, _END, uuid.uuid4(), 8 << 20, 1 << 40)
        for role in (Role.SOURCE, Role.DESTINATION):
            self.here.send([hello.encode()])
            if role is Role.SOURCE:
                self.assertEqual(hello, Hello.hear(self.there, role))
            else:
                self.assertRaises(Lost, Hello.hear, self.there, role)

    def test_garbled_hello(self) -> None:
        """What cannot be is refused: another magic, version or role, and numbers too large."""
        hello = Hello(Role.SOURCE, _END, uuid.uuid4(), 8 << 20, 1 << 40).encode()
        for at, value in (
            (0, 0),
            (4, 2),
            (5, 0),
            (5, 3),
            (6, 0),
            (6, 6),
            (8, 1),
            (12, 1),
            (56, 255),
        ):
            data = bytearray(hello)
            data[at] = value
            if at == 56:
                data[at : at + 8] = b"\xff" * 8
            self.here.send([data])
            with self.assertRaises(Lost, msg=(at, value)):
                Hello.hear(self.there, Role.SOURCE)

    def test_messages(self) -> None:
        """They come as they were said; a long reason is cut."""
        for message in (
            Message(Kind.REGISTER, 3, 4), Message(Kind.ROUND, 7),
            Message(Kind.KEYS, keys=(1, 0xFFFFFFFF)), Message(Kind.KEYS),
            Message(Kind.FAILED, text="no device"), Message(Kind.FAILED),
        ):  # fmt: skip
            say(self.here, message)
            self.assertEqual(message, hear(self.there))
        say(self.here, Message(Kind.FAILED, text="x" * 5000))
        self.assertEqual(Message(Kind.FAILED, text="x" * 1000), hear(self.there))
        self.here.close()
        self.assertIsNone(hear(self.there))

    def test_garbled_messages(self) -> None:
        """An unknown kind, or more than there can be, is refused, and nothing made of it."""
        for data in ("00" * 9, "05" + "00" * 8, "02000004010000000000", "04ffffffff00000000"):
            here, there = map(Channel, socket.socketpair())
            here.send([bytes.fromhex(data)])
            self.assertRaises(Lost, hear, there)
            here.close()
            there.close()

    def test_cut(self) -> None:
        """The end within a message is an error."""
        self.here.send([bytes.fromhex("020000000200000000" + "00" * 7)])
        self.here.close()
        self.assertRaises(Lost, hear, self.there)

    def test_pieces(self) -> None:
        """RAM has at most 1024 of them, of 1 MiB at least."""
        for size in (PAGE, 1 << 20, 1 << 30, (1 << 30) + PAGE, 1 << 46):
            piece = piece_size(size)
            self.assertGreaterEqual(piece, 1 << 20)
            self.assertLessEqual(-(-size // piece), 1024)


class PinnedTests(SynchronousTestCase):
    def test_discard(self) -> None:
        """A pinned page does not become a hole: the device would have another one than the file."""
        ram = Ram(8 * PAGE)
        self.addCleanup(ram.close)
        ram.put(0, np.full((8, PAGE), 1, np.uint8))
        ram.pin(2, 4)
        ram.discard(1, 5)
        self.assertEqual([True, False, True, True, False, True, True, True], ram.present().tolist())
        self.assertFalse(ram.host[1:5].any())
        ram.unpin()
        ram.discard(2, 4)
        self.assertEqual([False, False], ram.present()[2:4].tolist())


class WithoutTests(TestCase):
    """A guest whose host has no RDMA device."""

    async def test_reason(self) -> None:
        """It says so where it is asked what it can do, and where it is told to do it."""
        if roce.devices():
            raise SkipTest("this host has an RDMA device")
        with MemoryGuest("guest", ("-m", "1M", "-dirty-rate", "0")).start() as guest:
            held = QemuGuest(reactor, "guest", f"unix:{guest.qmp_path}")
            await held.attach()
            facts = (await held.examine()).facts
            held.detach()
            reason = "its host has no RDMA device with RoCE v2 and a port that is up"
            self.assertEqual(No(reason), facts.types["qio-channel-rdma"])
            self.assertEqual(No("it was built without TLS"), facts.types["tls-creds-x509"])
            with self.assertRaisesRegex(QmpError, f"RDMA cannot be used: {reason}"):
                guest.qmp("migrate", uri="rdma:127.0.0.1:1")
            guest.qmp(
                "migrate-set-capabilities", capabilities=[{"capability": "multifd", "state": True}]
            )
            with self.assertRaisesRegex(QmpError, "RDMA and multifd do not go together"):
                guest.qmp("migrate", uri="rdma:127.0.0.1:1")
