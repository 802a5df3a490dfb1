"""Random conversations: what holds whatever the peer sends and the owner calls.

The invariants, before the machines that look for a way round them:

1. ``receive``, ``eof`` and ``data_to_send`` never raise; a call of the owner's
   raises LocalError or nothing.
2. At most one ERROR is sent, and nothing after it.
3. After Failed the machine is closed; closed, it wants, tells and sends nothing.
4. Failed by a violation, the peer gets an ERROR with the same code and text.
5. ``wanted`` is never more than what is left of the item that is being read.
6. What is held never exceeds the limits.
7. Two of these machines, wired together, never violate the protocol, whatever
   their owners call and however the bytes are cut; each hears what the other
   said, in that order, and nothing else; both agree on where the stream begins.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from hypothesis.stateful import run_state_machine_as_test as run_machine
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import LocalError
from qmigd.handshake import ChannelHandshake, DestinationHandshake, SourceHandshake
from qmigd.handshake.events import Event, Failed, Greeted, Selected, Started
from qmigd.handshake.exchange import Exchange
from qmigd.wire import messages
from qmigd.wire.greeting import Reply
from qmigd.wire.messages import read_message
from qmigd.wire.reading import Decoder
from tests.test_handshake_table import CALLS, ROLE, SAYINGS, SECRET
from tests.test_wire_reading import admit_all

FEATURES = ("a", "b")
BODIES = st.dictionaries(st.text("xyz", max_size=2), st.integers(0, 9), max_size=2)
SAYING = st.sampled_from([data for data, _ in SAYINGS.values()] + [Reply(1, ()).encode()])
SEVERAL = st.lists(SAYING, max_size=8)


def errors_in(sent: bytes) -> list[messages.Error]:
    """Return the ERRORs in what a machine sent; check that nothing comes after one."""
    found: list[messages.Error] = []
    if sent.startswith(b"QEMU"):
        # A Greeting, Reply or role header; whatever follows is messages.
        return found
    while sent:
        assert not found, "something was sent after an ERROR"
        decoder: Decoder[Any] = Decoder(read_message(admit_all))
        sent = sent[decoder.feed(sent) :]
        if isinstance(decoder.item, messages.Error):
            found.append(decoder.item)
    return found


class Harsh(RuleBasedStateMachine):
    """One machine, a peer that sends anything, and an owner who calls anything.

    :cvar form: makes out of a handshake what it is looked at as.
    """

    handshake: Any
    form: Callable[[Any], Any] = staticmethod(lambda handshake: handshake)

    def __init__(self) -> None:
        super().__init__()
        self.failed: Failed | None = None
        self.errors = 0
        self.channel = False

    @rule(kind=st.sampled_from(["destination", "source", "channel"]))
    @precondition(lambda self: not hasattr(self, "handshake"))
    def begin(self, kind: str) -> None:
        if kind == "destination":
            self.handshake = self.form(DestinationHandshake(FEATURES))
            self.handshake.data_to_send()
        elif kind == "source":
            self.handshake = self.form(SourceHandshake())
        else:
            self.channel = True
            self.handshake = self.form(ChannelHandshake(ROLE, SECRET))

    @rule(data=st.one_of(SAYING, SAYING, st.binary(max_size=20)), cut=st.integers(0, 100))
    @precondition(lambda self: hasattr(self, "handshake"))
    def peer(self, data: bytes, cut: int) -> None:
        for piece in (data[:cut], data[cut:]):
            was_closed = self.handshake.closed
            told = self.handshake.receive(piece)
            self.check(told, was_closed)

    @rule()
    @precondition(lambda self: hasattr(self, "handshake"))
    def end(self) -> None:
        was_closed = self.handshake.closed
        self.check(self.handshake.eof(), was_closed)
        assert self.handshake.closed

    @rule(call=st.sampled_from(sorted(CALLS)), bare=st.booleans())
    @precondition(lambda self: hasattr(self, "handshake"))
    def owner(self, call: str, bare: bool) -> None:
        was_closed = self.handshake.closed
        method = getattr(self.handshake, call, None)
        if method is None:
            return
        try:
            method(*((),) if call == "reply" and bare else CALLS[call])
        except LocalError:
            assert self.handshake.closed == was_closed
        self.check([], was_closed)

    def check(self, told: list[Event], was_closed: bool) -> None:
        sent = self.handshake.data_to_send()
        errors = errors_in(sent)
        self.errors += len(errors)
        assert self.errors <= 1
        if was_closed:
            assert not told and not sent
        failures = [event for event in told if isinstance(event, Failed)]
        if failures:
            assert failures == told[-1:]
            assert self.handshake.closed
            (self.failed,) = failures
            if self.failed.remote:
                assert not errors
            elif not self.channel:
                assert [(e.code, e.text) for e in errors] == [(self.failed.code, self.failed.text)]

    @invariant()
    def wanting(self) -> None:
        if hasattr(self, "handshake"):
            assert 0 <= self.handshake.wanted <= 1 << 20
            if self.handshake.closed:
                assert self.handshake.wanted == 0


class Pair(RuleBasedStateMachine):
    """A source and a destination, wired together by two pipes with delays.

    :cvar form: makes out of a handshake what it is looked at as.
    """

    form: Callable[[Any], Any] = staticmethod(lambda handshake: handshake)

    def __init__(self) -> None:
        super().__init__()
        self.ends: dict[str, Any] = {
            "source": self.form(SourceHandshake()),
            "destination": self.form(DestinationHandshake(FEATURES)),
        }
        self.pipes = {"source": b"", "destination": b""}
        #: What each side said, and heard, as (kind, content).
        self.said: dict[str, list[Any]] = {"source": [], "destination": []}
        self.heard: dict[str, list[Any]] = {"source": [], "destination": []}
        self.stream = b""
        self.selected: tuple[str, ...] = ()
        self.said["destination"].append(("greeting",))
        self.flush()

    @initialize(stage=st.integers(0, 4), features=st.sampled_from([(), ("a",), ("b", "a")]))
    def begin(self, stage: int, features: tuple[str, ...]) -> None:
        """Go straight to a later stage, so that all of them are seen often."""
        for side, name, arguments in (
            ("source", "reply", (features,)),
            ("source", "prepare", ({},)),
            ("destination", "prepared", ({},)),
            ("source", "start", ()),
        )[:stage]:
            self.arrive("destination", len(self.pipes["destination"]))
            self.say(side, name, *arguments)
            self.arrive("source", len(self.pipes["source"]))

    def flush(self) -> None:
        """Move what the ends have to send into the pipes, named by who sends."""
        for side, end in self.ends.items():
            self.pipes[side] += end.data_to_send()

    @rule(side=st.sampled_from(["source", "destination"]), data=st.data())
    def deliver(self, side: str, data: st.DataObject) -> None:
        """A part of what is in a pipe arrives at the other end, cut anywhere."""
        pipe = self.pipes[side]
        if pipe:
            some = st.integers(1, len(pipe))
            self.arrive(side, data.draw(st.just(len(pipe)) | some))

    def arrive(self, side: str, count: int) -> None:
        other = "destination" if side == "source" else "source"
        pipe = self.pipes[side]
        self.pipes[side] = pipe[count:]
        for event in self.ends[other].receive(pipe[:count]):
            assert not isinstance(event, Failed) or event.remote, event
            self.heard[other].append(self.kind(event))
        self.flush()

    @staticmethod
    def kind(event: Event) -> Any:
        if isinstance(event, Greeted):
            return ("greeting",)
        if isinstance(event, Selected):
            return ("reply", event.features)
        if isinstance(event, Started):
            return ("start",)
        if isinstance(event, Failed):
            return ("error", event.code, event.text)
        content = tuple(vars(event).values())
        name = {
            "GuestDescribed": "guest",
            "FeatureSaid": "feature",
            "PrepareAsked": "prepare",
            "Asked": "ask",
            "StatusSaid": "status",
            "CancelAsked": "cancel",
            "Released": "release",
        }.get(type(event).__name__, type(event).__name__.lower())
        return (name, *content)

    @rule(side=st.sampled_from(["source", "destination"]), data=st.data())
    def speak(self, side: str, data: st.DataObject) -> None:
        """An owner calls something that the state has a place for."""
        end = self.ends[side]
        calls = {
            line.input.removeprefix("say_").removeprefix("bare_").removeprefix("tls_")
            for line in end.table.transitions
            if line.state == end.state and line.input.startswith("say_")
        }
        # These end it; they may come at any time, but not in every conversation.
        if end.closed or data.draw(st.integers(0, 15)):
            calls -= {"error", "cancel"}
        if calls:
            self.call(side, data.draw(st.sampled_from(sorted(calls))), data)

    @rule(
        side=st.sampled_from(["source", "destination"]),
        name=st.sampled_from(sorted(set(CALLS) - {"error"})),
        data=st.data(),
    )
    def blunder(self, side: str, name: str, data: st.DataObject) -> None:
        """An owner calls anything, mostly in vain."""
        if hasattr(self.ends[side], name) and not data.draw(st.integers(0, 3)):
            self.call(side, name, data)

    @rule(data=st.binary(min_size=1, max_size=20))
    @precondition(lambda self: self.ends["source"].state == "streaming")
    def send_stream(self, data: bytes) -> None:
        self.pipes["source"] += data
        self.stream += data

    def call(self, side: str, name: str, data: st.DataObject) -> None:
        arguments: tuple[Any, ...] = (data.draw(BODIES),)
        if name == "reply":
            arguments = (data.draw(st.sampled_from([(), ("a",), ("b", "a")])),)
        elif name == "feature":
            arguments = (data.draw(st.sampled_from(FEATURES)), *arguments)
        elif name in {"start", "heartbeat", "attached"}:
            arguments = ()
        elif name == "cancel":
            arguments = ("reason",)
        elif name == "error":
            arguments = ("x", side)
        self.say(side, name, *arguments)

    def say(self, side: str, name: str, *arguments: Any) -> None:
        try:
            getattr(self.ends[side], name)(*arguments)
        except LocalError:
            return
        if self.ends[side].state in {"finished", "closed"} and name == "heartbeat":
            return  # nothing is said any more
        self.said[side].append((name, *arguments))
        if name == "reply":
            self.selected = arguments[0]
        self.flush()

    @invariant()
    def each_hears_what_the_other_said(self) -> None:
        for side, other in (("source", "destination"), ("destination", "source")):
            heard, said = self.heard[other], self.said[side]
            names = [one[0] for one in self.said[other]]
            if other == "source" and "cancel" in names and "start" not in names:
                # A CANCEL before START crosses with these, which are then ignored.
                said = [one for one in said if one[0] not in {"feature", "prepared"}]
                heard = [one for one in heard if one[0] not in {"feature", "prepared"}]
            assert heard == said[: len(heard)], (heard, said)

    @invariant()
    def one_error_a_side(self) -> None:
        for said in self.said.values():
            assert sum(one[0] == "error" for one in said) <= 1

    def teardown(self) -> None:
        """Once all has arrived, nothing that was said is missing."""
        for _ in range(2):
            for side in ("source", "destination"):
                if self.pipes[side]:
                    self.arrive(side, len(self.pipes[side]))
        self.each_hears_what_the_other_said()
        for side, other in (("source", "destination"), ("destination", "source")):
            end = self.ends[other]
            if end.state not in {"closed", "cancelled", "streaming"}:
                assert self.heard[other] == self.said[side]
        source, destination = self.ends["source"], self.ends["destination"]
        if source.state == "streaming" and destination.state == "streaming":
            assert destination.leftover == self.stream
            assert not self.selected


class Invariants:
    """What is looked for; the forms that a handshake has derive from it.

    :cvar harsh, pair: the machines that look.
    :cvar examples: how often.
    """

    harsh: type[RuleBasedStateMachine] = Harsh
    pair: type[RuleBasedStateMachine] = Pair
    examples = 150

    def made(self, handshake: Exchange) -> Any:
        """Return the handshake as a connection has it."""
        return handshake

    def said(self, data: bytes, *, by_source: bool) -> bytes:
        """Return the bytes on the wire, for something that is said."""
        return data

    def test_harsh(self) -> None:
        """1 to 4: one machine, and a peer and an owner who do anything."""
        run_machine(
            self.harsh,
            settings=settings(
                max_examples=self.examples, deadline=None, report_multiple_bugs=False
            ),
        )

    def test_pair(self) -> None:
        """7: two machines, and owners who do anything."""
        run_machine(
            self.pair,
            settings=settings(
                max_examples=self.examples,
                stateful_step_count=40,
                deadline=None,
                report_multiple_bugs=False,
            ),
        )

    def check_wanted(self, sayings: list[bytes], source: bool) -> None:
        """5: reading by ``wanted`` stops exactly at the end of each item.

        An item is cut off at each place; what is then wanted is no more than
        what the item has left.
        """
        machine: Exchange = SourceHandshake() if source else DestinationHandshake(FEATURES)
        handshake = self.made(machine)
        for data in sayings:
            # A Greeting where a Reply is due, or the reverse, is another item of other length.
            if data.startswith(b"QEMU-M") and machine.state == "waiting":
                data = SAYINGS["Greeting" if source else "Reply"][0]
            data = self.said(data, by_source=not source)
            offset = 0
            while offset < len(data) and handshake.wanted:
                wanted = handshake.wanted
                told = handshake.receive(data[offset : offset + wanted])
                if any(isinstance(event, Failed) for event in told):
                    return
                assert wanted <= len(data) - offset
                offset += wanted

    def test_the_stream_stays_in_the_socket(self) -> None:
        """5: who reads by ``wanted`` reads START and leaves the stream where it is."""
        data = Reply(1, ()).encode() + messages.Guest({"name": "a"}).encode()
        data += messages.Start().encode()
        stream = b"QEVM" + bytes(100)
        machine = DestinationHandshake(FEATURES)
        handshake = self.made(machine)
        unread = self.said(data, by_source=True) + stream
        while wanted := handshake.wanted:
            handshake.receive(unread[:wanted])
            unread = unread[wanted:]
        assert (machine.state, unread) == ("streaming", stream)
        assert machine.leftover == b""

    def test_memory(self) -> None:
        """6: an unfinished Reply costs little over 64 KiB, an unfinished GUEST over 1 MiB."""
        names = tuple(f"{number:03}" + "x" * 240 for number in range(256))
        reply = Reply(1, names).encode()
        guest = messages.Guest({"a": "x" * ((1 << 20) - 8)}).encode()
        assert len(guest) == 6 + (1 << 20)
        for before, body, limit in (
            (b"", reply, 64 << 10),
            (Reply(1, ()).encode(), guest, 1 << 20),
        ):
            handshake = self.made(DestinationHandshake(()))
            handshake.receive(self.said(before, by_source=True))
            data = self.said(body, by_source=True)
            pieces = [data[at : at + 1000] for at in range(0, len(data) - 1, 1000)]
            pieces[-1] = pieces[-1][:-1]
            gc.collect()
            tracemalloc.start()
            try:
                for piece in pieces:
                    assert handshake.receive(piece) == []
                held, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            # The names are in memory as strings by then, with what Python adds to each.
            assert held < limit * 5 // 4 + (40 << 10), held
            assert peak < limit * 5 // 2 + (40 << 10), peak


class Fuzz(Invariants, SynchronousTestCase):
    """The invariants hold."""

    @given(SEVERAL, st.booleans())
    def test_wanted(self, sayings: list[bytes], source: bool) -> None:
        """5: of what ``wanted`` says."""
        self.check_wanted(sayings, source)
