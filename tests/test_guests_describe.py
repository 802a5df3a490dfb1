"""What a preflight compares, as real QEMUs tell it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any
from unittest import SkipTest

from twisted.internet import reactor
from twisted.trial.unittest import SynchronousTestCase

from qmigd.guests import builds
from qmigd.guests.builds import TYPES
from qmigd.guests.describe import parse_ram_blocks
from qmigd.guests.qemu import QemuGuest
from qmigd.interfaces import GuestFacts, No, RamBlock, Yes
from tests.rig.case import RigCase
from tests.rig.guest import Guest
from tests.rig.proxy import Proxy
from tests.rig.qemus import LABELS, require
from tests.rig.users import NOBODY, by, for_everybody, ordinary

SWITCH = Path("/proc/sys/vm/unprivileged_userfaultfd")

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
            "      /objects/m         2 MiB  0x0 0x4000000 0x4000000\r\n"
        )
        wanted = (
            RamBlock("/objects/m", 64 << 20, 2 << 20, True),
            RamBlock("/rom@etc/acpi/tables", 2 << 20, 4096),
            RamBlock("huge", 1 << 30, 1 << 30),
            RamBlock("pc.ram", 64 << 20, 4096, False),
        )
        backends: list[dict[str, Any]] = [
            {"id": "m", "share": True},
            {"id": "pc.ram", "share": False},
            {"size": 1},
        ]
        self.assertEqual(parse_ram_blocks(text, backends), wanted)
        self.assertEqual(parse_ram_blocks(""), ())


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

    async def looked(self, held: QemuGuest) -> tuple[Any, list[str]]:
        """Look at a guest; returns its description, and the commands that this took."""
        await held.attach()
        asked: list[str] = []
        send = held.client._send

        def noted(key: str, command: str, *more: Any) -> Any:
            asked.append(command)
            return send(key, command, *more)

        self.patch(held.client, "_send", noted)
        try:
            return (await held.examine()).description, asked
        finally:
            held.detach()

    async def test_second_look(self) -> None:
        """What cannot have changed is not asked again, and what has changed is found."""
        guest = self.guest(require("10.0"), "guest", extra=("-m", "64,slots=2,maxmem=256M")).start()
        held = QemuGuest(reactor, guest.name, f"unix:{guest.qmp_path}")
        first, asked = await self.looked(held)
        again, fewer = await self.looked(held)
        self.assertEqual(again, first)
        self.assertLess(len(fewer), len(asked) - 6)
        self.assertNotIn("query-cpus-fast", fewer)

        backend: dict[str, Any] = {"qom-type": "memory-backend-ram", "id": "more"}
        guest.qmp("object-add", size=1 << 26, **backend)
        guest.qmp("device_add", driver="pc-dimm", id="dimm", memdev="more")
        plugged, _ = await self.looked(held)
        self.assertIn({"name": "more", "size": 1 << 26}, plugged["ram-blocks"])
        self.assertIn({"type": "pc-dimm", "id": "dimm"}, plugged["devices"])
        self.assertEqual(plugged["memory"], first["memory"])

    async def test_another_in_its_place(self) -> None:
        """What was found out about a QEMU is not believed of the next one on the same socket."""
        one = self.guest(require("10.0"), "guest").start()
        held = QemuGuest(reactor, one.name, f"unix:{one.qmp_path}")
        first, _ = await self.looked(held)
        path = one.qmp_path
        one.close()
        uuid = "8f1b9a4e-0b1f-4c5e-9d3e-0d4c8c1a7b11"
        other = self.guest(require("7.2"), "other", extra=("-uuid", uuid, "-smp", "2")).start()
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.symlink(other.qmp_path, path)
        self.addCleanup(os.unlink, path)
        second, _ = await self.looked(held)
        self.assertEqual((first["cpus"], second["cpus"]), (1, 2))
        self.assertEqual(second["uuid"], uuid)

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


#: A device that no QEMU moves: its memory is shared with others.
IVSHMEM = (
    "-object", "memory-backend-ram,id=shared,size=1M,share=on",
    "-device", "ivshmem-plain,memdev=shared",
)  # fmt: skip


class FactsTests(RigCase):
    """What features are told of a guest, its QEMU and that one's process."""

    async def facts(self, guest: Guest) -> GuestFacts:
        held = QemuGuest(reactor, guest.name, f"unix:{guest.qmp_path}")
        await held.attach()
        try:
            return (await held.examine()).facts
        finally:
            held.detach()

    async def test_ram(self) -> None:
        """Its size, its blocks' pages, and which of them is shared, on every QEMU."""
        extra = (
            "-object",
            "memory-backend-memfd,id=ram0,size=64M",
            "-machine",
            "memory-backend=ram0",
        )
        for label in LABELS:
            plain = await self.facts(self.guest(require(label), "plain").start())
            self.assertEqual(plain.memory, 64 << 20)
            self.assertIn(RamBlock("pc.ram", 64 << 20, 4096, False), plain.ram)
            shared = await self.facts(self.guest(require(label), "shared", extra=extra).start())
            self.assertIn(RamBlock("ram0", 64 << 20, 4096, True), shared.ram)

    async def test_blockers(self) -> None:
        """A device that cannot be moved is named in QEMU's words, and none is none."""
        for label in LABELS:
            guest = self.guest(require(label), "stuck", extra=IVSHMEM).start()
            (blocker,) = (await self.facts(guest)).blockers
            self.assertIn("ivshmem", blocker)
        self.assertEqual((await self.facts(self.guest(require("7.2")).start())).blockers, ())

    async def test_types(self) -> None:
        """Debian's QEMUs have RDMA and TLS; a type that there is not is known as that."""
        for label in LABELS:
            guest = self.guest(require(label), "built").start()
            self.assertEqual((await self.facts(guest)).types, dict.fromkeys(TYPES, Yes()))
        asked = ("qio-channel-rdma", "none", "virtio-net-pci")
        self.patch(builds, "TYPES", dict.fromkeys(asked, "why"))
        self.patch(builds, "_known", {})
        self.assertEqual(
            (await self.facts(guest)).types,
            {"qio-channel-rdma": Yes(), "none": No("why"), "virtio-net-pci": Yes()},
        )

    async def test_process(self) -> None:
        """Whose it is, and what it may: locked memory and userfaultfd."""
        guest = self.guest(ordinary(require("7.2"), memlock=123 << 10))
        for_everybody(guest).start()
        process = (await self.facts(guest)).process
        assert process is not None
        self.assertEqual((process.pid, process.uid), (guest.process.pid, NOBODY))
        self.assertEqual(process.memlock, 123 << 10)
        self.assertIs(process.userfaultfd, SWITCH.read_text().strip() == "1")
        self.assertFalse(process.userfaultfd_device)
        limited = by(require("7.2"), "prlimit", "--memlock=123456")
        root = (await self.facts(self.guest(limited).start())).process
        assert root is not None
        self.assertEqual((root.uid, root.memlock, root.userfaultfd), (0, None, True))

    async def test_process_in_a_user_namespace(self) -> None:
        """What it has there by capability counts for nothing with the kernel."""
        prefix = ("unshare", "--user", "--map-root-user")
        if subprocess.run([*prefix, "true"], check=False, capture_output=True).returncode:
            raise SkipTest("this host makes no user namespaces for this user")
        qemu = by(require("7.2"), "prlimit", "--memlock=123456", *prefix)
        process = (await self.facts(self.guest(qemu).start())).process
        assert process is not None
        self.assertEqual(process.memlock, 123456)
        self.assertIs(process.userfaultfd, SWITCH.read_text().strip() == "1")

    async def test_proxy(self) -> None:
        """Behind a proxy nothing is known of the process, and all else is."""
        guest = self.guest(require("7.2")).start()
        proxy = Proxy(guest.qmp_path)
        self.addCleanup(proxy.close)
        held = QemuGuest(reactor, "guest", proxy.uri)
        await held.attach()
        try:
            facts = (await held.examine()).facts
        finally:
            held.detach()
        self.assertIsNone(facts.process)
        self.assertEqual(facts.memory, 64 << 20)
