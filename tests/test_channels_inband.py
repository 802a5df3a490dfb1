"""The in-band form: framing on and off again, and the same conversations inside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.channels.inband import InBand
from qmigd.channels.secured import Secured
from qmigd.errors import ProtocolError
from qmigd.handshake import ChannelHandshake, DestinationHandshake, SourceHandshake
from qmigd.handshake.events import Event, Failed, GuestDescribed
from qmigd.handshake.exchange import Exchange
from qmigd.wire.greeting import Reply
from qmigd.wire.inband import MAX_PART, OPENING, Framing, frame
from qmigd.wire.messages import Guest, Start
from tests import test_channels_secured as secured_form
from tests import test_handshake_fuzz as fuzz
from tests import test_handshake_vectors as first_form
from tests.test_handshake_table import ROLE, SECRET
from tests.test_handshake_vectors import VECTORS


def unframed(data: bytes, *, by_source: bool) -> bytes:
    """Take the framing off what a side has sent since the opening."""
    framing, found = Framing(by_source=by_source), b""
    framing.opened = True
    while data := framing.take(data):
        found += data[: framing.left]
        data, framing.left = data[framing.left :], 0
    return found


class Both:
    """A handshake's machine in both forms at once: what the one does, the other has to do."""

    def __init__(self, machine: Exchange | ChannelHandshake) -> None:
        self._first = machine
        server = isinstance(machine, DestinationHandshake)
        twin: Exchange | ChannelHandshake = SourceHandshake()
        if isinstance(machine, DestinationHandshake):
            twin = DestinationHandshake(machine._greeting.features)
        elif isinstance(machine, ChannelHandshake):
            twin = ChannelHandshake(ROLE, SECRET)
        self._twin = InBand(Secured(twin, None), server=server)
        self._server = server
        self._left_out = False
        if server:
            assert self._twin.data_to_send() == b"", "there is no return path yet"
            assert self._twin.receive(OPENING) == []
        else:
            assert self._twin.data_to_send() == OPENING

    def _in_tls(self) -> bool:
        """Whether what follows is inside TLS, which the vectors leave out."""
        self._left_out = self._left_out or self._first.upgrade
        return self._left_out

    def receive(self, data: bytes) -> list[Event]:
        told = self._first.receive(data)
        if self._in_tls():
            return told
        # What is payload comes bare, and is not read.
        control = data[: len(data) - len(self._first.leftover)]
        others: list[Event] = []
        for piece in frame(control, by_source=self._server):
            if self._twin.wanted:
                others += self._twin.receive(bytes([piece]))
        assert told == others, (told, others)
        return told

    def eof(self) -> list[Event]:
        told = self._first.eof()
        if not self._in_tls():
            others = self._twin.eof()
            assert told == others, (told, others)
        return told

    def data_to_send(self) -> bytes:
        data = self._first.data_to_send()
        if self._in_tls():
            return data
        assert unframed(self._twin.data_to_send(), by_source=not self._server) == data
        assert bool(self._first.wanted) == bool(self._twin.wanted)
        return data

    def __getattr__(self, name: str) -> Any:
        one, other = (getattr(each, name) for each in (self._first, self._twin.machine))
        if not callable(one):
            return one

        def both(*arguments: Any) -> None:
            one(*arguments)
            if not self._left_out:
                other(*arguments)

        return both


class ConversationTests(first_form.Conversations):
    """Every conversation of the first form goes the same way in this one."""

    def machine(self, handshake: Exchange) -> Any:
        return Both(handshake)


class _InForm:
    """Ends of connections that have the handshake in this form."""

    def end(self, secured: Secured, *, server: bool) -> secured_form.End:
        return secured_form.End(InBand(secured, server=server))

    def said(self, end: secured_form.End) -> bytes:
        opening = OPENING if end.sent.startswith(OPENING) else b""
        return unframed(end.sent.removeprefix(opening), by_source=bool(opening))

    def form(self, data: bytes, *, by_source: bool) -> bytes:
        return frame(data, by_source=by_source)


class InTlsTests(_InForm, secured_form.ControlTests):
    """The control connection goes over to TLS inside the framing, as in the first form."""


class ChannelTests(_InForm, secured_form.ChannelTests):
    """So do payload channels, up to ATTACHED; the payload's records stand bare."""


class VectorTests(SynchronousTestCase):
    """Framing as it is in docs/vectors/in-band.json."""

    def test_vectors(self) -> None:
        """What each is, whole and a byte at a time."""
        for vector in json.loads((VECTORS / "in-band.json").read_text())["vectors"]:
            data, expect = bytes.fromhex(vector["hex"]), vector["expect"]
            for size in (len(data), 1):
                framing, found, taken, error = (
                    Framing(by_source=vector["from"] == "source"),
                    b"",
                    0,
                    "",
                )
                try:
                    for at in range(0, len(data), size):
                        piece = data[at : at + size]
                        taken += len(piece)
                        while piece:
                            if not framing.left:
                                piece = framing.take(piece)
                            part, piece = piece[: framing.left], piece[framing.left :]
                            framing.left -= len(part)
                            found += part
                except ProtocolError as failure:
                    error = failure.code
                    if size == 1:
                        self.assertEqual(expect["after"], taken, vector["name"])
                self.assertEqual(expect.get("error", ""), error, vector["name"])
                self.assertEqual(expect["body"], found.hex(), vector["name"])
            if not error:
                head = OPENING if vector["from"] == "source" else b""
                body = bytes.fromhex(expect["body"])
                if vector.get("only-way", True):
                    made = head + frame(body, by_source=vector["from"] == "source")
                    self.assertEqual(made.hex(), vector["hex"], vector["name"])


class PartsTests(SynchronousTestCase):
    def destination(self) -> InBand:
        """One that has sent its Greeting."""
        inband = InBand(Secured(DestinationHandshake(("a",)), None), server=True)
        self.assertEqual([], inband.receive(OPENING))
        self.assertTrue(inband.data_to_send())
        return inband

    @settings(max_examples=15, deadline=None)
    @given(st.integers(1, 70_000), st.lists(st.integers(1, 200_000), max_size=5))
    def test_parts(self, part: int, cuts: list[int]) -> None:
        """A long body comes in parts, cut anywhere, and each part in any pieces."""
        guest = {"name": "vm", "padding": "x" * 70_000}
        said = Reply(1, ("a",)).encode() + Guest(guest).encode()
        part = min(part, MAX_PART)
        framed = b"".join(
            frame(said[at : at + part], by_source=True) for at in range(0, len(said), part)
        )
        inband = self.destination()
        told: list[Any] = []
        edges = [0, *sorted(cut for cut in cuts if cut < len(framed)), len(framed)]
        for start, end in pairwise(edges):
            told += inband.receive(framed[start:end])
        self.assertEqual([GuestDescribed(guest)], told[1:])

    def test_long(self) -> None:
        """What is sent is cut into parts as long as QEMU's lengths allow."""
        framed = frame(b"x" * (2 * MAX_PART + 7), by_source=False)
        self.assertEqual(2 * MAX_PART + 7 + 3 * 4, len(framed))
        self.assertEqual(b"x" * (2 * MAX_PART + 7), unframed(framed, by_source=False))
        self.assertEqual(b"", frame(b"", by_source=True))

    def test_stream_is_left_alone(self) -> None:
        """Not a byte behind the part with START is read."""
        inband = self.destination()
        control = frame(Reply(1, ()).encode() + Start().encode(), by_source=True)
        stream, read = control + b"QEVM\0\0\0\3" * 100, 0
        while wanted := inband.may_read:
            inband.receive(stream[read : read + wanted])
            read += wanted
        self.assertEqual(len(control), read)

    def test_more_than_start(self) -> None:
        """What stands behind START in its part is not read: it is the stream's, for good or ill."""
        inband = self.destination()
        said = Reply(1, ()).encode() + Start().encode()
        stream, read = frame(said + b"QEVM", by_source=True), 0
        while wanted := inband.may_read:
            inband.receive(stream[read : read + wanted])
            read += wanted
        self.assertEqual(b"QEVM", stream[read:])

    def refused(self, inband: InBand, data: bytes) -> tuple[str, Sequence[bytes]]:
        """Say something else, bit by bit; returns the error's text, and what is answered."""
        told: list[Any] = []
        for byte in data:
            if inband.wanted:
                told += inband.receive(bytes([byte]))
        (failed,) = told
        self.assertEqual(("bad-frame", False), (failed.code, failed.remote))
        return failed.text, [inband.data_to_send()]

    def test_plain_stream(self) -> None:
        """QEMU's own stream is told what to do, in the log: there is no return path yet."""
        destination = InBand(Secured(DestinationHandshake(()), None), server=True)
        text, answered = self.refused(destination, b"QEVM\0\0\0\3\7\0\0\0\x11pc-i440fx")
        self.assertIn("'legacy-listen' is for that", text)
        self.assertEqual([b""], answered)

    def test_other_commands(self) -> None:
        """Behind the opening there is nothing but FEATURES; the ERROR can be read by then."""
        text, (answered,) = self.refused(self.destination(), b"\x08\0\2\0\4\0\0\0\1")
        self.assertIn("MIG_CMD_FEATURES", text)
        self.assertIn(b"bad-frame", unframed(answered, by_source=False))

    def test_first_form(self) -> None:
        """A source that finds the first form is told so."""
        source = InBand(Secured(SourceHandshake(), None), server=False)
        source.data_to_send()
        text, _ = self.refused(source, b"QEMU-MIGRATE\1\1\0\0\0\0")
        self.assertIn("leave out 'in-band:'", text)


class ByTheByte(Both):
    """Both get all bytes one by one: an ERROR's text quotes what has come so far."""

    def receive(self, data: bytes) -> list[Event]:
        take = super().receive
        return [event for byte in data for event in take(bytes([byte]))]


class Harsh(fuzz.Harsh):
    """Both forms, and a peer and an owner who do anything."""

    form = ByTheByte


class Pair(fuzz.Pair):
    """A source and a destination that both have both forms."""

    form = ByTheByte


class FuzzTests(fuzz.Invariants, SynchronousTestCase):
    """What holds in the first form, whoever sends and calls what, holds in this one."""

    harsh = Harsh
    pair = Pair
    examples = 50

    def made(self, handshake: Exchange) -> Any:
        server = isinstance(handshake, DestinationHandshake)
        inband = InBand(Secured(handshake, None), server=server)
        if server:
            assert inband.receive(OPENING) == []
        return inband

    def said(self, data: bytes, *, by_source: bool) -> bytes:
        return frame(data, by_source=by_source)

    @given(fuzz.SEVERAL, st.booleans())
    def test_wanted(self, sayings: list[bytes], source: bool) -> None:
        """5: of what ``wanted`` says."""
        self.check_wanted(sayings, source)

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(st.tuples(fuzz.SAYING, st.binary(max_size=3), st.integers(0, 60)), max_size=5),
        st.booleans(),
    )
    def test_damaged(self, sayings: list[tuple[bytes, bytes, int]], source: bool) -> None:
        """1, 2 and 3: of framing that has bytes in it that do not belong there."""
        machine: Exchange = SourceHandshake() if source else DestinationHandshake(("a",))
        handshake, errors = self.made(machine), 0
        handshake.data_to_send()
        for data, damage, at in sayings:
            framed = frame(data, by_source=not source)
            told = handshake.receive(framed[:at] + damage + framed[at:])
            failures = [event for event in told if isinstance(event, Failed)]
            assert failures == told[len(told) - len(failures) :]
            errors += len(failures)
            sent = unframed(handshake.data_to_send(), by_source=source)
            assert bool(fuzz.errors_in(sent)) == any(not one.remote for one in failures)
            assert handshake.closed or not failures
            assert not (handshake.closed and handshake.wanted)
        assert errors <= 1
