"""What QEMU has written is read and written again, and QEMU reads that: the guest goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qmigd.stream.events import (
    Command,
    Configuration,
    DeviceData,
    End,
    Event,
    Pages,
    RamBlocks,
    SectionEnd,
    SectionStart,
    Zeros,
)
from qmigd.stream.format import (
    IGNORE_SHARED,
    MAPPED_RAM,
    RAM_NAME,
    CommandNumber,
    RamBlock,
    SectionType,
)
from qmigd.stream.joining import join
from qmigd.stream.mapped_ram import MappedWriter, Placed
from qmigd.stream.multifd import Initial, Packer, PageData
from qmigd.stream.pages import zero_pages
from qmigd.stream.postcopy import (
    Advice,
    advise,
    discard,
    listen,
    packaged,
    read_advise,
    read_discard,
    run,
)
from qmigd.stream.ram import RamImage
from qmigd.stream.reader import Reader
from qmigd.stream.records import END_OF_SECTION, RamWriter, ram_of
from qmigd.stream.return_path import (
    Bitmap,
    Message,
    PageRequest,
    Pong,
    ResumeAck,
    ReturnPath,
    Shut,
    encode,
    request_pages,
)
from qmigd.stream.writer import (
    Writer,
    command,
    end,
    open_return_path,
    ping,
    section_end,
    section_start,
)
from tests.rig.bootsector import PAGE, Program
from tests.rig.guest import MACHINE, Guest
from tests.rig.qemus import LABELS
from tests.rig.streams import StreamCase, events, image, packets

#: It has zero pages in multifd's packets, and MULTIFD_FLUSH.
_NEW = "pc-i440fx-10.0"

#: Dirties its RAM slower, and faster, than it is sent.
_CALM = Program(pages=2048, pages_per_tick=16, ticks_per_second=100)
_HASTY = replace(_CALM, pages_per_tick=64)

_SMALL: dict[str, Any] = {"program": _CALM, "memory": 32}

#: In bytes a second: there are several passes.
_BANDWIDTH = 64 << 20


def written(stream: Iterable[Event | bytes]) -> bytes:
    """Write events, and between them what is written already."""
    writer = Writer()
    parts: list[bytes] = []
    for event in stream:
        parts += [event] if isinstance(event, bytes) else map(bytes, writer.write(event))
    return b"".join(parts)


def condensed(stream: Iterable[Event], ram: RamImage) -> Iterator[Event | bytes]:
    """Give the same guest with all of its RAM in the last section, each page once.

    What the devices are, and everything around RAM, stays as it is; a file with mapped-ram
    becomes a stream.

    :param ram: gets the RAM.
    """
    section: SectionStart | None = None
    for event in stream:
        ram.take(event)
        if isinstance(event, Configuration) and event.capabilities == (MAPPED_RAM,):
            event = replace(event, capabilities=None)
        if isinstance(event, SectionStart):
            section = event
        if section is None or section.name != RAM_NAME:
            yield event
            continue
        if section.kind == SectionType.END and isinstance(event, SectionEnd):
            yield from records(ram)
        if section.kind != SectionType.PART and isinstance(event, SectionStart | SectionEnd):
            yield event
        if isinstance(event, RamBlocks):
            blocks = tuple(replace(block, mapped=None) for block in event.blocks)
            yield replace(event, blocks=blocks)
        if isinstance(event, SectionEnd):
            section = None


def records(ram: RamImage) -> Iterator[bytes]:
    """Return the records of all RAM."""
    writer = RamWriter()
    for name, contents in ram.blocks.items():
        rows = ram_of(contents)
        zero = zero_pages(rows)
        yield b"".join(writer.zeros(name, np.flatnonzero(zero) * PAGE))
        offsets = np.flatnonzero(~zero) * PAGE
        yield b"".join(writer.pages_of(name, offsets, rows))


class File:
    """A file in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    def put(self, *placed: Placed) -> None:
        """Write, with holes where nothing is written."""
        for position, data in placed:
            self.data.extend(bytes(max(0, position + len(data) - len(self.data))))
            self.data[position : position + len(data)] = data


def mapped(stream: Iterable[Event], ram: RamImage) -> bytes:
    """Make a file with mapped-ram of a stream, or of another such file.

    :param ram: gets the RAM.
    """
    file, layout, writer, position = File(), MappedWriter(), Writer(), 0
    inside = ""
    for event in stream:
        ram.take(event)
        if isinstance(event, SectionStart):
            inside = event.name
        if isinstance(event, Configuration) and MAPPED_RAM not in (event.capabilities or ()):
            event = replace(event, capabilities=(MAPPED_RAM,))
        if isinstance(event, RamBlocks):
            file.put(*layout.setup(position, event.blocks, event.total))
            position = layout.position
        elif inside != RAM_NAME or isinstance(event, SectionStart | SectionEnd):
            for part in writer.write(event):
                file.put((position, bytes(part)))
                position += len(part)
        if isinstance(event, SectionEnd):
            inside = ""
    for name, contents in ram.blocks.items():
        rows = ram_of(contents)
        there = np.flatnonzero(~zero_pages(rows))
        file.put(*layout.pages(name, there * PAGE, rows[there]))
    file.put(*layout.bitmaps())
    return bytes(file.data)


def packed_again(data: bytes, compression: str) -> bytes:
    """Pack anew what went through a channel of multifd."""
    packer = Packer(compression=compression)
    parts: list[Any] = []
    for event in packets(data):
        if isinstance(event, Initial):
            parts.append(event.encode())
            continue
        assert isinstance(event, PageData)
        packet = event.packet
        if len(packet.normal) or len(packet.zero) or not packet.sync:
            pages = [event.data.tobytes()]
            parts += packer.pages(
                packet.number, packet.block, packet.normal, pages, packet.zero, sync=packet.sync
            )
        else:
            parts.append(packer.sync(packet.number))
    return b"".join(parts)


class _Postcopy:
    """Makes a postcopy migration of a stream: what the guest writes goes when it is asked for.

    :ivar path: takes what the destination says.
    :ivar ended: all has been sent.
    """

    def __init__(self, data: bytes, program: Program) -> None:
        """:param data: the stream."""
        self.ended = False
        self._ram = image()
        self._program = program
        self._writer = RamWriter()
        self._events: list[Event] = []
        for event in events(data):
            self._ram.take(event)
            if not isinstance(event, Pages | Zeros):
                self._events.append(event)
        self.path = ReturnPath({name: len(block) for name, block in self._ram.blocks.items()})
        self._start = next(one for one in self._events if isinstance(one, SectionStart))
        self._left = set(range(program.start, program.end, PAGE))

    def begin(self) -> bytes:
        """Return what goes before the guest runs there: the window's pages in it are wrong."""
        parts: list[Any] = [written(self._events[:2]), open_return_path(), ping(1)]
        parts.append(advise(Advice(PAGE, PAGE)))
        after = self._events.index(self._start) + 3
        parts.append(written(self._events[self._events.index(self._start) : after]))
        pages: list[Any] = []
        for name, contents in self._ram.blocks.items():
            offsets = np.arange(0, len(contents), PAGE)
            if name == "pc.ram":
                offsets = np.array(sorted(set(offsets.tolist()) - self._left))
            pages += self._writer.pages_of(name, offsets, ram_of(contents))
        window = (self._program.start, self._program.end - self._program.start)
        pages += self._writer.zeros("pc.ram", sorted(self._left))
        parts += [self._section(pages), *discard("pc.ram", [window])]
        devices = written(self._devices())
        return b"".join((*parts, *packaged([listen(), ping(3), devices, run()])))

    def answer(self, request: PageRequest) -> bytes:
        """Return the pages that are asked for, but for those that are on their way."""
        places = range(request.start, request.start + request.length, PAGE)
        return self._send(set(places) & self._left)

    def rest(self) -> bytes:
        """Return all other pages, and the end."""
        self.ended = True
        pages = self._send(self._left)
        return pages + self._section([], SectionType.END) + end()

    def _send(self, places: set[int]) -> bytes:
        self._left = self._left - places
        if not places:
            return b""
        rows = ram_of(self._ram.blocks["pc.ram"])
        return self._section(self._writer.pages_of("pc.ram", sorted(places), rows))

    def _section(self, pages: list[Any], kind: SectionType = SectionType.PART) -> bytes:
        number = self._start.id
        parts = (section_start(kind, number), *pages, END_OF_SECTION, section_end(number))
        return b"".join(parts)

    def _devices(self) -> Iterator[Event]:
        device = False
        for event in self._events:
            if isinstance(event, SectionStart):
                device = event.kind == SectionType.FULL
            if device and isinstance(event, SectionStart | DeviceData | SectionEnd):
                yield event


class RewrittenCase(StreamCase):
    def source(self, label: str, *capabilities: str, **options: Any) -> Guest:
        return super().source(label, *capabilities, **_SMALL | options)

    def destination(self, label: str, *capabilities: str, **options: Any) -> Guest:
        return super().destination(label, *capabilities, **_SMALL | options)

    def goes_on(self, source: Guest, destination: Guest) -> None:
        """Compare the RAM, and see the guest go on where it stopped."""
        self.assertTrue(destination.ram() == source.ram())
        destination.qmp("cont")
        destination.wait_ticks(3)
        # The first line there may have been written in part at the source.
        self.assertIn(destination.lines[0].tick - source.counter, (1, 2))
        destination.check_ram()
        source.close()
        destination.close()


class FileTests(RewrittenCase):
    def test_stream(self) -> None:
        """A stream is the same to the byte; and with its RAM put together QEMU loads it."""
        for label in LABELS:
            source = self.source(label)
            data = self.save(source, max_bandwidth=_BANDWIDTH)
            self.assertTrue(written(events(data)) == data)
            again = written(condensed(events(data), ram := image()))
            self.assertTrue(ram.blocks["pc.ram"] == source.ram())
            self.assertLess(len(again), len(data))
            destination = self.destination(label)
            self.load(destination, again)
            self.goes_on(source, destination)

    def test_example(self) -> None:
        """The documentation's example makes a copy whose guest stays paused."""
        source = self.source("7.2")
        names = {"FILE": self.mktemp(), "COPY": self.mktemp()}
        Path(names["FILE"]).write_bytes(self.save(source))
        page = Path(__file__).parents[1] / "docs" / "stream-formats.md"
        (example,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
        exec(example, names)  # noqa: S102
        destination = self.destination("7.2", paused=False)
        self.load(destination, Path(names["COPY"]).read_bytes())
        self.assertEqual("paused", destination.status())
        self.goes_on(source, destination)

    def test_mapped_ram(self) -> None:
        """A file with mapped-ram is the same to the byte, and QEMU loads it as a stream."""
        for label, more in (("10.0", ()), ("11", ("multifd",))):
            source = self.source(label, MAPPED_RAM, *more)
            data = self.save(source, "file:{}", max_bandwidth=_BANDWIDTH)
            self.assertTrue(mapped(events(data), image()) == data)
            destination = self.destination(label)
            self.load(destination, written(condensed(events(data), image())))
            self.goes_on(source, destination)

    def test_shared_ram(self) -> None:
        """RAM that is left out, because another QEMU shares it, has no pages and no place."""
        for label, capabilities, uri in (
            ("10.0", [IGNORE_SHARED], "exec:cat > {}"),
            ("11", [IGNORE_SHARED, MAPPED_RAM], "file:{}"),
        ):
            # Anonymous memory would not do: the other QEMU has to find it by its name.
            path = Path(self.mktemp()).absolute()
            memory = f"memory-backend-file,id=pc.ram,size=32M,share=on,mem-path={path}"
            extra = ["-object", memory, "-machine", "memory-backend=pc.ram"]
            source = self.source(label, *capabilities, extra=extra)
            data = self.save(source, uri)
            again = mapped(events(data), image()) if MAPPED_RAM in capabilities else None
            self.assertTrue((again or written(events(data))) == data)
            self.assertLess(len(data), 16 << 20)
            source.close()

    def test_mapped_ram_of_a_stream(self) -> None:
        """QEMU loads a stream that was made a file with mapped-ram."""
        source = self.source("10.0")
        data = self.save(source, max_bandwidth=_BANDWIDTH)
        destination = self.destination("11", MAPPED_RAM, "multifd")
        self.load(destination, mapped(events(data), image()), "file:{}")
        self.goes_on(source, destination)


class MultifdTests(RewrittenCase):
    def captured(
        self, label: str, compression: str, machine: str
    ) -> tuple[Guest, bytes, list[bytes]]:
        """Migrate and write it down; returns the source, the main channel and the others."""
        source = self.source(label, "multifd", machine=machine)
        destination = self.destination(label, "multifd", machine=machine)
        for guest in (source, destination):
            guest.qmp("migrate-set-parameters", {"multifd-compression": compression})
        recorder = self.recorder(destination)
        self.migrate(source, recorder.uri, max_bandwidth=_BANDWIDTH)
        self.loaded(destination)
        destination.close()
        main, *channels = [there for there, _ in recorder.connections]
        self.assertEqual((main[:4], len(channels)), (b"QEVM", 2))
        return source, main, channels

    def check(self, label: str, compression: str, machine: str, other: str) -> None:
        """Put the channels into one for one QEMU, and pack them anew for another.

        :param other: the compression then.
        """
        source, main, channels = self.captured(label, compression, machine)
        joined = condensed(join(events(main), [packets(data) for data in channels]), image())
        destination = self.destination(label, machine=machine)
        self.load(destination, written(joined))
        self.assertTrue(destination.ram() == source.ram())
        destination.close()

        destination = self.destination(label, "multifd", machine=machine)
        destination.qmp("migrate-set-parameters", {"multifd-compression": other})
        again = [packed_again(data, other) for data in channels]
        self.play(destination, [main, *again])
        self.goes_on(source, destination)

    def test_7_2(self) -> None:
        """There SYNC comes with pages, and a round ends with each section."""
        self.check("7.2", "none", MACHINE, "zstd")

    def test_10_0(self) -> None:
        """There zero pages are in the packets, and a round ends with MULTIFD_FLUSH."""
        self.check("10.0", "zstd", _NEW, "zlib")

    def test_11(self) -> None:
        """The same with an old machine type, whose zero pages are in the main channel."""
        self.check("11", "zlib", MACHINE, "none")

    def test_same_packets(self) -> None:
        """Without compression, a packet comes out the same to the byte."""
        source, _, channels = self.captured("11", "none", _NEW)
        source.close()
        for data in channels:
            self.assertTrue(packed_again(data, "none") == data)
            pages = [event for event in packets(data) if isinstance(event, PageData)]
            self.assertTrue(any(len(event.packet.zero) for event in pages))


class PostcopyTests(RewrittenCase):
    def test_return_path_and_commands(self) -> None:
        """All that both ends say is the same to the byte, with the channel of page requests."""
        for label, preempt in (("7.2", True), ("10.0", False), ("11", True)):
            capabilities = ["postcopy-ram", "return-path"]
            capabilities += ["postcopy-preempt"] if preempt else []
            source = self.source(label, *capabilities, program=_HASTY)
            destination = self.destination(label, *capabilities, paused=False, program=_HASTY)
            recorder = self.recorder(destination)
            self.switch(source, recorder.uri)
            self.assertEqual("completed", source.wait_migration("completed", "failed"))
            self.loaded(destination)
            (main, back), *more = recorder.connections
            self.assertEqual(len(more), int(preempt))
            seen = list(events(main))
            self.assertTrue(written(events(main)) == main)
            self.commands(seen)
            blocks = next(event.blocks for event in seen if isinstance(event, RamBlocks))
            said = self.said(back, blocks)
            self.assertTrue(any(isinstance(message, PageRequest) for message in said))
            self.assertEqual(said[-1], Shut(0))
            for data, _ in more:
                *pages, end = events(data, Reader(records_only=True, blocks=blocks))
                self.assertIsInstance(end, End)
                self.assertGreater(len(pages), 0)
                kept = events(data, Reader(records_only=True, blocks=blocks))
                only = (event for event in kept if not isinstance(event, End))
                self.assertEqual(written(only) + END_OF_SECTION, data)
            destination.check_ram()
            source.close()
            destination.close()

    def test_written(self) -> None:
        """A stream becomes a postcopy: QEMU runs the guest and asks for its pages."""
        for label in LABELS:
            source = self.source(label)
            postcopy = _Postcopy(self.save(source), source.program)
            destination = self.destination(label, "postcopy-ram", paused=False)
            said: list[Message] = []
            with self.connected(destination) as connection:
                connection.sendall(postcopy.begin())
                while Shut(0) not in said:
                    data = connection.recv(65536)
                    self.assertTrue(data, destination.log)
                    for message in postcopy.path.feed(data):
                        said.append(message)
                        if isinstance(message, PageRequest):
                            connection.sendall(postcopy.answer(message))
                    if len(destination.lines) >= 2 and not postcopy.ended:
                        connection.sendall(postcopy.rest())
                postcopy.path.end()
                self.loaded(destination)
            self.assertEqual([one for one in said if isinstance(one, Pong)], [Pong(1), Pong(3)])
            self.assertTrue(any(isinstance(one, PageRequest) for one in said))
            self.assertIn(destination.lines[0].tick - source.counter, (1, 2))
            destination.check_ram()
            source.close()
            destination.close()

    def test_bitmaps_of_a_recovery(self) -> None:
        """A destination that lost the connection says which pages it has."""
        capabilities = ("postcopy-ram", "return-path")
        source = self.source("10.0", *capabilities, program=_HASTY)
        destination = self.destination("10.0", *capabilities, paused=False, program=_HASTY)
        first = self.recorder(destination)
        self.switch(source, first.uri, bandwidth=1 << 20)
        destination.wait_ticks(2)
        first.drop()
        source.wait_migration("postcopy-paused")
        destination.wait_migration("postcopy-paused")
        second = self.recorder(destination, "migrate-recover")
        source.qmp("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        source.qmp("migrate", uri=second.uri, resume=True)
        self.assertEqual("completed", source.wait_migration("completed", "failed"))
        self.loaded(destination)
        destination.check_ram()

        begun = list(Reader().feed(first.connections[0][0]))
        blocks = next(event.blocks for event in begun if isinstance(event, RamBlocks))
        started = tuple(
            event
            for event in begun
            if isinstance(event, SectionStart) and event.kind == SectionType.START
        )
        ((main, back),) = second.connections

        def going_on() -> Iterator[Event]:
            return events(main, Reader(header=False, blocks=blocks, sections=started))

        self.assertTrue(written(going_on()) == main)
        stream = list(going_on())
        numbers = [event.number for event in stream if isinstance(event, Command)]
        for number in (CommandNumber.RECV_BITMAP, CommandNumber.POSTCOPY_RESUME):
            self.assertIn(number, numbers)
        self.commands(stream)
        said = self.said(back, blocks)
        bitmaps = {one.block: one.pages for one in said if isinstance(one, Bitmap)}
        self.assertEqual(set(bitmaps), {block.name for block in blocks})
        self.assertIn(ResumeAck(), said)
        pages = bitmaps["pc.ram"]
        self.assertTrue(0 < pages.sum() < len(pages))

    def switch(self, source: Guest, uri: str, bandwidth: int = 8 << 20) -> None:
        """Migrate, and go over to postcopy after the first pass, with pages still to come."""
        limits = {"max-bandwidth": 16 << 20, "downtime-limit": 1}
        source.qmp("migrate-set-parameters", {**limits, "max-postcopy-bandwidth": bandwidth})
        source.qmp("migrate", uri=uri)
        source.monitor.wait_event("MIGRATION_PASS", where=lambda data: data["pass"] == 2)
        source.qmp("migrate-start-postcopy")
        source.wait_migration("postcopy-active", "completed")

    def commands(self, stream: Iterable[Event]) -> None:
        """Read what is in postcopy's commands, and write it again."""
        for event in stream:
            if not isinstance(event, Command):
                continue
            if event.number == CommandNumber.POSTCOPY_ADVISE:
                again = advise(read_advise(event.data))
            elif event.number == CommandNumber.POSTCOPY_RAM_DISCARD:
                ranges = read_discard(event.data)
                (again,) = discard(ranges.block, ranges.ranges)
            else:
                continue
            self.assertEqual(again, command(event.number, event.data))

    def said(self, back: bytes, blocks: Iterable[RamBlock]) -> list[Message]:
        """Read what came back, and write it again."""
        path = ReturnPath({block.name: block.length for block in blocks})
        said = list(path.feed(back))
        path.end()
        last, again = "", b""
        for message in said:
            if isinstance(message, PageRequest):
                again += request_pages(message.start, message.length, message.block, last)
                last = message.block
            else:
                again += encode(message)
        self.assertEqual(again, back)
        return said
