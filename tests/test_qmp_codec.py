"""QMP's framing: whatever the cut, the same messages."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import ProtocolError
from qmigd.qmp.codec import MAX_DEPTH, Decoder, Message, encode

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars.filter(lambda value: value not in (float("inf"), float("-inf"))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
messages = st.dictionaries(st.text(max_size=8), values, max_size=4)
#: What comes between two messages, and how one is laid out.
gaps = st.sampled_from(["", "\r\n", "\n", " ", "\n\n\t"])
indents = st.sampled_from([None, 0, 4])
#: Bytes that are more likely than others to mean something.
noise = st.lists(
    st.sampled_from([b"{", b"}", b"[", b"]", b'"', b"\\", b"\n", b'"a":', b"1", b",", b"\xff"])
    | st.binary(max_size=3)
).map(b"".join)


def shown(found: list[Message | ProtocolError]) -> list[Any]:
    """Return what can be compared."""
    return [item.text if isinstance(item, ProtocolError) else item for item in found]


def decoded(*pieces: bytes, limit: int = 1 << 20) -> list[Any]:
    decoder = Decoder(limit)
    found: list[Any] = []
    for piece in pieces:
        found += shown(decoder.feed(piece))
    return found


class MessageTests(SynchronousTestCase):
    @given(st.lists(messages, max_size=4), gaps, indents, st.data())
    def test_any_cut(
        self, sent: list[Message], gap: str, indent: int | None, data: st.DataObject
    ) -> None:
        """Messages come out as they went in: in one piece, by the byte, and cut anywhere."""
        wire = "".join(json.dumps(message, indent=indent) + gap for message in sent).encode()
        self.assertEqual(decoded(wire), sent)
        self.assertEqual(decoded(*(bytes([byte]) for byte in wire)), sent)
        cuts = data.draw(st.lists(st.integers(0, len(wire)), max_size=5).map(sorted))
        self.assertEqual(decoded(*(wire[a:b] for a, b in pairwise([0, *cuts, len(wire)]))), sent)

    @given(messages)
    def test_encode(self, message: Message) -> None:
        """An encoded message is one line of ASCII, and comes out as it went in."""
        wire = encode(message)
        self.assertEqual(wire.count(b"\n"), 1)
        self.assertTrue(wire.endswith(b"\r\n") and wire.isascii())
        self.assertEqual(decoded(wire), [message])

    def test_encode_refuses_what_is_no_json(self) -> None:
        """NaN is no JSON number."""
        self.assertRaises(ValueError, encode, {"a": float("nan")})

    def test_no_line_end(self) -> None:
        """A message is complete with its last bracket."""
        self.assertEqual(decoded(b'{"execute": "stop"}'), [{"execute": "stop"}])

    def test_brackets_in_strings(self) -> None:
        """What is in a string is no bracket, escapes or not."""
        message = {"a": '}{"\\', "b": [{"c": "]\\\\"}]}
        wire = encode(message)
        for at in range(len(wire)):
            self.assertEqual(decoded(wire[:at], wire[at:]), [message])


class NonsenseTests(SynchronousTestCase):
    @given(noise, st.data())
    def test_any_cut(self, wire: bytes, data: st.DataObject) -> None:
        """Nonsense is the same nonsense however it is cut, and never more than a bad message."""
        whole = decoded(wire)
        self.assertEqual(decoded(*(bytes([byte]) for byte in wire)), whole)
        at = data.draw(st.integers(0, len(wire)))
        self.assertEqual(decoded(wire[:at], wire[at:]), whole)

    @given(st.text(st.characters(exclude_characters='{}[]\n"', exclude_categories=["Cs"])))
    def test_a_bad_line_costs_one_message(self, text: str) -> None:
        """What comes on the next line is found."""
        found = decoded(text.encode() + b"\n" + b'{"a": 1}')
        self.assertEqual(found[-1], {"a": 1})
        self.assertEqual(len(found), 2 if text.strip(" \t\r\f\v") else 1)

    def test_a_forgotten_quotation_mark(self) -> None:
        """A string that is not closed on its line ends the message there."""
        found = decoded(b'{"execute: "stop"}\n', b'{"execute": "stop"}\n')
        self.assertIn("not JSON", found[0])
        self.assertEqual(found[-1], {"execute": "stop"})

    def test_not_an_object(self) -> None:
        """JSON that is no object is refused, each with a sentence."""
        self.assertEqual(decoded(b"[1]\n[]"), ["A QMP message must be a JSON object."] * 2)
        (found,) = decoded(b"7\n")
        self.assertIn("JSON", found)

    def test_only_utf_8(self) -> None:
        """Other encodings of JSON are refused."""
        (found,) = decoded('{"a": "\u00e9"}'.encode("latin-1"))
        self.assertIn("not JSON", found)

    def test_constants(self) -> None:
        """NaN and the infinities are no JSON."""
        for constant in (b"NaN", b"Infinity", b"-Infinity"):
            (found,) = decoded(b'{"a": ' + constant + b"}")
            self.assertIn("not JSON", found)

    def test_depth(self) -> None:
        """Brackets within brackets have a limit, and no message recurses without one."""
        fine = b'{"a":' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}"
        self.assertIsInstance(decoded(fine)[0], dict)
        found = decoded(b"[" * (MAX_DEPTH + 1) + b"\n")
        self.assertIn("not JSON", found[0])
        self.assertLess(len(decoded(b"[" * 100_000)), 1000)

    def test_huge_number(self) -> None:
        """A number too long for Python is an error like any other."""
        (found,) = decoded(b'{"a": ' + b"9" * 10_000 + b"}")
        self.assertIn("not JSON", found)


class LimitTests(SynchronousTestCase):
    def test_too_long(self) -> None:
        """A message beyond the limit ends the connection, whole or in pieces, closed or not."""
        for wire in (b'{"a": "' + b"x" * 100 + b'"}', b'{"a": "' + b"x" * 100, b"x" * 101):
            error = self.assertRaises(ProtocolError, decoded, wire, limit=100)
            self.assertEqual(error.code, "too-long")
            pieces = [bytes([byte]) for byte in wire]
            self.assertRaises(ProtocolError, decoded, *pieces, limit=100)

    def test_many_messages_are_no_long_one(self) -> None:
        """The limit is for each message, not for what comes at once."""
        self.assertEqual(len(decoded(b'{"a": 1}\r\n' * 1000, limit=10)), 1000)
