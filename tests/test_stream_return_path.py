"""What the destination says, and what the commands of postcopy have in them, both ways."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import StreamError
from qmigd.stream import postcopy
from qmigd.stream.format import CommandNumber
from qmigd.stream.return_path import (
    Bitmap,
    Message,
    PageRequest,
    Pong,
    ResumeAck,
    ReturnPath,
    Shut,
    SwitchoverAck,
    Unknown,
    encode,
    request_pages,
)

PAGE = 4096
BLOCKS = {"pc.ram": 200 * PAGE, "0000:00:02.0/vga.vram": 64 * PAGE}

REQUEST = st.builds(
    lambda block, start: PageRequest(block, start * PAGE, PAGE),
    st.sampled_from(list(BLOCKS)),
    st.integers(0, 63),
)
MESSAGE: st.SearchStrategy[Message] = st.one_of(
    st.builds(Shut, st.sampled_from([0, 1, 0xFFFFFFFF])),
    st.builds(Pong, st.integers(0, 0xFFFFFFFF)),
    REQUEST,
    st.just(ResumeAck()),
    st.just(SwitchoverAck()),
    st.builds(Unknown, st.integers(8, 0xFFFF), st.binary(max_size=512)),
    st.builds(
        lambda block, seed: Bitmap(
            block, np.random.default_rng(seed).integers(0, 2, BLOCKS[block] // PAGE).astype(bool)
        ),
        st.sampled_from(list(BLOCKS)),
        st.integers(0, 9),
    ),
)


def said(data: bytes, cuts: Iterable[int] = ()) -> list[Message]:
    path = ReturnPath(BLOCKS)
    places = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    found = [message for start, end in pairwise(places) for message in path.feed(data[start:end])]
    path.end()
    return found


def shown(messages: Iterable[Message]) -> list[object]:
    """Return what can be compared."""
    return [
        (message.block, message.pages.tolist()) if isinstance(message, Bitmap) else message
        for message in messages
    ]


class ReturnPathTests(SynchronousTestCase):
    @settings(deadline=None)
    @given(st.lists(MESSAGE, max_size=6), st.lists(st.integers(0, 9999), max_size=6))
    def test_heard_again(self, messages: list[Message], cuts: list[int]) -> None:
        """What was said is heard, in whatever pieces it comes; byte by byte as well."""
        data = b"".join(map(encode, messages))
        self.assertEqual(shown(said(data, cuts)), shown(messages))
        self.assertEqual(shown(said(data, range(len(data)))), shown(messages))

    def test_each_message(self) -> None:
        """Each of them, written down by hand."""
        pages = np.zeros(66, bool)
        pages[[0, 9, 65]] = True
        vectors = {
            encode(Shut(1)): "0001000400000001",
            encode(Pong(66)): "0002000400000042",
            encode(PageRequest("a", 0x3000, 0x1000)): "0003000e"
            "0000000000003000" "00001000" "0161",
            encode(PageRequest("", 0x3000, 0x1000)): "0004000c" "0000000000003000" "00001000",
            encode(Bitmap("a", pages)): "00050002" "0161" "0000000000000010"
            "0102000000000000" "0200000000000000" "0123456789abcdef",
            encode(ResumeAck()): "0006000400000001",
            encode(SwitchoverAck()): "00070000",
        }  # fmt: skip
        self.assertEqual([data.hex() for data in vectors], list(vectors.values()))

    def test_short_request(self) -> None:
        """A request for the same block leaves its name out, and is heard with it."""
        one, two = BLOCKS
        data = b"".join(
            [
                request_pages(0, PAGE, one, ""),
                request_pages(PAGE, PAGE, one, one),
                request_pages(0, PAGE, two, one),
                request_pages(0, 2 * PAGE, two, two),
            ]
        )
        self.assertEqual(
            said(data),
            [
                PageRequest(one, 0, PAGE),
                PageRequest(one, PAGE, PAGE),
                PageRequest(two, 0, PAGE),
                PageRequest(two, 0, 2 * PAGE),
            ],
        )
        self.assertEqual([data[0:2], data[22 + 1 : 22 + 3]], [b"\0\3", b"\0\4"])

    def refused(self, data: bytes, at: int, text: str) -> None:
        path = ReturnPath(BLOCKS)
        self.assertEqual(list(path.feed(encode(Pong(1)))), [Pong(1)])
        heard = []
        with self.assertRaisesRegex(StreamError, text) as caught:
            for message in path.feed(encode(Pong(2)) + data):
                heard.append(message)
        self.assertEqual((heard, caught.exception.offset), ([Pong(2)], 16 + at))

    def test_refused(self) -> None:
        """What cannot be, with its place; what came before it has been heard."""
        self.refused(bytes.fromhex("000100050000000000"), 2, "4 bytes in a message of type 1")
        self.refused(bytes.fromhex("00070001"), 2, "0 bytes in a message of type 7, found 1")
        self.refused(bytes.fromhex("00990201"), 2, "at most 512 bytes .* found 513")
        self.refused(bytes.fromhex("0006000400000002"), 4, "RESUME_ACK with 1, found 0x00000002")
        self.refused(encode(PageRequest("", 0, PAGE)), 4, "the name of a block")
        self.refused(encode(PageRequest("x", 0, PAGE)), 17, "a block of RAM that there is")
        self.refused(encode(PageRequest("pc.ram", 1, PAGE)), 4, "4096 bytes from 0x1")
        self.refused(encode(PageRequest("pc.ram", 0, 0)), 4, "0 bytes from 0x0")
        self.refused(encode(PageRequest("pc.ram", 199 * PAGE, 2 * PAGE)), 4, "8192 bytes from")
        self.refused(encode(PageRequest("pc.ram", (1 << 64) - PAGE, PAGE)), 4, "from 0xf{13}000")
        self.refused(bytes.fromhex("00030003000000"), 4, "start and length")
        self.refused(bytes.fromhex("0003000e") + bytes(12) + b"\x05x", 16, "a name of 5 bytes")
        self.refused(encode(Bitmap("pc.ram", np.zeros(64, bool))), 11, "32 bytes .* found 8")
        bitmap = encode(Bitmap("pc.ram", np.zeros(200, bool)))
        self.refused(bitmap[:-1] + b"\xee", len(bitmap) - 8, "0x0123456789abcdef behind")

    def test_cut(self) -> None:
        """It may end between two messages only."""
        data = encode(Pong(1)) + encode(Bitmap("pc.ram", np.ones(200, bool)))
        for end in range(len(data)):
            path = ReturnPath(BLOCKS)
            list(path.feed(data[:end]))
            if end in (0, 8):
                path.end()
                continue
            with self.assertRaisesRegex(StreamError, "more bytes of the return path") as caught:
                path.end()
            self.assertEqual(caught.exception.offset, end)

    def test_lengths_allocate_nothing(self) -> None:
        """A bitmap that is said to be huge takes no memory, not even for a huge block."""
        path = ReturnPath({"pc.ram": 1 << 60})
        head = encode(Bitmap("pc.ram", np.zeros(0, bool)))[:-16]
        tracemalloc.start()
        try:
            self.assertEqual(list(path.feed(head + struct.pack(">Q", 1 << 45) + b"x")), [])
            self.assertLess(tracemalloc.get_traced_memory()[1], 1 << 16)
        finally:
            tracemalloc.stop()

    @given(st.binary(max_size=200))
    def test_garbage(self, data: bytes) -> None:
        """Whatever comes, it is taken or refused."""
        path = ReturnPath(BLOCKS)
        try:
            list(path.feed(data))
            path.end()
        except StreamError as error:
            self.assertLessEqual(error.offset, len(data))

    def test_too_long(self) -> None:
        """QEMU takes no message of more than 512 bytes, so none is said."""
        with self.assertRaisesRegex(ValueError, "512"):
            encode(Unknown(99, bytes(513)))


class PostcopyTests(SynchronousTestCase):
    def test_each_command(self) -> None:
        """Each of them, written down by hand."""
        vectors = {
            postcopy.advise(postcopy.Advice(0x1000, 0x1000)): "0800030010"
            "0000000000001000" "0000000000001000",
            postcopy.advise(None): "0800030000",
            postcopy.listen(): "0800040000",
            postcopy.run(): "0800050000",
            b"".join(postcopy.discard("a", [[0x1000, 0x2000]])): "0800060014"
            "00" "0161" "00" "0000000000001000" "0000000000002000",
            b"".join(postcopy.packaged([b"ab", b"c"])): "0800070004" "00000003" "616263",
            postcopy.resume(): "0800090000",
            postcopy.recv_bitmap("a"): "08000a0002" "0161",
        }  # fmt: skip
        self.assertEqual([data.hex() for data in vectors], list(vectors.values()))

    @given(
        st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=255),
        st.lists(st.tuples(st.integers(0, 1 << 62), st.integers(0, 1 << 62)), max_size=40),
    )
    def test_discards(self, block: str, ranges: list[tuple[int, int]]) -> None:
        """They come in commands of up to 12 ranges, as QEMU's, and are read again."""
        commands = list(postcopy.discard(block, np.array(ranges, np.uint64)))
        found: list[tuple[int, ...]] = []
        for command in commands:
            number, length = struct.unpack_from(">HH", command, 1)
            self.assertEqual(
                (number, length), (CommandNumber.POSTCOPY_RAM_DISCARD, len(command) - 5)
            )
            read = postcopy.read_discard(command[5:])
            self.assertEqual(read.block, block)
            self.assertLessEqual(len(read.ranges), 12)
            found += map(tuple, read.ranges.tolist())
        self.assertEqual(found, ranges)
        self.assertEqual(len(commands), -(-len(ranges) // 12))

    def test_read(self) -> None:
        """What is in the others is read again."""
        advice = postcopy.Advice(0x201000, 0x1000)
        self.assertEqual(postcopy.read_advise(postcopy.advise(advice)[5:]), advice)
        self.assertIsNone(postcopy.read_advise(b""))
        self.assertEqual(postcopy.read_recv_bitmap(postcopy.recv_bitmap("pc.ram")[5:]), "pc.ram")
        self.assertEqual(postcopy.read_packaged(b"\0\1\0\0"), 65536)

    def test_refused(self) -> None:
        """What cannot be, with its place."""
        good = b"\0\1a\0" + struct.pack(">QQ", 0, PAGE)
        cases = [
            (lambda: postcopy.read_advise(bytes(8), 100), 100, "no data or 16 bytes"),
            (lambda: postcopy.read_packaged(bytes(8), 100), 100, "4 bytes in PACKAGED"),
            (lambda: postcopy.read_recv_bitmap(b"\2a", 100), 100, "a name of 2 bytes"),
            (lambda: postcopy.read_recv_bitmap(b"", 100), 100, "a name of 0 bytes"),
            (lambda: postcopy.read_discard(b"", 100), 100, "version 0 .* found nothing"),
            (lambda: postcopy.read_discard(b"\1" + good[1:], 100), 100, "version 0 .* found 0x01"),
            (lambda: postcopy.read_discard(b"\0\7a\0", 100), 101, "a name of 7 bytes"),
            (lambda: postcopy.read_discard(b"\0\1ab" + good[4:], 100), 103, "a zero behind"),
            (lambda: postcopy.read_discard(b"\0\1a", 100), 103, "a zero .* found nothing"),
            (lambda: postcopy.read_discard(good[:4], 100), 104, "pairs of start and length"),
            (lambda: postcopy.read_discard(good + b"x", 100), 104, "found 17 bytes"),
            (
                lambda: postcopy.read_discard(good + b"\xff" * 16, 100),
                120,
                "a range within 64 bits",
            ),
            (lambda: postcopy.read_discard(b"\0\1\xff\0" + good[4:], 100), 102, "a name"),
        ]  # fmt: skip
        for call, at, text in cases:
            with self.assertRaisesRegex(StreamError, text) as caught:
                call()
            self.assertEqual(caught.exception.offset, at)
