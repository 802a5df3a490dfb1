"""The test vectors of docs/vectors, every one, against the code."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import ProtocolError
from qmigd.handshake import DestinationHandshake, SourceHandshake
from qmigd.handshake.events import ChannelOpened, Event, Failed, Greeted, Selected
from qmigd.handshake.exchange import Exchange
from qmigd.wire import messages
from qmigd.wire.greeting import Greeting, Reply, read_greeting
from qmigd.wire.messages import read_message
from qmigd.wire.opening import read_opening
from qmigd.wire.reading import Decoder
from qmigd.wire.role import RoleHeader
from tests.test_wire_reading import admit_all

VECTORS = Path(__file__).parent.parent / "docs" / "vectors"
OFFER = ("multifd", "postcopy-ram")


def vectors(name: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield the name of each vector of a file, the vector, and what is expected."""
    for vector in json.loads((VECTORS / name).read_text())["vectors"]:
        yield f"{name}: {vector['name']}", vector, vector["expect"]


def feed(handshake: Exchange, data: bytes, size: int) -> list[Event]:
    """Give the data in pieces of a size; return the events."""
    told: list[Event] = []
    for offset in range(0, len(data), size):
        told += handshake.receive(data[offset : offset + size])
    return told


def parts(message: messages.Message) -> dict[str, Any]:
    """Return a message as the vectors have it."""
    values = {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in vars(message).items()
    }
    return {"type": message.KIND.name, **values}


class Vectors(SynchronousTestCase):
    """Each vector's verdict is the code's, whole and a byte at a time."""

    def opening(self, name: str, make: Any, check_good: Any) -> None:
        for label, vector, expect in vectors(name):
            data = bytes.fromhex(vector["hex"])
            for size in (max(1, len(data)), 1):
                handshake = make()
                handshake.data_to_send()
                told = feed(handshake, data, size)
                if expect.get("error") == "peer-gone":
                    self.assertEqual(told, [], label)
                    told = handshake.eof()
                if "error" in expect:
                    (failed,) = told
                    assert isinstance(failed, Failed), f"{label}: {told}"
                    self.assertEqual((failed.code, failed.remote), (expect["error"], False), label)
                    self.assertTrue(handshake.closed, label)
                    answer: Decoder[Any] = Decoder(read_message(admit_all))
                    answer.feed(handshake.data_to_send())
                    self.assertEqual(answer.item, messages.Error(failed.code, failed.text), label)
                else:
                    check_good(label, handshake, told, expect)
            if "after" in expect:
                self.just_enough(label, make, data, expect["after"])

    def just_enough(self, label: str, make: Any, data: bytes, after: int) -> None:
        handshake = make()
        self.assertEqual(feed(handshake, data[: after - 1], 1), [], label)
        self.assertNotEqual(handshake.receive(data[after - 1 : after]), [], label)

    def test_greeting(self) -> None:
        """What a source makes of what it reads first."""

        def good(label: str, handshake: Any, told: list[Event], expect: Any) -> None:
            expected = Greeted(tuple(expect["versions"]), tuple(expect["features"]))
            self.assertEqual(told, [expected], label)

        self.opening("greeting.json", SourceHandshake, good)
        for label, vector, expect in vectors("greeting.json"):
            if "error" not in expect:
                made = Greeting(tuple(expect["versions"]), tuple(expect["features"]))
                self.assertEqual(made.encode().hex(), vector["hex"], label)

    def test_opening(self) -> None:
        """What a destination makes of what it reads first."""

        def good(label: str, handshake: Any, told: list[Event], expect: Any) -> None:
            (event,) = told
            if "reply" in expect:
                reply = expect["reply"]
                self.assertEqual(event, Selected(reply["version"], tuple(reply["features"])), label)
            elif "role" in expect:
                role = expect["role"]
                assert isinstance(event, ChannelOpened), f"{label}: {told}"
                found = (str(event.role.migration), event.role.channel, event.role.index)
                self.assertEqual(found, (role["migration"], role["channel"], role["index"]))
            else:
                said = expect["said"]
                self.assertEqual(event, Failed(said["code"], said["text"], True), label)

        self.opening("opening.json", lambda: DestinationHandshake(OFFER), good)
        for label, vector, expect in vectors("opening.json"):
            if "reply" in expect:
                made = Reply(expect["reply"]["version"], tuple(expect["reply"]["features"]))
                self.assertEqual(made.encode().hex(), vector["hex"], label)

    def test_role(self) -> None:
        """Whether the proof of a role header holds."""
        secret = bytes.fromhex(json.loads((VECTORS / "role.json").read_text())["secret"])
        for label, vector, expect in vectors("role.json"):
            decoder: Decoder[Any] = Decoder(read_opening((1,)))
            decoder.feed(bytes.fromhex(vector["hex"]))
            role = decoder.item
            self.assertEqual(
                {
                    "migration": str(role.migration),
                    "channel": role.channel,
                    "index": role.index,
                    "proven": role.verify(secret),
                },
                expect,
                label,
            )
            if expect["proven"]:
                made = RoleHeader(uuid.UUID(expect["migration"]), role.channel, role.index)
                self.assertEqual(made.prove(secret).encode().hex(), vector["hex"], label)

    def test_messages(self) -> None:
        """What a single message is."""
        for label, vector, expect in vectors("messages.json"):
            data = bytes.fromhex(vector["hex"])
            for size in (len(data), 1):
                decoder: Decoder[Any] = Decoder(read_message(admit_all))
                try:
                    for offset in range(0, len(data), size):
                        decoder.feed(data[offset : offset + size])
                except ProtocolError as error:
                    self.assertEqual(error.code, expect.get("error"), label)
                    if size == 1 and "after" in expect:
                        self.assertEqual(decoder.taken, expect["after"], label)
                else:
                    self.assertNotIn("error", expect, label)
                    self.assertEqual(parts(decoder.item), expect, label)


class Conversations(SynchronousTestCase):
    """So is that of whole conversations."""

    def test_conversations(self) -> None:
        """How a whole conversation ends for the side under test."""
        for label, vector, expect in vectors("conversations.json"):
            for size in (1 << 20, 1):
                with_label = f"{label}, by {size}"
                handshake, told = self.converse(vector, size, with_label)
                sent = handshake.data_to_send()
                if "stream" in expect:
                    self.assertEqual(handshake.wanted, 0, with_label)
                    self.assertEqual(handshake.leftover.hex(), expect["stream"], with_label)
                elif "state" in expect:
                    self.assertEqual(handshake.state, expect["state"], with_label)
                else:
                    failed = told[-1]
                    assert isinstance(failed, Failed), f"{with_label}: {told}"
                    code = expect["said"] if failed.remote else expect["error"]
                    self.assertEqual(failed.code, code, with_label)
                    self.assertTrue(handshake.closed)
                    answer = messages.Error(failed.code, failed.text).encode()
                    self.assertEqual(sent, b"" if failed.remote else answer, with_label)
                if "error" not in expect:
                    self.assertEqual(sent, b"", with_label)

    def converse(
        self, vector: dict[str, Any], size: int, label: str
    ) -> tuple[Exchange, list[Event]]:
        """Take the part of the side under test; return it and all that it told."""
        side = vector["under-test"]
        handshake = self.machine(
            SourceHandshake() if side == "source" else DestinationHandshake(vector["offer"])
        )
        told: list[Event] = []
        for step in vector["steps"]:
            data = bytes.fromhex(step["hex"])
            if step["from"] != side:
                told += feed(handshake, data, size)
            else:
                if data.startswith(b"QEMU-MIGRATE"):
                    data = self.open(handshake, data)
                while data:
                    decoder: Decoder[Any] = Decoder(read_message(admit_all))
                    data = data[decoder.feed(data) :]
                    self.say(handshake, decoder.item)
                self.assertEqual(handshake.data_to_send().hex(), step["hex"], label)
        return handshake, told

    def machine(self, handshake: Exchange) -> Any:
        """Return what takes part in conversations."""
        return handshake

    def open(self, handshake: Any, data: bytes) -> bytes:
        """Make a source say the Reply; a destination has said its Greeting. Returns the rest."""
        if handshake.role == "source":
            reply: Decoder[Any] = Decoder(read_opening((1,)))
            rest = data[reply.feed(data) :]
            handshake.reply(reply.item.features)
            return rest
        greeting = Decoder(read_greeting((1,)))
        return data[greeting.feed(data) :]

    def say(self, handshake: Any, message: messages.Message) -> None:
        """Have the handshake say a message."""
        if isinstance(message, messages.Binding):
            # The source says it once TLS is there, and the destination by itself.
            handshake.secured()
            return
        getattr(handshake, message.KIND.name.lower())(*vars(message).values())
