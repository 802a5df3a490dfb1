"""Channels of packets: both ways, in any pieces, and what is refused."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any
from uuid import UUID

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import StreamError
from qmigd.stream.events import (
    End,
    Event,
    MultifdFlush,
    Pages,
    SectionEnd,
    SectionStart,
    Zeros,
)
from qmigd.stream.format import SectionType
from qmigd.stream.joining import join
from qmigd.stream.multifd import (
    COMPRESSIONS,
    DEVICE_STATE,
    HEAD_SIZE,
    PACKET_SIZE,
    SYNC,
    Decompressor,
    DevicePacket,
    DeviceState,
    FullPackets,
    Initial,
    Packer,
    PageData,
    PagePacket,
    Unpacker,
    packet_size,
    page_packet_size,
    read_initial,
    read_packet,
    runs,
)

PAGE = 65536
ROOM = PACKET_SIZE // PAGE
BLOCKS = {"pc.ram": 64 * PAGE, "vga.vram": 16 * PAGE}
UUID_ = UUID("5d3c9a52-7d0e-4a57-9a11-6b1f9f0d7a01")
BEGINNING = Initial(UUID_, 3).encode()

#: Where the fields of a packet of pages are.
FLAGS, NORMAL, SIZE, ZERO, NAME, OFFSETS = 8, 16, 20, 32, 64, 320


def page(number: int) -> bytes:
    """Return a page that does not compress to nothing."""
    return np.random.default_rng(number).integers(0, 16, PAGE, np.uint8).tobytes()


def ram_packet(number: int, normal: Sequence[int], zero: Sequence[int]) -> PagePacket:
    """Return the packet in front of these pages, numbered from 0, without its payload."""
    head, *_ = Packer(page_size=PAGE).pages(
        number,
        "pc.ram",
        [n * PAGE for n in normal],
        [page(n) for n in normal],
        [n * PAGE for n in zero],
    )
    packet = read_packet(head, PAGE)
    assert isinstance(packet, PagePacket)
    return packet


@st.composite
def contents(draw: st.DrawFn) -> list[tuple[str, list[int], list[int]]]:
    """What goes through a channel: kind, normal pages, zero pages."""
    found = []
    for kind in draw(
        st.lists(st.sampled_from(["pages", "sync", "old sync", "device"]), max_size=4)
    ):
        pages = draw(st.lists(st.integers(0, 15), max_size=ROOM, unique=True))
        split = draw(st.integers(0, len(pages)))
        found.append((kind, pages[:split], pages[split:]))
    return found


def packed(told: Iterable[tuple[str, list[int], list[int]]], compression: str) -> bytes:
    """Return what goes through a channel for that."""
    packer = Packer(page_size=PAGE, compression=compression)
    out: list[bytes | bytearray | memoryview] = [BEGINNING]
    for number, (kind, normal, zero) in enumerate(told):
        if kind == "sync":
            out.append(packer.sync(number))
        elif kind == "device":
            out += packer.device_state("0000:00:04.0/vfio", 2, bytes(normal))
        else:
            out += packer.pages(
                number,
                "vga.vram",
                [n * PAGE for n in normal],
                [page(n) for n in normal],
                [n * PAGE for n in zero],
                sync=kind == "old sync",
            )
    return b"".join(out)


def unpacked(data: bytes, cuts: Iterable[int] = ()) -> list[Initial | PageData | DeviceState]:
    unpacker = Unpacker(page_size=PAGE, blocks=BLOCKS)
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    found = [event for start, end in pairwise(places) for event in unpacker.feed(data[start:end])]
    unpacker.end()
    assert unpacker.position == len(data)
    return found


def told_by(
    events: Iterable[Initial | PageData | DeviceState],
) -> list[tuple[str, list[int], list[int]]]:
    """Return what :func:`packed` was given, having looked at everything else."""
    found: list[tuple[str, list[int], list[int]]] = []
    for number, event in enumerate(list(events)[1:]):
        if isinstance(event, DeviceState):
            assert event.packet.device == "0000:00:04.0/vfio" and event.packet.instance == 2
            assert event.left == 0 and event.packet.payload == len(event.data)
            found.append(("device", list(event.data), []))
            continue
        assert isinstance(event, PageData) and event.packet.number == number
        normal = (event.packet.normal // PAGE).tolist()
        zero = (event.packet.zero // PAGE).tolist()
        assert [row.tobytes() for row in event.data] == [page(n) for n in normal]
        if normal or zero:
            assert event.packet.block == "vga.vram"
        kind = ("old sync" if event.packet.sync else "pages") if normal or zero else ""
        found.append((kind or ("sync" if event.packet.sync else "pages"), normal, zero))
    return found


class RoundTripTests(SynchronousTestCase):
    @settings(deadline=None, max_examples=40)
    @given(
        contents(),
        st.sampled_from(list(COMPRESSIONS)),
        st.lists(st.integers(0, 1 << 24), max_size=5),
    )
    def test_unpacked_again(
        self, told: list[tuple[str, list[int], list[int]]], compression: str, cuts: list[int]
    ) -> None:
        """What was packed is unpacked, in whatever pieces it comes, with every compression."""
        data = packed(told, compression)
        expected = [
            ("sync", [], []) if kind == "old sync" and not normal + zero
            else (kind, normal, [] if kind == "device" else zero) if kind != "sync"
            else ("sync", [], [])
            for kind, normal, zero in told
        ]  # fmt: skip
        self.assertEqual(told_by(unpacked(data, cuts)), expected)

    def test_byte_by_byte(self) -> None:
        """The same holds where each byte comes alone."""
        told = [("pages", [1], [2]), ("sync", [], []), ("device", [1, 2], []), ("device", [], [])]
        data = packed(told, "zstd")
        self.assertEqual(told_by(unpacked(data, range(len(data)))), told)

    def test_large_state_of_a_device(self) -> None:
        """It is handed on in parts, before all of it has come."""
        data = Packer().device_state("vfio", 0, bytes(5 << 19))
        unpacker = Unpacker()
        list(unpacker.feed(BEGINNING))
        list(unpacker.feed(data[0]))
        first = list(unpacker.feed(bytes(data[1])[: 3 << 19]))
        rest = list(unpacker.feed(bytes(data[1])[3 << 19 :]))
        parts = [*first, *rest]
        lefts = [part.left for part in parts if isinstance(part, DeviceState)]
        self.assertEqual((len(first), lefts), (1, [3 << 19, 1 << 19, 0]))
        unpacker.end()


class PacketTests(SynchronousTestCase):
    """Each field, written down by hand."""

    def test_initial_packet(self) -> None:
        """64 bytes: the magic, version 1, the guest's UUID, the number of the channel."""
        self.assertEqual(BEGINNING.hex(), "1122334400000001" + UUID_.hex + "03" + "00" * 39)
        self.assertEqual(read_initial(BEGINNING), Initial(UUID_, 3))

    def test_packet_of_pages(self) -> None:
        """320 bytes, and room for all offsets that a packet can have; then the pages."""
        normal, zero = [0, PAGE, 5 * PAGE], [2 * PAGE]
        ram = b"".join(map(page, range(6)))
        head, *payload = Packer(page_size=PAGE).pages(
            7, "pc.ram", normal, runs(ram, normal, PAGE), zero
        )
        self.assertEqual(
            bytes(head),
            struct.pack(">6IQI28x256s", 0x11223344, 1, 0, 8, 3, 3 * PAGE, 7, 1, b"pc.ram")
            + struct.pack(">8Q", 0, PAGE, 5 * PAGE, 2 * PAGE, 0, 0, 0, 0),
        )
        self.assertEqual([bytes(part) for part in payload], [page(0) + page(1), page(5)])

    def test_sync(self) -> None:
        """A packet that says SYNC has nothing else, but is as long as all."""
        head = bytes(Packer(page_size=PAGE).sync(9))
        self.assertEqual(
            head, struct.pack(">6IQ", 0x11223344, 1, 1, 0, 0, 0, 9) + bytes(288 + 8 * ROOM)
        )

    def test_state_of_a_device(self) -> None:
        """276 bytes in front of it."""
        head, data = Packer().device_state("dev", 4, b"state")
        self.assertEqual(
            (head, data),
            (struct.pack(">3I256s2I", 0x11223344, 1, 64, b"dev", 4, 5), b"state"),
        )
        self.assertEqual(packet_size(head[:HEAD_SIZE], PAGE), 276)
        self.assertEqual(read_packet(head, PAGE), DevicePacket("dev", 4, 5))

    def test_compression_goes_on(self) -> None:
        """A page that was sent before takes next to nothing the second time."""
        for compression in ("zlib", "zstd"):
            packer = Packer(compression=compression)
            data = page(1)[:4096]
            first = packer.pages(0, "pc.ram", [0], [data])
            second = packer.pages(1, "pc.ram", [0], [data])
            self.assertLess(10 * len(second[1]), len(first[1]))

    def test_what_an_old_qemu_leaves(self) -> None:
        """Where there are no pages, their size and their block are those of another packet."""
        head = Packer(page_size=PAGE).pages(1, "pc.ram", [0], [page(0)], sync=True)[0]
        old = bytearray(head)
        struct.pack_into(">I", old, NORMAL, 0)
        packet = read_packet(old, PAGE, blocks=BLOCKS)
        assert isinstance(packet, PagePacket)
        self.assertEqual((packet.payload, packet.block, packet.sync), (0, "", True))

    def test_too_much(self) -> None:
        """More pages than a packet has room for are refused, and data of other pages."""
        packer = Packer(page_size=PAGE)
        with self.assertRaisesRegex(ValueError, "9 pages do not fit"):
            packer.pages(0, "pc.ram", [], [], range(9))
        with self.assertRaisesRegex(ValueError, "not that of 1 pages"):
            packer.pages(0, "pc.ram", [0], [bytes(PAGE - 1)])
        with self.assertRaisesRegex(ValueError, "1 to 255"):
            packer.pages(0, "x" * 256, [0], [bytes(PAGE)])

    @given(st.lists(st.integers(0, 63), max_size=3 * ROOM))
    def test_heads(self, pages: list[int]) -> None:
        """Packets in a row are those that one makes one by one."""
        packer = Packer(page_size=PAGE)
        heads = packer.heads(7, "pc.ram", np.array(pages, np.int64) * PAGE)
        wanted = []
        for at in range(0, len(pages), ROOM):
            some = pages[at : at + ROOM]
            data = [bytes(PAGE)] * len(some)
            places = [n * PAGE for n in some]
            wanted.append(packer.pages(7 + at // ROOM, "pc.ram", places, data)[0])
        self.assertEqual(b"".join(wanted), heads.tobytes())

    def test_heads_of_compressed_pages(self) -> None:
        """How long their packets are is known only when they are compressed."""
        with self.assertRaisesRegex(ValueError, "compressed"):
            Packer(page_size=PAGE, compression="zlib").heads(0, "pc.ram", [0])

    @given(st.integers(0, 64), st.integers(0, 2**64 - 1), st.data())
    def test_full(self, first: int, number: int, data: Any) -> None:
        """A packet of neighbours is known, and nothing else is taken for one."""
        packet = bytearray(page_packet_size(PAGE))
        full = FullPackets(packet, PAGE, "pc.ram", BLOCKS["pc.ram"])
        places = np.arange(first, first + ROOM) * PAGE
        packet[:] = Packer(page_size=PAGE).heads(0, "pc.ram", places).tobytes()
        struct.pack_into(">Q", packet, 24, number)
        self.assertEqual(first * PAGE if first <= 64 - ROOM else None, full.first())
        at = data.draw(st.one_of(st.integers(0, 23), st.integers(32, len(packet) - 1)))
        packet[at] ^= 1 << data.draw(st.integers(0, 7))
        self.assertIsNone(full.first())
        packet[:] = Packer(page_size=PAGE).heads(0, "pc.ram", places[:-1]).tobytes()
        self.assertIsNone(full.first())

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 15), max_size=30))
    def test_runs(self, pages: list[int]) -> None:
        """Views of RAM are these pages one after the other, neighbours in one."""
        ram = b"".join(bytes([n]) * 4 for n in range(16))
        views = runs(ram, [n * 4 for n in pages], 4)
        self.assertEqual(b"".join(views), b"".join(bytes([n]) * 4 for n in pages))
        breaks = sum(second != first + 1 for first, second in pairwise(pages))
        self.assertEqual(len(views), breaks + 1 if pages else 0)


class RefusedTests(SynchronousTestCase):
    """What is refused, with the place of what is wrong."""

    HEAD = bytes(Packer(page_size=PAGE).pages(1, "pc.ram", [PAGE], [page(0)], [0])[0])

    def changed(self, at: int, value: int, form: str = ">I") -> bytes:
        data = bytearray(self.HEAD)
        struct.pack_into(form, data, at, value)
        return bytes(data)

    def refused(self, data: bytes, at: int, text: str) -> None:
        """Check that the packet behind the beginning is refused for what is at ``at``."""
        unpacker = Unpacker(page_size=PAGE, blocks=BLOCKS)
        list(unpacker.feed(BEGINNING))
        with self.assertRaisesRegex(StreamError, text) as caught:
            list(unpacker.feed(data))
        self.assertEqual(caught.exception.offset, len(BEGINNING) + at)
        with self.assertRaisesRegex(StreamError, "nothing more"):
            list(unpacker.feed(b"x"))

    def test_fields(self) -> None:
        """Each field that cannot be."""
        self.refused(self.changed(0, 0x51455645), 0, "magic 0x11223344 and version 1, found 0x5145")
        self.refused(self.changed(4, 2), 0, "0x11223344 and 2")
        self.refused(self.changed(FLAGS, 1 << 7), FLAGS, "0x80")
        self.refused(self.changed(FLAGS, 4 << 1), FLAGS, "none, zlib, zstd, found flags 0x8")
        self.refused(self.changed(NORMAL, 8), NORMAL, "8 normal and 1 zero")
        self.refused(self.changed(NORMAL, 0xFFFFFFFF), NORMAL, "at most 8 pages")
        self.refused(self.changed(ZERO, 0xFFFFFFFF), NORMAL, "at most 8 pages")
        self.refused(self.changed(SIZE, PAGE + 1), SIZE, f"{PAGE} bytes of pages")
        self.refused(self.changed(NAME, 0x78787878), NAME, "a block of RAM that there is")
        self.refused(self.changed(NAME + 1, 0xFFFFFFFF), NAME, "a name")
        self.refused(self.HEAD[:NAME] + b"x" * 256 + self.HEAD[OFFSETS:], NAME, "no zero")
        self.refused(self.changed(OFFSETS, 1, ">Q"), OFFSETS, "found 0x1")
        beyond = BLOCKS["pc.ram"]
        self.refused(self.changed(OFFSETS + 8, beyond, ">Q"), OFFSETS + 8, hex(beyond))
        self.refused(self.changed(OFFSETS, 0xFFFFFFFFFFFF0000, ">Q"), OFFSETS, "0xffffffffffff0000")
        large = bytearray(self.changed(FLAGS, COMPRESSIONS["zlib"]))
        struct.pack_into(">I", large, SIZE, 2 * PACKET_SIZE + 1)
        self.refused(bytes(large), SIZE, "at most 1048576 bytes")

    def test_beginning(self) -> None:
        """Something else than an initial packet."""
        with self.assertRaisesRegex(StreamError, "magic") as caught:
            list(Unpacker().feed(b"QEVM".ljust(64, b"\0")))
        self.assertEqual(caught.exception.offset, 0)

    def test_compressed_pages(self) -> None:
        """What cannot be unpacked, or is unpacked to more or fewer pages."""
        for compression in ("zlib", "zstd"):
            head, data = Packer(page_size=PAGE, compression=compression).pages(
                1, "pc.ram", [0, PAGE], [page(0), page(1)]
            )
            at = len(head)
            for number, text in ((1, "65536 bytes .* more"), (3, "196608 bytes .* 131072")):
                other = bytearray(head)
                struct.pack_into(">I", other, NORMAL, number)
                struct.pack_into(">Q", other, OFFSETS + 16, 2 * PAGE)
                self.refused(bytes(other) + bytes(data), at, text)
            garbled = bytearray(data)
            garbled[:20] = bytes(range(100, 120))
            self.refused(bytes(head) + garbled, at, f"compressed with {compression}")

    def test_bomb(self) -> None:
        """Not much more is unpacked than the pages that the packet has."""
        for compression in ("zlib", "zstd"):
            packer = Packer(compression=compression, page_size=PAGE)
            data = b"".join(
                packer.pages(0, "pc.ram", [n * PAGE for n in range(8)], [bytes(PAGE)] * 8)[1]
                for _ in range(200)
            )
            unpack = Decompressor(compression)
            tracemalloc.start()
            try:
                with self.assertRaisesRegex(StreamError, "more"):
                    unpack(data, PAGE)
                self.assertLess(tracemalloc.get_traced_memory()[1], 1 << 20)
            finally:
                tracemalloc.stop()

    def test_window(self) -> None:
        """A frame that needs more memory than QEMU's highest level is refused; that one is not."""
        data = page(1)
        for level in (1, 20):
            packed_page = Packer(page_size=PAGE, compression="zstd", level=level)
            self.assertEqual(
                Decompressor("zstd")(packed_page.pages(0, "pc.ram", [0], [data])[1], PAGE), data
            )
        # A frame header by itself: magic, no flags, a window of 2 to the power 26.
        with self.assertRaisesRegex(StreamError, "compressed with zstd"):
            Decompressor("zstd")(bytes.fromhex("28b52ffd 00 80 0100000000"), PAGE)

    def test_lengths_allocate_nothing(self) -> None:
        """A length of 4 GiB takes no memory before that many bytes have come."""
        head = bytes(Packer(page_size=PAGE).device_state("dev", 0, b"x")[0])
        huge = head[:-4] + b"\xff\xff\xff\xff"
        unpacker = Unpacker(page_size=PAGE)
        list(unpacker.feed(BEGINNING))
        tracemalloc.start()
        try:
            self.assertEqual(list(unpacker.feed(huge)), [])
            list(unpacker.feed(b"x"))
            self.assertLess(tracemalloc.get_traced_memory()[1], 1 << 16)
        finally:
            tracemalloc.stop()
        self.assertEqual(unpacker.missing, (1 << 20) - 1)

    def test_cut(self) -> None:
        """A channel may end between two packets only."""
        data = packed([("pages", [1], []), ("sync", [], [])], "none")
        whole = {len(BEGINNING), len(BEGINNING) + OFFSETS + 8 * ROOM + PAGE, len(data)}
        for end in {0, 1, len(BEGINNING) + 5, 500, len(data) - 1} | whole:
            unpacker = Unpacker(page_size=PAGE)
            list(unpacker.feed(data[:end]))
            if end in whole:
                unpacker.end()
                continue
            with self.assertRaisesRegex(StreamError, "more bytes of a channel") as caught:
                unpacker.end()
            self.assertEqual(caught.exception.offset, end)

    @settings(deadline=None)
    @given(st.binary(max_size=64), st.integers(0, 400), st.sampled_from(list(COMPRESSIONS)))
    def test_garbled(self, junk: bytes, at: int, compression: str) -> None:
        """Whatever comes, it is taken or refused, and held is no more than one packet."""
        data = bytearray(packed([("pages", [1], [2]), ("device", [3], [])], compression))
        data[at : at + len(junk)] = junk
        unpacker = Unpacker(page_size=PAGE, blocks=BLOCKS)
        try:
            list(unpacker.feed(bytes(data)))
            unpacker.end()
        except StreamError as error:
            self.assertLessEqual(error.offset, len(data))
        self.assertLessEqual(unpacker.missing, max(2 * PACKET_SIZE, 1 << 20))

    def test_flags_of_the_format(self) -> None:
        """The flags are QEMU's."""
        self.assertEqual((SYNC, DEVICE_STATE), (1, 64))
        self.assertEqual(dict(COMPRESSIONS), {"none": 0, "zlib": 2, "zstd": 4})
        self.assertEqual(ram_packet(5, [1], [0, 2]).zero.tolist(), [0, 2 * PAGE])


class JoinTests(SynchronousTestCase):
    """What goes through several channels as if it had been one."""

    SETUP = (
        SectionStart(0, SectionType.START, 2, "ram", 0, 4),
        SectionEnd(0, 2),
    )
    ROUND = (SectionStart(0, SectionType.PART, 2, "ram", 0, 4), SectionEnd(50, 2))
    END = End(0)

    def channel(self, *told: tuple[str, list[int], list[int]]) -> list[Any]:
        return unpacked(packed(told, "none"))

    def shown(self, main: Iterable[Event], *channels: list[Any]) -> list[str]:
        """Return where the pages are between the other events."""
        found = []
        for event in join(main, channels):
            if isinstance(event, Pages | Zeros):
                found.append(f"{type(event).__name__} {(event.offsets // PAGE).tolist()}")
            else:
                found.append(type(event).__name__)
        return found

    def test_each_section(self) -> None:
        """With old machine types a round ends with each section of RAM."""
        sync: tuple[str, list[int], list[int]] = ("sync", [], [])
        one = self.channel(sync, ("pages", [1], []), ("old sync", [2], []), ("pages", [], []))
        other = self.channel(sync, ("pages", [3], [4]), sync)
        self.assertEqual(
            self.shown([*self.SETUP, *self.ROUND, self.END], one, other),
            ["SectionStart", "SectionEnd", "SectionStart"]
            + ["Pages [1]", "Pages [2]", "Pages [3]", "Zeros [4]", "SectionEnd", "End"],
        )

    def test_each_flush(self) -> None:
        """With newer ones it ends where it is said, and sections do not count."""
        sync: tuple[str, list[int], list[int]] = ("sync", [], [])
        one = self.channel(sync, ("pages", [1], []), sync)
        start, end = self.SETUP
        main: list[Event] = [start, MultifdFlush(0), end, *self.ROUND, *self.ROUND]
        main[-1:-1] = [MultifdFlush(60)]
        self.assertEqual(
            self.shown([*main, self.END], one),
            ["SectionStart", "SectionEnd"] * 2 + ["SectionStart", "Pages [1]", "SectionEnd", "End"],
        )

    def test_refused(self) -> None:
        """Channels that end before, or go on behind, the main one; and state of devices."""
        sync: tuple[str, list[int], list[int]] = ("sync", [], [])
        main: list[Event] = [*self.SETUP, *self.ROUND, self.END]
        with self.assertRaisesRegex(StreamError, "a packet with SYNC in each") as caught:
            self.shown(main, self.channel(sync))
        self.assertEqual(caught.exception.offset, 50)
        with self.assertRaisesRegex(StreamError, "the end of the channel, found more pages"):
            self.shown(main, self.channel(sync, sync, ("pages", [1], [])))
        with self.assertRaisesRegex(ValueError, "State of devices"):
            self.shown(main, self.channel(sync, ("device", [1], []), sync))
