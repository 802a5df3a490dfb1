"""Greeting, Reply, role header and JSON: written, read in pieces, and refused."""

from __future__ import annotations

import uuid
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import LocalError, ProtocolError
from qmigd.wire import limits
from qmigd.wire.bodies import decode_object, encode_object
from qmigd.wire.greeting import MAGIC, Greeting, Reply, read_greeting
from qmigd.wire.messages import (
    Cancel,
    Error,
    Feature,
    Guest,
    Message,
    MessageType,
    Start,
    Status,
    read_message,
)
from qmigd.wire.opening import read_opening
from qmigd.wire.reading import Decoder, Reading
from qmigd.wire.role import RoleHeader

NAMES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=255)
FEATURES = st.lists(NAMES, unique=True, max_size=8).map(tuple)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=5)
SECRET = bytes(range(32))
MIGRATION = uuid.UUID("4cc11957-f1c9-4eff-8d2d-0a5f6f2b1d3e")


def admit_all(kind: MessageType, length: int) -> None:
    """Admit every message."""


def read(reading: Reading[Any], data: bytes) -> tuple[Any, int]:
    """Read an item in one piece; return it and how many bytes it took."""
    decoder = Decoder(reading)
    taken = decoder.feed(data)
    assert decoder.done, "the item is not complete"
    return decoder.item, taken


def read_by_pieces(reading: Reading[Any], data: bytes, cuts: list[int]) -> tuple[Any, int]:
    """Read an item in pieces of these sizes, over and over."""
    decoder = Decoder(reading)
    offset = turn = 0
    while decoder.wanted and offset < len(data):
        piece = data[offset : offset + cuts[turn % len(cuts)]]
        offset += decoder.feed(piece)
        turn += 1
    assert decoder.done, "the item is not complete"
    return decoder.item, offset


class Pieces(SynchronousTestCase):
    """However an item is cut, it is the same item, and not a byte after it is taken."""

    def check(self, make: Any, item: Any, rest: bytes, cuts: list[int]) -> None:
        data = item.encode()
        for found in (
            read(make(), data + rest),
            read_by_pieces(make(), data + rest, [1]),
            read_by_pieces(make(), data + rest, cuts),
        ):
            self.assertEqual(found, (item, len(data)))
        # Reading by ``wanted`` never asks for more than the item has left.
        decoder: Decoder[Any] = Decoder(make())
        left = data
        while decoder.wanted:
            self.assertLessEqual(decoder.wanted, len(left))
            decoder.feed(left[: decoder.wanted])
            left = data[decoder.taken :]
        self.assertEqual(decoder.item, item)

    @given(FEATURES, st.binary(), st.lists(st.integers(1, 40), min_size=1))
    def test_greeting(self, features: tuple[str, ...], rest: bytes, cuts: list[int]) -> None:
        """A Greeting comes out as it went in, at any cut."""
        self.check(lambda: read_greeting((1,)), Greeting((2, 1), features), rest, cuts)

    @given(FEATURES, st.binary(), st.lists(st.integers(1, 40), min_size=1))
    def test_reply(self, features: tuple[str, ...], rest: bytes, cuts: list[int]) -> None:
        """A Reply comes out as it went in, at any cut."""
        self.check(lambda: read_opening((1, 2)), Reply(1, features), rest, cuts)

    @given(
        st.uuids(allow_nil=False),
        NAMES,
        st.integers(0, 65535),
        st.binary(),
        st.lists(st.integers(1, 40), min_size=1),
    )
    def test_role(
        self, migration: uuid.UUID, channel: str, index: int, rest: bytes, cuts: list[int]
    ) -> None:
        """A role header comes out as it went in, at any cut, and its proof holds."""
        role = RoleHeader(migration, channel, index).prove(SECRET)
        self.check(lambda: read_opening((1,)), role, rest, cuts)
        self.assertTrue(role.verify(SECRET))
        self.assertFalse(role.verify(bytes(32)))

    @given(
        st.one_of(
            st.builds(Error, NAMES, st.text(st.characters(categories=["L", "N", "P"]))),
            st.builds(Guest, OBJECTS),
            st.builds(Feature, NAMES, OBJECTS.filter(lambda body: "withdrawn" not in body)),
            st.builds(Status, OBJECTS),
            st.builds(Cancel, st.text(st.characters(categories=["L", "N", "P"]))),
            st.just(Start()),
        ),
        st.binary(),
        st.lists(st.integers(1, 40), min_size=1),
    )
    def test_message(self, message: Message, rest: bytes, cuts: list[int]) -> None:
        """A message comes out as it went in, at any cut."""
        self.check(lambda: read_message(admit_all), message, rest, cuts)

    @given(st.binary(), st.booleans())
    def test_garbage(self, data: bytes, after_magic: bool) -> None:
        """Garbage is refused with a code, or waits for more; nothing else is raised.

        Whole and byte by byte come to the same, and the decoder takes no more
        than one item may have.
        """
        if after_magic:
            data = MAGIC + data
        for make in (
            lambda: read_greeting((1,)),
            lambda: read_opening((1,)),
            lambda: read_message(admit_all),
        ):
            verdicts: list[Any] = []
            for size in (max(1, len(data)), 1):
                decoder: Decoder[Any] = Decoder(make())
                try:
                    for offset in range(0, len(data), size):
                        decoder.feed(data[offset : offset + size])
                    item = decoder.item if decoder.done else None
                    verdicts.append((item, decoder.taken, decoder.wanted))
                except ProtocolError as error:
                    verdicts.append((error.code, None, decoder.wanted))
            self.assertEqual(verdicts[0], verdicts[1])


class Limits(SynchronousTestCase):
    """What is beyond a limit is refused on either side."""

    def refused(self, code: str, reading: Reading[Any], data: bytes) -> int:
        """Check that data are refused by this code; return how many bytes it took."""
        decoder = Decoder(reading)
        error = self.assertRaises(ProtocolError, decoder.feed, data)
        self.assertEqual(error.code, code)
        self.assertEqual(decoder.wanted, 0)
        return decoder.taken

    def test_four_billion(self) -> None:
        """A count of four billion is refused when its last byte is in."""
        data = MAGIC + b"\x01" + b"\xff" * 4
        self.assertEqual(self.refused("too-many", read_opening((1,)), data + bytes(100)), len(data))

    def test_opening_of_64_kib(self) -> None:
        """A Reply of exactly 64 KiB is taken; one byte more is refused before it is read."""
        # 17 bytes before the strings; 255 strings of 256 bytes, and one of what is left.
        names = [f"{number:03}" + "x" * 252 for number in range(255)]
        left = limits.MAX_OPENING - 17 - 255 * 256
        fits = Reply(1, (*names, "y" * (left - 1)))
        self.assertEqual(len(fits.encode()), limits.MAX_OPENING)
        self.assertEqual(read(read_opening((1,)), fits.encode())[0], fits)

        data = bytearray(fits.encode() + b"y")
        data[-left - 1] += 1
        taken = self.refused("too-long", read_opening((1,)), bytes(data))
        self.assertLessEqual(taken, limits.MAX_OPENING)
        error = self.assertRaises(LocalError, Reply(1, (*names, "y" * left)).encode)
        self.assertEqual(error.code, "too-long")

    def test_own_greeting(self) -> None:
        """A Greeting that a peer would refuse is not written."""
        for versions, features in (
            ((), ()),
            ((0,), ()),
            ((256,), ()),
            (tuple(range(1, 18)), ()),
            ((1,), tuple(f"f{number}" for number in range(257))),
            ((1,), ("a", "a")),
            ((1,), ("",)),
            ((1,), ("with space",)),
            ((1,), ("é",)),
            ((1,), ("x" * 256,)),
        ):
            self.assertRaises(LocalError, Greeting(versions, features).encode)

    def test_own_messages(self) -> None:
        """A message that a peer would refuse is not written."""
        for message in (
            Status({"a": "x" * 65536}),
            Guest({"a": "x" * 1048576}),
            Cancel("x" * 65537),
            Status({"a": float("nan")}),
            Status({"a": 2**64}),
            Status({"a": "\ud83d"}),
            Status({"a": object()}),
            Feature("", {}),
            Feature("a", {"withdrawn": ""}),
            Error("", "text"),
        ):
            self.assertRaises(LocalError, message.encode)

    def test_own_role(self) -> None:
        """A role header that a peer would refuse is not written."""
        for role in (
            RoleHeader(uuid.UUID(int=0), "main", 0),
            RoleHeader(MIGRATION, "", 0),
            RoleHeader(MIGRATION, "main", -1),
            RoleHeader(MIGRATION, "main", 65536),
        ):
            self.assertRaises(LocalError, role.prove, SECRET)
        self.assertRaises(LocalError, RoleHeader(MIGRATION, "main", 0).encode)

    def test_error_is_cut(self) -> None:
        """The text of an ERROR is cut to fit, between two characters: it is always said."""
        data = Error("x", "é" * 65536).encode()
        self.assertLessEqual(len(data), 6 + limits.MAX_BODY)
        found = read(read_message(admit_all), data)[0]
        self.assertEqual(set(found.text), {"é"})
        self.assertGreater(len(found.text), 32000)

    def test_header_is_enough(self) -> None:
        """Who admits is asked before the body is read, with the type and the length."""
        asked: list[tuple[MessageType, int]] = []

        def refuse(kind: MessageType, length: int) -> None:
            asked.append((kind, length))
            raise ProtocolError("No.", code="unexpected-message")

        data = Guest({"a": "x" * 1000}).encode()
        self.assertEqual(self.refused("unexpected-message", read_message(refuse), data), 6)
        self.assertEqual(asked, [(MessageType.GUEST, len(data) - 6)])


class Json(SynchronousTestCase):
    """JSON comes out as it went in, or is refused on both sides."""

    @given(OBJECTS)
    def test_both_ways(self, value: dict[str, Any]) -> None:
        """Every object within the limits comes out as it went in."""
        self.assertEqual(decode_object(encode_object(value, "X"), "X"), value)

    @given(st.binary())
    def test_garbage(self, data: bytes) -> None:
        """Garbage is an object or refused as bad-json; nothing else is raised."""
        try:
            self.assertIsInstance(decode_object(data, "X"), dict)
        except ProtocolError as error:
            self.assertEqual(error.code, "bad-json")

    def test_marks(self) -> None:
        """32,768 commas and opening brackets are taken, one more is not."""
        fits = b'{"a":[' + b"0," * (limits.MAX_JSON_MARKS - 2) + b"0]}"
        self.assertEqual(len(decode_object(fits, "X")["a"]), limits.MAX_JSON_MARKS - 1)
        error = self.assertRaises(ProtocolError, decode_object, fits.replace(b"[", b"[0,", 1), "X")
        self.assertEqual(error.code, "bad-json")

    def test_long_integer(self) -> None:
        """An integer of a million digits is refused, and is never converted."""
        error = self.assertRaises(
            ProtocolError, decode_object, b'{"a":' + b"9" * 1000000 + b"}", "X"
        )
        self.assertEqual(error.code, "bad-json")

    def test_the_secret_is_not_shown(self) -> None:
        """What is logged of messages and role headers has neither secret nor proof in it."""
        self.assertNotIn("5ec7e7", repr(Status({"secret": "5ec7e7"})))
        role = RoleHeader(MIGRATION, "main", 0).prove(SECRET)
        self.assertNotIn("proof", repr(role))
