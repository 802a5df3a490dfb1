"""Streams that real QEMUs write are read: the RAM that comes out is QEMU's own, byte by byte."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from uuid import UUID

from qmigd.stream import xbzrle
from qmigd.stream.devices import Devices, find_description
from qmigd.stream.events import (
    Command,
    Compressed,
    Configuration,
    Description,
    DeviceData,
    End,
    Event,
    MappedPages,
    Package,
    Pages,
    RamBlocks,
    SectionEnd,
    SectionStart,
    Xbzrle,
    Zeros,
)
from qmigd.stream.format import CommandNumber, RamBlock
from qmigd.stream.joining import join
from qmigd.stream.ram import RamImage
from qmigd.stream.reader import Reader
from tests.rig.bootsector import PAGE, Program
from tests.rig.guest import MACHINE, Guest
from tests.rig.news import wait_until
from tests.rig.qemus import LABELS
from tests.rig.streams import StreamCase, events, image, packets, written

#: Dirties the same pages again and again.
_FAST = Program(pages=1024, pages_per_tick=64, ticks_per_second=100)


class SavedTests(StreamCase):
    def test_stream(self) -> None:
        """A stream gives QEMU's RAM and its devices' fields, also without a look at its end."""
        for label in LABELS:
            guest = self.source(label)
            data = self.save(guest)
            found = find_description(data[-(1 << 20) :], len(data) - (1 << 20))
            assert found is not None
            devices = Devices(found[1], found[0])
            sizes = devices.sizes()
            for reader in (Reader(), Reader(sizes=sizes)):
                ram = image()
                decoded = self.decode(events(data, reader), ram, devices)
                self.compare(ram, guest)
                self.assertEqual(sizes.keys(), decoded.keys())
            registers = decoded["cpu", 0]["env.regs"]
            assert isinstance(registers, list)
            self.assertEqual(16, len(registers))
            self.assertIn("runstate", decoded["globalstate", 0])
            self.check_example(data, decoded["cpu", 0]["env.eip"], guest.memory)
            guest.close()

    def check_example(self, data: bytes, instruction: object, memory: int) -> None:
        """Run the example of the documentation."""
        path = Path(self.mktemp())
        path.write_bytes(data)
        page = Path(__file__).parents[1] / "docs" / "stream.md"
        (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        with redirect_stdout(io.StringIO()) as out:
            exec(example, {"FILE": path})  # noqa: S102
        assert isinstance(instruction, int)
        self.assertEqual([hex(instruction), str(memory)], out.getvalue().split())

    def decode(
        self, stream: Iterator[Event], ram: RamImage, devices: Devices
    ) -> dict[tuple[str, int], dict[str, object]]:
        """Decode every device."""
        decoded: dict[tuple[str, int], dict[str, object]] = {}
        section, contents, start = None, b"", 0
        for event in stream:
            ram.take(event)
            if isinstance(event, SectionStart):
                section, contents, start = event, b"", 0
            elif isinstance(event, DeviceData):
                start = start or event.at
                contents += event.data
            elif isinstance(event, SectionEnd) and section is not None and section.name != "ram":
                device = devices.find(section.name, section.instance)
                assert device is not None
                decoded[device.name, device.instance] = dict(device.decode(contents, start))
        return decoded

    def test_xbzrle(self) -> None:
        """Pages that come as differences end up as what they are, and give the same differences."""
        for label in ("7.2", "11"):
            guest = self.source(label, "xbzrle", program=_FAST)
            limits = {"downtime-limit": 1, "max-bandwidth": 10 << 20}
            guest.qmp("migrate-set-parameters", limits)
            path = Path(guest.directory) / "stream"
            with written(path) as tell:
                guest.qmp("migrate", uri=f"exec:cat > {path}{tell}")
                self.wait_passes(guest, 3)
                limits = {"downtime-limit": 2000, "max-bandwidth": 0}
                guest.qmp("migrate-set-parameters", limits)
                self.assertEqual("completed", guest.wait_migration("completed", "failed"))
            ram = image()
            kinds = set()
            for event in events(path.read_bytes()):
                kinds.add(type(event))
                if isinstance(event, Xbzrle):
                    page = ram.blocks[event.block][event.page : event.page + PAGE]
                    before = bytes(page)
                    ram.take(event)
                    self.assertEqual(event.data, xbzrle.encode(before, page))
                else:
                    ram.take(event)
            self.assertIn(Xbzrle, kinds)
            self.compare(ram, guest)
            guest.close()

    def wait_passes(self, guest: Guest, count: int) -> None:
        """Wait until QEMU has gone over the RAM more than ``count`` times."""

        def look() -> bool:
            return guest.qmp("query-migrate").get("ram", {}).get("dirty-sync-count", 0) > count

        wait_until(look, f"more than {count} passes over the RAM")

    def test_mapped_ram(self) -> None:
        """A file with mapped-ram gives QEMU's RAM, stale places included."""
        for label in ("10.0", "11"):
            guest = self.source(label, "mapped-ram")
            # something in front of it, as in a file of a saved guest
            uri = "file:{},offset=8192"
            data = self.save(guest, uri)[8192:]
            ram = image()
            seen = []
            for event in events(data, Reader(start=8192)):
                ram.take(event)
                seen.append(event)
            self.assertTrue(
                any(
                    isinstance(e, Configuration) and e.capabilities == ("mapped-ram",) for e in seen
                )
            )
            self.compare(ram, guest)
            guest.close()

    def test_compress(self) -> None:
        """Pages that QEMU 7.2 has compressed one by one are what they were."""
        guest = self.source("7.2", "compress", "validate-uuid")
        ram, kinds = image(), set()
        for event in events(self.save(guest)):
            ram.take(event)
            kinds.add(type(event))
            if isinstance(event, Configuration):
                self.assertEqual(guest.qmp("query-uuid")["UUID"], str(UUID(bytes=event.uuid)))
        self.assertIn(Compressed, kinds)
        self.compare(ram, guest)

    def test_ignore_shared(self) -> None:
        """RAM that remains where it is has its address in the stream, and no pages."""
        for capabilities, uri in (
            (("x-ignore-shared",), "exec:cat > {}"),
            (("x-ignore-shared", "mapped-ram"), "file:{}"),
        ):
            shared = f"memory-backend-file,id=m,size=64M,share=on,mem-path={self.mktemp()}"
            guest = self.source(
                "11", *capabilities, extra=("-object", shared, "-machine", "memory-backend=m")
            )
            seen = list(events(self.save(guest, uri)))
            self.assertIsInstance(seen[-1], Description)
            (setup,) = (event for event in seen if isinstance(event, RamBlocks))
            block = setup.blocks[0]
            self.assertEqual(("m", guest.memory, 0), (block.name, block.length, block.address))
            self.assertEqual("mapped-ram" in capabilities, block.mapped is not None)
            paged = {e.block for e in seen if isinstance(e, Pages | Zeros | MappedPages)}
            self.assertNotIn("m", paged)
            self.assertIn("pc.bios", paged)
            guest.close()


class CapturedTests(StreamCase):
    def captured(
        self,
        label: str,
        *capabilities: str,
        postcopy: bool = False,
        machine: str = MACHINE,
        paused: bool = True,
        rate: int = 0,
    ) -> tuple[Guest, Guest, list[bytes]]:
        """Migrate through somebody who writes it down; returns both guests and the connections.

        :param paused: the guest remains paused at the destination, and its RAM what came.
        :param rate: bytes in a second that the source sends in postcopy; 0: as fast as it can.
        """
        source = self.source(label, *capabilities, machine=machine)
        destination = self.destination(label, *capabilities, machine=machine, paused=paused)
        if "multifd" in capabilities:
            for guest in (source, destination):
                guest.qmp("migrate-set-parameters", {"multifd-channels": 3})
        recorder = self.recorder(destination)
        if postcopy:
            # slowly at first, so that it is not over before it is switched
            limits = {"max-bandwidth": 4 << 20, "max-postcopy-bandwidth": rate}
            source.qmp("migrate-set-parameters", limits)
        source.qmp("migrate", uri=recorder.uri)
        if postcopy:
            source.wait_migration("active", "failed")
            source.qmp("migrate-start-postcopy")
        self.assertEqual("completed", source.wait_migration("completed", "failed"))
        self.loaded(destination)
        return source, destination, [there for there, _ in recorder.connections]

    def test_postcopy(self) -> None:
        """A migration that was switched to postcopy gives the RAM that both ends have."""
        for label in LABELS:
            source, destination, (data, *more) = self.captured(label, "postcopy-ram", postcopy=True)
            self.assertEqual([], more)
            ram = image()
            seen = []
            for event in events(data):
                ram.take(event)
                seen.append(event)
            numbers = [event.number for event in seen if isinstance(event, Command)]
            for number in ("POSTCOPY_ADVISE", "POSTCOPY_LISTEN", "POSTCOPY_RUN"):
                self.assertIn(CommandNumber[number], numbers)
            self.assertTrue(any(isinstance(event, Package) for event in seen))
            self.assertIsInstance(seen[-1], End)
            self.compare(ram, destination)
            self.compare(ram, source)
            source.close()
            destination.close()

    def test_preempt(self) -> None:
        """The pages that a guest has asked for, on a channel of their own, are all that is left."""
        source, _, (data, urgent) = self.captured(
            "11", "postcopy-ram", "postcopy-preempt", postcopy=True, paused=False, rate=4 << 20
        )
        ram = image()
        blocks: tuple[RamBlock, ...] = ()
        for event in events(data):
            ram.take(event)
            if isinstance(event, RamBlocks):
                blocks = event.blocks
        asked = 0
        for event in events(urgent, Reader(records_only=True, blocks=blocks)):
            ram.take(event)
            asked += len(event.offsets) if isinstance(event, Pages | Zeros) else 0
        self.assertGreater(asked, 0)
        self.compare(ram, source)

    def test_multifd(self) -> None:
        """What was captured of several channels gives the RAM that both ends have."""
        # pc-i440fx-7.2 ends a round with each section, and 10.0 with MULTIFD_FLUSH
        for label, machine in (
            ("7.2", MACHINE),
            ("11", MACHINE),
            ("10.0", "pc-i440fx-10.0"),
            ("11", "pc-i440fx-10.0"),
        ):
            source, destination, (main, *channels) = self.captured(
                label, "multifd", machine=machine
            )
            self.assertEqual(3, len(channels))
            ram = self.merged(main, channels)
            self.compare(ram, destination)
            self.compare(ram, source)
            source.close()
            destination.close()

    def merged(self, main: bytes, channels: Sequence[bytes]) -> RamImage:
        ram = image()
        for event in join(events(main), [packets(channel) for channel in channels]):
            ram.take(event)
        return ram
