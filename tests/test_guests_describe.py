"""What a preflight compares, as real QEMUs tell it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.trial.unittest import SynchronousTestCase

from qmigd.guests.describe import parse_ram_blocks
from qmigd.guests.qemu import QemuGuest
from tests.rig.case import RigCase
from tests.rig.qemus import LABELS, require

#: A guest with some of everything.
DEVICES = (
    "-smp", "2", "-vga", "std",
    "-device", "virtio-net-pci,id=net0",
    "-device", "pci-bridge,id=bridge0,chassis_nr=1",
    "-device", "virtio-rng-pci,bus=bridge0,addr=3",
    "-device", "ich9-usb-ehci1,id=usb", "-device", "usb-tablet",
    "-device", "virtio-serial-pci,id=serial",
    "-chardev", "null,id=null", "-device", "virtserialport,chardev=null,name=port",
)  # fmt: skip


class RamBlockTests(SynchronousTestCase):
    def test_columns(self) -> None:
        """Older and newer QEMUs differ in columns; nameless blocks are not migrated."""
        text = (
            "              Block Name    PSize              Offset               Used"
            "              Total                HVA  RO\n"
            "                  pc.ram    4 KiB  0x0000000000100000 0x0000000004000000"
            " 0x0000000004000000 0x00007fa7da600000  rw\r\n"
            "    /rom@etc/acpi/tables    4 KiB  0x0000000005200000 0x0000000000020000"
            " 0x0000000000200000\r\n"
            "                            4 KiB  0x0000000000000000 0x0000000000100000"
            " 0x0000000000100000\r\n"
            "            huge         1 GiB  0x0 0x40000000 0x40000000\r\n"
        )
        wanted = [
            {"name": "/rom@etc/acpi/tables", "size": 2 << 20},
            {"name": "huge", "size": 1 << 30},
            {"name": "pc.ram", "size": 64 << 20},
        ]
        self.assertEqual(parse_ram_blocks(text), wanted)
        self.assertEqual(parse_ram_blocks(""), [])


class DescribeTests(RigCase):
    async def described(self, label: str, *, incoming: bool, extra: tuple[str, ...]) -> Any:
        """Describe a new guest that has ``extra`` on its command line."""
        guest = self.guest(require(label), "guest", incoming=incoming, extra=extra).start()
        held = QemuGuest(reactor, guest.name, f"unix:{guest.qmp_path}")
        await held.attach()
        try:
            return json.loads(json.dumps((await held.examine()).description))
        finally:
            held.detach()
            guest.close()

    async def test_the_same_on_both_sides(self) -> None:
        """Running or waiting, on any version: the same command line is the same guest."""
        path = Path(self.mktemp()).resolve()
        path.touch()
        os.truncate(path, 1 << 20)
        drive = (
            "-drive",
            f"if=none,id=disk0,format=raw,readonly=on,file={path}",
            "-device",
            "virtio-blk-pci,drive=disk0,id=disk",
        )
        seen = []
        for label in LABELS:
            for incoming in (False, True):
                described = await self.described(label, incoming=incoming, extra=DEVICES + drive)
                self.assertEqual(described.pop("qemu"), require(label).version)
                seen.append(described)
        for described in seen[1:]:
            self.assertEqual(described, seen[0])

    async def test_contents(self) -> None:
        """What a person would name is there under the name that a person gave it."""
        described = await self.described("7.2", incoming=False, extra=DEVICES)
        self.assertEqual(described["name"], "guest")
        self.assertEqual(described["machine"], "pc-i440fx-7.2")
        self.assertEqual(described["memory"], 64 << 20)
        self.assertEqual(described["cpus"], 2)
        self.assertEqual(described["cpu-model"], "qemu64-x86_64-cpu")
        self.assertEqual(described["capabilities"], [])
        self.assertIn({"name": "pc.ram", "size": 64 << 20}, described["ram-blocks"])
        devices = described["devices"]
        self.assertIn({"type": "virtio-net-pci", "id": "net0", "address": "03.0"}, devices)
        self.assertIn({"type": "virtio-rng-pci", "address": "bridge0/03.0"}, devices)
        self.assertIn({"type": "usb-tablet"}, devices)
        # The VGA card, which no -device made.
        self.assertIn({"type": "1234:1111", "address": "02.0", "built-in": True}, devices)
        floppy = {"name": "floppy0", "removable": True, "size": 1440 << 10, "read-only": True}
        self.assertEqual(described["drives"], [floppy])

    async def test_differences_show(self) -> None:
        """A device that is missing or elsewhere, and other sizes, are seen."""
        one = await self.described("7.2", incoming=False, extra=DEVICES)
        other = await self.described(
            "7.2", incoming=True, extra=("-device", "virtio-net-pci,id=net0")
        )
        differing = {key for key in one if one[key] != other.get(key)}
        self.assertEqual(differing, {"cpus", "devices", "ram-blocks"})

    async def test_another_machine(self) -> None:
        """A board that is not a PC is described as far as it goes."""
        guest = self.guest(require("7.2"), "guest", machine="isapc").start()
        held = QemuGuest(reactor, guest.name, f"unix:{guest.qmp_path}")
        await held.attach()
        try:
            described = (await held.examine()).description
        finally:
            held.detach()
        self.assertEqual(described["machine"], "isapc")
        self.assertEqual(described["devices"], [])
