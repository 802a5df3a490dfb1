"""The parts of the memory guest: what it writes, how that is found dirty, what it is made of."""

from __future__ import annotations

import ctypes
import itertools
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import ArgumentError
from qmigd.guests.memory.channels import Channel, Lost
from qmigd.guests.memory.contents import PATTERNS, Pattern, fill, first_wrong
from qmigd.guests.memory.devices import State
from qmigd.guests.memory.dirty import LogTracker, PagemapTracker, Tracker
from qmigd.guests.memory.faults import Faults
from qmigd.guests.memory.gathering import Gathering
from qmigd.guests.memory.machine import Machine
from qmigd.guests.memory.options import MemoryOptions, from_table, parse
from qmigd.guests.memory.ram import PAGE, Ram, runs
from qmigd.guests.memory.spreading import ahead
from qmigd.guests.memory.vector import Records, behind, packets, send
from qmigd.stream.multifd import Packer

_PATTERNS = st.builds(
    Pattern, st.sampled_from(PATTERNS), start=st.integers(0, 40), count=st.integers(1, 60)
)


class ContentsTests(SynchronousTestCase):
    """RAM in an array, written as the workload writes."""

    def ram(self, pattern: Pattern, written: int) -> NDArray[np.uint64]:
        """All pages after so many writes, one after the other."""
        ram = np.zeros((100, PAGE // 8), np.uint64)
        numbers = np.arange(1, written + 1, dtype=np.int64)
        for number, page in zip(numbers, pattern.pages(1, written + 1), strict=True):
            ram[page] = fill(np.array([number]), np.array([page]))[0]
        return ram

    def wrong(self, pattern: Pattern, written: int, ram: NDArray[np.uint64]) -> str | None:
        def read() -> Iterator[tuple[int, NDArray[np.uint64]]]:
            for first in range(0, 100, 30):
                yield first, ram[first : first + 30]

        return first_wrong(pattern, written, read(), filled=False)

    @given(_PATTERNS, st.integers(0, 150))
    def test_right(self, pattern: Pattern, written: int) -> None:
        """However far it has come, the RAM is what it has to be."""
        self.assertIsNone(self.wrong(pattern, written, self.ram(pattern, written)))

    @given(_PATTERNS, st.integers(1, 150), st.data())
    def test_each_write_counts(self, pattern: Pattern, written: int, data: Any) -> None:
        """A write that was lost, one too many, and a page in another's place are all found."""
        ram = self.ram(pattern, written)
        self.assertIn("not write", str(self.wrong(pattern, written + 1, ram)))
        self.assertIn("not write", str(self.wrong(pattern, written - 1, ram)))
        page = data.draw(st.sampled_from(pattern.pages(1, written + 1).tolist()))
        word = data.draw(st.integers(0, PAGE // 8 - 1))
        ram[page, word] ^= np.uint64(1) << np.uint64(data.draw(st.integers(0, 63)))
        self.assertIn(f"page {page} ", str(self.wrong(pattern, written, ram)))


class RamCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.ram = Ram(64 * PAGE)
        self.addCleanup(self.ram.close)

    def write(self, *pages: int) -> None:
        for page in pages:
            self.ram.write(page, np.full((1, PAGE // 8), page + 1, np.uint64))


class TrackerTests(RamCase):
    """Both ways to find dirty pages."""

    def check(self, tracker: Tracker) -> None:
        self.addCleanup(tracker.close)
        self.write(3, 4, 5, 9, 63)
        self.assertEqual([3, 4, 5, 9, 63], np.flatnonzero(tracker.take()).tolist())
        self.assertFalse(tracker.take().any())
        self.write(4, 0)
        # What the engine does is not the guest's doing.
        self.ram.host[20] = 7
        self.assertEqual([0, 4], np.flatnonzero(tracker.take()).tolist())

    def test_log(self) -> None:
        """The workload's notes have what it wrote since the last look."""
        self.write(1, 2)
        self.check(LogTracker(self.ram))

    def test_pagemap(self) -> None:
        """So has the kernel, where it can."""
        self.write(1, 2)
        try:
            tracker = PagemapTracker(self.ram)
        except OSError as error:
            self.skipTest(f"this kernel cannot: {error}")
        self.check(tracker)


class HoleTests(RamCase):
    def test_holes(self) -> None:
        """What was never written, or was discarded, is no page."""
        self.write(2, 3, 10)
        self.assertEqual([2, 3, 10], np.flatnonzero(self.ram.present()).tolist())
        self.ram.discard(3, 11)
        self.assertEqual([2], np.flatnonzero(self.ram.present()).tolist())

    def test_allocated(self) -> None:
        """RAM that was allocated beforehand has no holes, and takes the same pages."""
        ram = Ram(64 * PAGE, allocated=True)
        self.addCleanup(ram.close)
        self.assertTrue(ram.present().all())
        rows = np.random.default_rng(1).integers(0, 256, (70, PAGE + 8), np.uint8)
        for one in (ram, self.ram):
            one.put(3, rows[:60, 8:])
            one.put(9, rows[64:65, 8:])
            one.discard(10, 12)
        self.assertEqual([10, 11], np.flatnonzero(~ram.present()).tolist())
        wanted = np.zeros((64, PAGE), np.uint8)
        wanted[3:63] = rows[:60, 8:]
        wanted[9] = rows[64, 8:]
        wanted[10:12] = 0
        for one in (ram, self.ram):
            self.assertEqual(wanted.tobytes(), one.host.tobytes())

    @given(st.sets(st.integers(0, 100)))
    def test_runs(self, pages: set[int]) -> None:
        """Runs are the same pages again, and no two of them touch."""
        found = runs(np.array(sorted(pages), np.int64))
        self.assertEqual(sorted(pages), [page for run in found for page in range(*run)])
        for (_, end), (first, _) in itertools.pairwise(found):
            self.assertLess(end, first)

    def test_faults(self) -> None:
        """A page that is touched is asked for once, and whoever waits gets what comes."""
        asked: list[int] = []
        come = threading.Event()

        def ask(page: int) -> None:
            asked.append(page)
            come.set()

        received = np.zeros(64, np.bool_)
        received[7] = True  # as zero bytes: a hole all the same
        faults = Faults(self.ram, received, ask)
        self.assertFalse(self.ram.read(7, 1).any())
        self.assertEqual([], asked)
        found: list[NDArray[np.uint64]] = []
        reader = threading.Thread(target=lambda: found.append(self.ram.read(5, 1)))
        reader.start()
        self.assertTrue(come.wait(30))
        faults.place(np.array([4, 5]), np.full((2, PAGE), 9, np.uint8))
        reader.join()
        faults.place(np.array([5]), np.full((1, PAGE), 8, np.uint8))  # it is there already
        faults.finish()
        self.assertEqual([5], asked)
        self.assertEqual(9, found[0].view(np.uint8).min())
        self.assertEqual(9, self.ram.host[5].max())
        self.assertEqual(1, len(faults.latencies))


class GatheringTests(SynchronousTestCase):
    def gather(
        self, *argv: str, **parameters: Any
    ) -> tuple[Machine, Gathering, NDArray[np.bool_], Channel]:
        """A machine, what takes its pages, which of them have come, and the channel for them."""
        start = parse(["-m", "1M", "-incoming", "defer", "-qmp", "unix:none", *argv])
        machine = Machine(start, lambda *_: None, lambda: None)
        self.addCleanup(machine.close)
        machine.settings.switch([{"capability": "multifd", "state": True}])
        machine.settings.change({"multifd-channels": 1, **parameters})
        received = np.zeros(machine.ram.pages, np.bool_)
        gathering = Gathering(machine, received)
        self.addCleanup(gathering.close)
        ours, theirs = map(Channel, socket.socketpair())
        self.addCleanup(ours.close)
        gathering.take(theirs, 0)
        return machine, gathering, received, ours

    def test_received(self) -> None:
        """What multifd channels bring is in the RAM and known to have come, zero pages as well."""
        for more in ([], ["-mem-prealloc"]):
            machine, gathering, received, ours = self.gather(*more)
            machine.ram.host[:] = 1
            packer = Packer(page_size=PAGE)
            for pages in ([2, 3, 4, 7, 8], list(range(10, 110, 5))):  # few runs, and many
                places = np.array(pages) * PAGE
                data = np.full(len(pages) * PAGE, 9, np.uint8).tobytes()
                ours.send(packer.pages(1, "ram", places, [data], np.array([5, 200]) * PAGE))
            ours.send([packer.sync(2)])
            gathering.meet()
            # Another pass, with a packet that is full, bit by bit.
            places = np.arange(120, 248) * PAGE
            packet = packer.pages(3, "ram", places, [b"\x08" * 128 * PAGE])
            whole = b"".join([*packet, packer.sync(4)])
            for at in range(0, len(whole), 70001):
                ours.send([whole[at : at + 70001]])
            gathering.meet()
            self.assertEqual({8}, set(machine.ram.host[120:248].reshape(-1).tolist()))
            filled = [2, 3, 4, 7, 8, *range(10, 110, 5)]
            known = sorted({*filled, 5, *range(120, 248)})
            self.assertEqual(known, np.flatnonzero(received).tolist())
            for value, pages in ((9, filled), (0, [5]), (1, [6, 9, 251])):
                self.assertEqual({value}, set(machine.ram.host[pages].reshape(-1).tolist()))

    def test_not_compressed(self) -> None:
        """Pages that are not compressed as agreed are refused, a full packet of them as well."""
        for count in (127, 128):
            _, gathering, _, ours = self.gather("-mem-prealloc", **{"multifd-compression": "zlib"})
            packer, places = Packer(page_size=PAGE), np.arange(count) * PAGE
            ours.send([packer.pages(1, "ram", places, [bytes(count * PAGE)])[0], packer.sync(2)])
            with self.assertRaisesRegex(Lost, "compressed by none, not zlib"):
                gathering.meet()


class VectorTests(RamCase):
    @given(st.lists(st.integers(0, 63), max_size=20), st.integers(0, 20 * (PAGE + 8)))
    def test_pages(self, pages: list[int], sent: int) -> None:
        """Each page goes out behind its head, and goes on where the kernel took only a part."""
        self.ram.host[:] = np.arange(64, dtype=np.uint8)[:, None]
        heads = np.arange(len(pages), dtype=">u8")
        wanted = b"".join(
            index.to_bytes(8, "big") + bytes([page]) * PAGE for index, page in enumerate(pages)
        )
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            places, records = np.array(pages, np.int64) * PAGE, Records()
            vector = records.vector(heads, self.ram.host.ctypes.data, places)
            count = send(ours, vector)
            left = behind(vector, min(sent, count))
            ours.close()
            received = bytearray()
            while data := theirs.recv(1 << 20):
                received += data
        self.assertEqual(wanted, bytes(received))
        self.assertEqual(len(wanted), count)
        rest = b"".join(ctypes.string_at(int(at), int(size)) for at, size in left)
        self.assertEqual(wanted[sent:], rest)

    @given(
        st.one_of(
            st.sets(st.integers(0, 63), min_size=1, max_size=20).map(sorted),
            st.builds(range, st.integers(0, 30), st.integers(31, 64)).map(list),
        ),
        st.integers(1, 6),
    )
    def test_packets(self, pages: list[int], room: int) -> None:
        """Each packet's pages are behind its head."""
        self.ram.host[:] = np.arange(64, dtype=np.uint8)[:, None]
        parts = [pages[at : at + room] for at in range(0, len(pages), room)]
        heads = np.arange(100, 100 + 8 * len(parts), dtype=np.uint8).reshape(len(parts), 8)
        places = np.array(pages, np.int64) * PAGE
        vector, at = packets(heads, room, self.ram.host.ctypes.data, places)
        found = [ctypes.string_at(int(where), int(size)) for where, size in vector]
        ends = [*at[1:].tolist(), len(vector)]
        for some, head, first, end in zip(parts, heads, at.tolist(), ends, strict=True):
            self.assertEqual(head.tobytes(), found[first])
            wanted = b"".join(bytes([page]) * PAGE for page in some)
            self.assertEqual(wanted, b"".join(found[first + 1 : end]))


class AheadTests(SynchronousTestCase):
    def test_ahead(self) -> None:
        """No more is made ready than what goes out soon, so that a slow link can be given up."""
        self.assertEqual(512, ahead(0, 1.0))
        self.assertEqual(512, ahead(1 << 20, 1.0))
        for rate in (125_000_000, 1 << 30):
            self.assertAlmostEqual(0.02, ahead(rate * 3, 3.0) * PAGE / rate, 3)
        self.assertEqual(8192, ahead(4 << 30, 1.0))


class IncomingTests(SynchronousTestCase):
    def failure(self, *pieces: bytes) -> str:
        """What is said of a connection on which this comes, and then no more."""
        start = parse(["-m", "1M", "-incoming", "defer", "-qmp", "unix:none"])
        over = threading.Event()

        def notify(name: str, data: Mapping[str, Any]) -> None:
            if data.get("status") == "failed":
                over.set()

        machine = Machine(start, notify, lambda: None)
        machine.settings.switch([{"capability": "events", "state": True}])
        self.addCleanup(machine.close)
        path = self.mktemp()
        machine.receive(f"unix:{path}", stay=True)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            for piece in pieces:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            self.assertTrue(over.wait(30))
        return str(machine.query_migrate()["error-desc"])

    def test_begins(self) -> None:
        """A connection is known by its first four bytes, in whatever pieces they come."""
        self.assertIn("version 3 of the stream", self.failure(b"Q", b"EV", b"M\0\0\0", b"\4"))
        self.assertIn("begins with b'GET '", self.failure(b"GE", b"T / HTTP/1.1"))
        self.assertIn("it ended after 2 bytes", self.failure(b"QE"))
        self.assertIn("side closed", self.failure(b"\x11\x22\x33", b"\x44\0\0"))


class ChannelTests(SynchronousTestCase):
    def test_much(self) -> None:
        """What comes in bulk is taken in bulk, and what is little is not waited with."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            ours = Channel(socket.create_connection(server.getsockname()))
            theirs = Channel(server.accept()[0])
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        wanted = np.random.default_rng(1).integers(0, 256, 16 << 20, np.uint8).tobytes()
        thread = threading.Thread(target=ours.send, args=([wanted],))
        thread.start()
        received, space, pieces = bytearray(), memoryview(bytearray(4 << 20)), 0
        while len(received) < len(wanted):
            received += space[: theirs.receive_much(space)]
            pieces += 1
        thread.join()
        self.assertEqual(wanted, bytes(received))
        # The kernel hands over 64 KiB each time to somebody who takes all that there is.
        self.assertLess(pieces, 128)
        ours.send([b"little"])
        self.assertEqual(b"little", space[: theirs.receive_much(space)])
        ours.close()
        self.assertEqual(0, theirs.receive_much(space))


class OptionsTests(SynchronousTestCase):
    def test_table(self) -> None:
        """Sizes are written as people write them."""
        options = from_table({"size": "64M", "dirty-rate": "50M/s", "pattern": "random"})
        self.assertEqual((64 << 20, 50 << 20), (options.size, options.dirty_rate))
        self.assertEqual(32 << 20, options.window)
        self.assertEqual(MemoryOptions(), from_table({}))

    def test_refused(self) -> None:
        """What is wrong is named, with what would do."""
        for table, words in (
            ({"size": "12"}, "from 1048576 to"),
            ({"size": "much"}, "size cannot be 'much'"),
            ({"size": 1 << 20 | 5}, "whole pages"),
            ({"dirty-rate": -1}, "dirty-rate cannot be -1"),
            ({"pattern": "randon"}, "did you mean random"),
            ({"fill": 1}, "fill cannot be 1"),
            ({"prealloc": 1}, "prealloc must be true or false"),
            ({"incoming": "yes"}, "incoming must be true or false"),
            ({"working-set": "2G"}, "cannot be more than the size"),
            ({"ram": 1}, "there is no 'ram'"),
        ):
            with self.assertRaisesRegex(ArgumentError, words):
                from_table(table)

    @given(st.integers(256, 1 << 20), st.integers(0, 1 << 40), st.sampled_from(PATTERNS))
    def test_command_line(self, pages: int, rate: int, pattern: str) -> None:
        """A command line says what the options said."""
        options = MemoryOptions(
            pages * PAGE, rate, pattern, working_set=5 * PAGE, fill="random", prealloc=rate % 2 == 0
        )
        argv = options.argv("a guest")[4:]
        start = parse([*argv, "-qmp", "unix:/a,,b,server=on,wait=off"])
        self.assertEqual((options, "a guest", "/a,b"), (start.options, start.name, start.qmp))
        there = MemoryOptions(options.size, prealloc=options.prealloc)
        self.assertEqual(options, there.with_program(options.program))

    @given(st.integers(0, 1 << 63), st.integers(0, 1 << 63), st.booleans())
    def test_devices(self, ticks: int, written: int, running: bool) -> None:
        """What the devices hold survives the way."""
        state = State(ticks, written, running, {"pattern": "x"}, [{"at": "here", "from": 0}])
        self.assertEqual(state, State.decode(state.encode()))
        with self.assertRaises(ValueError):
            State.decode(state.encode()[1:])


class ImportTests(SynchronousTestCase):
    def test_the_daemon_does_without_numpy(self) -> None:
        """A daemon that starts has not loaded what only a guest's process needs."""
        script = (
            "import sys\nimport qmigd.daemon.service\n"
            "print('numpy' in sys.modules, 'qmigd.guests.memory.options' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        self.assertEqual("False True", done.stdout.strip())
