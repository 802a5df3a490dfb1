"""Every pair of a state and an input has the answer that the protocol gives it.

What each state takes is written down here once more, by hand; the test goes
through every state of the three machines with every input there is.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import LocalError
from qmigd.handshake import ChannelHandshake, DestinationHandshake, SourceHandshake
from qmigd.handshake.events import (
    Asked,
    CancelAsked,
    ChannelAttached,
    ChannelOpened,
    Event,
    Failed,
    FeatureSaid,
    Greeted,
    GuestDescribed,
    Heartbeat,
    Outcome,
    PrepareAsked,
    Prepared,
    Released,
    Secured,
    Selected,
    Started,
    StatusSaid,
)
from qmigd.wire import messages
from qmigd.wire.greeting import Greeting, Reply, binding
from qmigd.wire.messages import MessageType, read_message
from qmigd.wire.reading import Decoder
from qmigd.wire.role import RoleHeader
from tests.test_wire_reading import admit_all

SECRET = bytes(range(32))
#: What both sides have seen before TLS, where there is TLS.
TLS_REPLY = Reply(1, ("tls", "b"))
BOUND = binding(Greeting((1,), ("tls", "b")), TLS_REPLY)
ROLE = RoleHeader(uuid.UUID(int=7), "main", 0)

#: What a peer may say, and what the owner is told if it is in order.
SAYINGS: dict[str, tuple[bytes, Event | None]] = {
    "ERROR": (messages.Error("x", "y").encode(), Failed("x", "y", True)),
    "GUEST": (messages.Guest({}).encode(), GuestDescribed({})),
    "FEATURE": (messages.Feature("b", {}).encode(), FeatureSaid("b", {})),
    "PREPARE": (messages.Prepare({}).encode(), PrepareAsked({})),
    "PREPARED": (messages.Prepared({}).encode(), Prepared({})),
    "START": (messages.Start().encode(), None),
    "ATTACHED": (messages.Attached().encode(), ChannelAttached()),
    "HEARTBEAT": (messages.Heartbeat().encode(), Heartbeat()),
    "STATUS": (messages.Status({}).encode(), StatusSaid({})),
    "CANCEL": (messages.Cancel("z").encode(), CancelAsked("z")),
    "RELEASE": (messages.Release({}).encode(), Released({})),
    "OUTCOME": (messages.Outcome({}).encode(), Outcome({})),
    "ASK": (messages.Ask({}).encode(), Asked({})),
    "BINDING": (messages.Binding(BOUND).encode(), Secured()),
    "Greeting": (Greeting((1,), ("a", "b")).encode(), Greeted((1,), ("a", "b"))),
    "Reply": (Reply(1, ("a", "b")).encode(), Selected(1, ("a", "b"))),
    "role header": (ROLE.prove(SECRET).encode(), ChannelOpened(ROLE.prove(SECRET))),
    "the stream": (b"QEVM\0\0\0\3", None),
    "garbage": (b"\xff" * 8, None),
}

#: What the owner may call; ``feature`` is called for one not spoken of before.
CALLS: dict[str, tuple[Any, ...]] = {
    "reply": (("a", "b"),),
    "guest": ({},),
    "feature": ("b", {}),
    "prepare": ({},),
    "prepared": ({},),
    "start": (),
    "attached": (),
    "heartbeat": (),
    "status": ({},),
    "cancel": ("z",),
    "release": ({},),
    "outcome": ({},),
    "ask": ({},),
    "error": ("x", "y"),
}

#: What only the owner's TLS calls.
MORE_CALLS: dict[str, tuple[Any, ...]] = {"secured": (), "reply_tls": (("tls", "b"),)}

FEATURES = Reply(1, ("a", "b")).encode()
BARE = Reply(1, ()).encode()


def destination(*steps: Any) -> DestinationHandshake:
    """Make a destination and take it through sayings of the peer and calls."""
    return walk(DestinationHandshake(("a", "b")), *steps)


def source(*steps: Any) -> SourceHandshake:
    """Make a source and take it through sayings of the peer and calls."""
    return walk(SourceHandshake(), *steps)


def channel(*steps: Any) -> ChannelHandshake:
    """Make the opener of a channel and take it through sayings of the peer."""
    return walk(ChannelHandshake(ROLE, SECRET), *steps)


def tls_destination(*steps: Any) -> DestinationHandshake:
    """Make a destination that offers TLS and take it through sayings and calls."""
    return walk(DestinationHandshake(("tls", "b")), *steps)


def tls_source(*steps: Any) -> SourceHandshake:
    """Make a source that was offered TLS and take it through sayings and calls."""
    return walk(SourceHandshake(), Greeting((1,), ("tls", "b")).encode(), *steps)


def tls_channel(*steps: Any) -> ChannelHandshake:
    """Make the opener of a channel in TLS and take it through sayings of the peer."""
    return walk(ChannelHandshake(ROLE, SECRET, tls=True), *steps)


def walk(handshake: Any, *steps: Any) -> Any:
    """Bytes are from the peer; a text is a saying of the peer, or a call if it ends in ()."""
    for step in steps:
        if isinstance(step, bytes):
            handshake.receive(step)
        elif step.endswith("()"):
            name = step[:-2]
            getattr(handshake, name.removesuffix("_tls"))(*{**CALLS, **MORE_CALLS}[name])
        elif step == "eof":
            handshake.eof()
        else:
            handshake.receive(SAYINGS[step][0])
    handshake.data_to_send()
    return handshake


# For each state: how to get there, what the peer may say there and where that
# leads, and the same of what the owner may call.  Written from docs/protocol.
GONE = {"ERROR": "closed"}
GIVE_UP = {"error": "closed"}
TALK = {"HEARTBEAT": None, "STATUS": None}
SPEAK = {"heartbeat": None, "status": None}
PREPARING = (FEATURES, "PREPARE")
STARTED = (*PREPARING, "prepared()", "START")

DESTINATION: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "waiting": (
        (),
        {"Reply": "replied", "role header": "opened", **GONE},
        GIVE_UP,
    ),
    "opened": (("role header",), {}, {"attached": "attached", **GIVE_UP}),
    "attached": (("role header", "attached()"), {}, {}),
    "replied": (
        (FEATURES,),
        {
            "GUEST": "described",
            "FEATURE": "described",
            "PREPARE": "preparing",
            **GONE,
        },
        {"feature": None, **GIVE_UP},
    ),
    "replied, bare": (
        (BARE,),
        {
            "GUEST": "described",
            "PREPARE": "preparing",
            "START": "streaming",
            "ASK": "asked",
            **GONE,
        },
        GIVE_UP,
    ),
    "described": (
        (FEATURES, "GUEST"),
        {"GUEST": None, "FEATURE": None, "PREPARE": "preparing", **GONE},
        {"feature": None, **GIVE_UP},
    ),
    "described, bare": (
        (BARE, "GUEST"),
        {"GUEST": None, "PREPARE": "preparing", "START": "streaming", **GONE},
        GIVE_UP,
    ),
    "preparing": (
        PREPARING,
        {"CANCEL": "cancelled", **GONE},
        {"feature": None, "prepared": "prepared", **GIVE_UP},
    ),
    "preparing, bare": (
        (BARE, "PREPARE"),
        {"CANCEL": "cancelled", **GONE},
        {"prepared": "prepared", **GIVE_UP},
    ),
    "prepared": (
        (*PREPARING, "prepared()"),
        {"CANCEL": "cancelled", "START": "started", **GONE},
        GIVE_UP,
    ),
    "prepared, bare": (
        (BARE, "PREPARE", "prepared()"),
        {"CANCEL": "cancelled", "START": "streaming", **GONE},
        GIVE_UP,
    ),
    "asked": ((BARE, "ASK"), GONE, {"outcome": "finished", **GIVE_UP}),
    "started": (
        STARTED,
        {"CANCEL": None, "RELEASE": "released", **TALK, **GONE},
        {"outcome": "finished", **SPEAK, **GIVE_UP},
    ),
    "released": (
        (*STARTED, "RELEASE"),
        {**TALK, **GONE},
        {"outcome": "finished", **SPEAK, **GIVE_UP},
    ),
    "finished": (
        (*STARTED, "outcome()"),
        {"CANCEL": None, "RELEASE": None, **TALK, **GONE},
        {"heartbeat": None, **GIVE_UP},
    ),
    "cancelled": ((*PREPARING, "CANCEL"), GONE, GIVE_UP),
    "streaming": ((BARE, "START"), {}, GIVE_UP),
    "closed": (("error()",), {}, {"error": None, "heartbeat": None}),
}

REPLIED = ("Greeting", "reply()")
ASKED = (*REPLIED, "prepare()")
RUNNING = (*ASKED, "PREPARED", "start()")
CHOICE = {"guest": "described", "feature": "described", "prepare": "preparing"}

SOURCE: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "waiting": ((), {"Greeting": "greeted"}, GIVE_UP),
    "greeted": (("Greeting",), GONE, {"reply": "replied", **GIVE_UP}),
    "replied": (REPLIED, {"FEATURE": None, **GONE}, {**CHOICE, **GIVE_UP}),
    "described": (
        (*REPLIED, "guest()"),
        {"FEATURE": None, **GONE},
        {"guest": None, "feature": None, "prepare": "preparing", **GIVE_UP},
    ),
    "preparing": (
        ASKED,
        {"FEATURE": None, "PREPARED": "prepared", **GONE},
        {"cancel": "cancelled", **GIVE_UP},
    ),
    "prepared": (
        (*ASKED, "PREPARED"),
        GONE,
        {"start": "started", "cancel": "cancelled", **GIVE_UP},
    ),
    "started": (
        RUNNING,
        {"OUTCOME": "finished", **TALK, **GONE},
        {"cancel": None, "release": "released", **SPEAK, **GIVE_UP},
    ),
    "released": (
        (*RUNNING, "release()"),
        {"OUTCOME": "finished", **TALK, **GONE},
        {**SPEAK, **GIVE_UP},
    ),
    "finished": ((*RUNNING, "OUTCOME"), GONE, {"heartbeat": None, **GIVE_UP}),
    "cancelled": (
        (*ASKED, "cancel()"),
        {"FEATURE": None, "PREPARED": None, **GONE},
        GIVE_UP,
    ),
    "closed": (("error()",), {}, {"error": None, "heartbeat": None}),
}

#: States of a source that selected nothing: ``reply(())`` in place of ``reply()``.
BARE_SOURCE: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "replied": (
        (),
        GONE,
        {
            "guest": "described",
            "prepare": "preparing",
            "start": "streaming",
            "ask": "asking",
            **GIVE_UP,
        },
    ),
    "described": (
        ("guest()",),
        GONE,
        {"guest": None, "prepare": "preparing", "start": "streaming", **GIVE_UP},
    ),
    "preparing": (
        ("prepare()",),
        {"PREPARED": "prepared", **GONE},
        {"cancel": "cancelled", **GIVE_UP},
    ),
    "prepared": (
        ("prepare()", "PREPARED"),
        GONE,
        {"start": "streaming", "cancel": "cancelled", **GIVE_UP},
    ),
    "asking": (("ask()",), {"OUTCOME": "finished", **GONE}, GIVE_UP),
    "streaming": (("start()",), {}, {}),
}

CHANNEL: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "waiting": ((), {"Greeting": "asking"}, {}),
    "asking": (("Greeting",), {"ATTACHED": "attached", **GONE}, {}),
    "attached": (("Greeting", "ATTACHED"), {}, {}),
    "closed": (("eof",), {}, {}),
}

#: What differs where TLS is selected, or the channel is one in TLS.
TLS_DESTINATION: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "securing": ((TLS_REPLY.encode(),), {"BINDING": "replied", **GONE}, GIVE_UP),
    "replied": (
        (TLS_REPLY.encode(), "secured()", "BINDING"),
        {"GUEST": "described", "FEATURE": "described", "PREPARE": "preparing", **GONE},
        {"feature": None, **GIVE_UP},
    ),
}
TLS_SOURCE: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "securing": (("reply_tls()",), {}, GIVE_UP),
    "binding": (("reply_tls()", "secured()"), {"BINDING": "replied", **GONE}, GIVE_UP),
    "replied": (
        ("reply_tls()", "secured()", "BINDING"),
        {"FEATURE": None, **GONE},
        {**CHOICE, **GIVE_UP},
    ),
}
TLS_CHANNEL: dict[str, tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]] = {
    "securing": (("Greeting",), {}, {}),
    "asking": (("Greeting", "secured()"), {"ATTACHED": "attached", **GONE}, {}),
}

#: States in which bytes are not looked at: kept for the payload, or dropped.
DEAF = {"attached", "streaming", "closed"}
#: States in which the end of the connection is in order, or no news.
SILENT_END = {"attached", "streaming", "closed", "finished", "cancelled"}

#: The codes of a violation where it is not ``unexpected-message``.
SPECIAL = {
    "Greeting": {"second-reply"},
    "Reply": {"second-reply"},
    "role header": {"second-reply"},
    "the stream": {"early-payload"},
    "garbage": {"unknown-message"},
    "FEATURE": {"unexpected-message", "not-offered"},
}


def bare_source(*steps: Any) -> SourceHandshake:
    """Make a source that selected nothing and take it through sayings and calls."""
    made = source("Greeting")
    made.reply(())
    return walk(made, *steps)


Make = Callable[[], Any]


def states() -> Iterator[tuple[str, str, Make, dict[str, Any], dict[str, Any]]]:
    """Yield for each state: label, name, what makes it, sayings and calls."""
    listings: tuple[tuple[str, Callable[..., Any], Any], ...] = (
        ("destination", destination, DESTINATION),
        ("source", source, SOURCE),
        ("bare source", bare_source, BARE_SOURCE),
        ("channel", channel, CHANNEL),
        ("TLS destination", tls_destination, TLS_DESTINATION),
        ("TLS source", tls_source, TLS_SOURCE),
        ("TLS channel", tls_channel, TLS_CHANNEL),
    )
    for role, make, listing in listings:
        for label, (path, sayings, calls) in listing.items():
            yield (
                f"{role} {label}",
                label.partition(",")[0],
                partial(make, *path),
                sayings,
                calls,
            )


class EveryPair(SynchronousTestCase):
    """The answers to every state with every input."""

    def test_states_are_all_there(self) -> None:
        """The listings reach each state of each machine."""
        for role, listings in (
            (DestinationHandshake, (DESTINATION, TLS_DESTINATION)),
            (SourceHandshake, (SOURCE, BARE_SOURCE, TLS_SOURCE)),
            (ChannelHandshake, (CHANNEL, TLS_CHANNEL)),
        ):
            listed = {label.partition(",")[0] for listing in listings for label in listing}
            self.assertEqual(listed, set(role.table.expected))
        for label, state, make, _, _ in states():
            self.assertEqual(make().state, state, label)

    def test_peer(self) -> None:
        """What the peer says is told, or answered by one ERROR and the end."""
        for label, state, make, sayings, _ in states():
            for saying, (data, event) in SAYINGS.items():
                with_saying = f"{label}: {saying}"
                handshake = make()
                told = handshake.receive(data)
                sent = handshake.data_to_send()
                if state in DEAF:
                    self.assertEqual((told, sent, handshake.state), ([], b"", state), with_saying)
                    kept = b"" if state == "closed" else data
                    self.assertEqual(handshake.leftover, kept, with_saying)
                elif saying in sayings:
                    self.assertEqual(handshake.state, sayings[saying] or state, with_saying)
                    self.in_order(with_saying, handshake, saying, event, told, sent)
                else:
                    self.violation(with_saying, handshake, saying, told, sent)

    def in_order(
        self, label: str, handshake: Any, saying: str, event: Any, told: Any, sent: bytes
    ) -> None:
        if saying == "START":
            self.assertEqual(told, [Started(handshake.state == "streaming")], label)
        elif label.startswith("TLS destination securing") and saying == "BINDING":
            # It has been the Reply that counts, from here on.
            self.assertEqual(told, [Selected(1, TLS_REPLY.features)], label)
            self.assertEqual(sent, messages.Binding(BOUND).encode(), label)
            return
        elif "source cancelled" in label and saying != "ERROR":
            self.assertEqual(told, [], label)
        elif "channel" in label and saying == "Greeting":
            self.assertEqual((told, sent), ([], ROLE.prove(SECRET).encode()), label)
            return
        else:
            self.assertEqual(told, [event], label)
        self.assertEqual(sent, b"", label)

    def violation(self, label: str, handshake: Any, saying: str, told: Any, sent: bytes) -> None:
        (failed,) = told
        self.assertIsInstance(failed, Failed, label)
        self.assertFalse(failed.remote, label)
        if label.startswith("destination opened"):
            codes = {"early-payload"}
        elif label == "destination waiting: Greeting":
            # Its number of versions is read as the version, and what follows as the count.
            codes = {"too-many"}
        elif label.endswith(" waiting: Reply"):
            # Likewise: its version is a number of versions, and 0 the version.
            codes = {"no-common-version"}
        elif " waiting" in label:
            codes = {"bad-magic", "early-payload"}
        else:
            codes = SPECIAL.get(saying, {"unexpected-message"})
        self.assertIn(failed.code, codes, label)
        self.assertTrue(handshake.closed, label)
        if label.startswith(("channel asking", "TLS channel")):
            self.assertEqual(sent, b"", label)
        else:
            self.assertEqual(sent, messages.Error(failed.code, failed.text).encode(), label)
        # And that is all, whatever comes.
        self.assertEqual(handshake.receive(b"more"), [], label)
        self.assertEqual(handshake.eof(), [], label)
        self.assertEqual(handshake.data_to_send(), b"", label)
        self.assertEqual(handshake.wanted, 0, label)

    def test_owner(self) -> None:
        """What the owner calls is sent, or is a LocalError that changes nothing."""
        for label, state, make, _, calls in states():
            for call, arguments in CALLS.items():
                handshake = make()
                method = getattr(handshake, call, None)
                if method is None:
                    self.assertNotIn(call, calls, label)
                    continue
                with_call = f"{label}: {call}()"
                if call not in calls:
                    error = self.assertRaises(LocalError, method, *arguments)
                    self.assertIn(error.code, {"handshake-misuse", "not-offered"}, with_call)
                    self.assertEqual(handshake.data_to_send(), b"", with_call)
                    self.assertEqual(handshake.state, state, with_call)
                    continue
                method(*arguments)
                self.assertEqual(handshake.state, calls[call] or state, with_call)
                self.assertEqual(handshake.receive(b""), [], with_call)
                sent = handshake.data_to_send()
                if state == "closed" or (state, call) == ("finished", "heartbeat"):
                    self.assertEqual(sent, b"", with_call)
                elif call == "reply":
                    self.assertEqual(sent, Reply(1, *arguments).encode(), with_call)
                else:
                    said: Decoder[Any] = Decoder(read_message(admit_all))
                    said.feed(sent)
                    self.assertEqual(said.item.KIND, MessageType[call.upper()], with_call)
                    self.assertEqual(tuple(vars(said.item).values()), arguments, with_call)

    def test_end(self) -> None:
        """The end of the connection closes; it is a failure where more was to come."""
        for label, state, make, _, _ in states():
            handshake = make()
            told = handshake.eof()
            self.assertTrue(handshake.closed, label)
            if state in SILENT_END:
                self.assertEqual(told, [], label)
                self.assertEqual(handshake.data_to_send(), b"", label)
            else:
                (failed,) = told
                self.assertEqual((failed.code, failed.remote), ("peer-gone", False), label)
                # The peer may have ended its own half only, and still read.
                sent = handshake.data_to_send()
                silent = label.startswith(("channel asking", "TLS channel"))
                self.assertEqual(sent.startswith(b"\0\1"), not silent, label)

    def test_nothing_is_read_ahead(self) -> None:
        """In a state where payload or silence is due, not a byte is wanted; else one is."""
        for label, state, make, _, _ in states():
            self.assertEqual(make().wanted == 0, state in DEAF | {"opened"}, label)


class Choices(SynchronousTestCase):
    """What the tables cannot say: names, versions, and sums."""

    def test_names_that_the_source_does_not_know(self) -> None:
        """They are told to the owner and harm nothing: an older source is served."""
        handshake = SourceHandshake()
        told = handshake.receive(Greeting((1,), ("multifd", "__org.example_new")).encode())
        self.assertEqual(told, [Greeted((1,), ("multifd", "__org.example_new"))])
        handshake.reply(("multifd",))
        self.assertEqual(handshake.data_to_send(), Reply(1, ("multifd",)).encode())

    def test_newer_destination(self) -> None:
        """A destination that speaks versions 2 and 1 serves a source that speaks 1."""
        target = DestinationHandshake((), versions=(2, 1))
        handshake = SourceHandshake()
        handshake.receive(target.data_to_send())
        handshake.reply(())
        self.assertEqual(target.receive(handshake.data_to_send()), [Selected(1, ())])

    def test_highest_common_version(self) -> None:
        """Out of several common versions the highest is taken."""
        handshake = SourceHandshake(versions=(1, 2, 3))
        handshake.receive(Greeting((1, 2), ()).encode())
        handshake.reply(())
        self.assertEqual(handshake.data_to_send(), Reply(2, ()).encode())

    def test_source_selects_what_was_not_offered(self) -> None:
        """The source's owner is told, and nothing is sent."""
        handshake = source("Greeting")
        error = self.assertRaises(LocalError, handshake.reply, ("c",))
        self.assertEqual(error.code, "not-offered")
        self.assertEqual((handshake.state, handshake.data_to_send()), ("greeted", b""))

    def test_feature_said_twice(self) -> None:
        """The owner is told, on either side, and nothing is sent."""
        for handshake in (source(*REPLIED), destination(FEATURES)):
            handshake.feature("a", {})
            handshake.data_to_send()
            error = self.assertRaises(LocalError, handshake.feature, "a", {})
            self.assertEqual(error.code, "repeated-feature")
            self.assertEqual(handshake.data_to_send(), b"")

    def test_withdrawn(self) -> None:
        """A feature that the peer gives up comes with its reason."""
        handshake = destination(FEATURES)
        data = messages.Feature("a", {"withdrawn": "this QEMU lacks it"}).encode()
        (event,) = handshake.receive(data + messages.Feature("b", {"x": 1}).encode())[:1]
        assert isinstance(event, FeatureSaid)
        self.assertEqual(event.withdrawn, "this QEMU lacks it")
        self.assertIs(FeatureSaid("b", {"x": 1}).withdrawn, None)

    def test_what_comes_before_start_is_bounded(self) -> None:
        """The bodies before START come to 1 MiB at most, whatever messages they are in."""
        names = tuple(f"f{number}" for number in range(20))
        handshake = DestinationHandshake(names)
        handshake.receive(Reply(1, names).encode())
        told: list[Event] = []
        for name in names:
            told += handshake.receive(messages.Feature(name, {"a": "x" * 65000}).encode())
        *heard, failed = told
        assert isinstance(failed, Failed)
        self.assertEqual(failed.code, "too-long")
        self.assertEqual(len(heard), (1 << 20) // 65000)

    def test_channel_and_destination(self) -> None:
        """A proven channel is attached; the proof fails under another secret."""
        for secret, holds in ((SECRET, True), (bytes(32), False)):
            target = DestinationHandshake(("a",))
            opener = ChannelHandshake(ROLE, secret)
            self.assertEqual(opener.receive(target.data_to_send()), [])
            (opened,) = target.receive(opener.data_to_send())
            assert isinstance(opened, ChannelOpened)
            self.assertEqual(opened.role.verify(SECRET), holds)
            if holds:
                target.attached()
                self.assertEqual(opener.receive(target.data_to_send()), [ChannelAttached()])
                self.assertEqual((opener.wanted, target.wanted), (0, 0))
            else:
                target.error("bad-proof", "The proof does not hold.")
                self.assertEqual(
                    opener.receive(target.data_to_send()),
                    [Failed("bad-proof", "The proof does not hold.", True)],
                )
