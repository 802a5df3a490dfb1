"""The control connection: a handshake machine on a transport, with a clock."""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import DeadlineError, PeerGone, ProtocolError, RemoteError
from qmigd.handshake.destination import DestinationHandshake
from qmigd.handshake.events import Event, GuestDescribed, Released, Selected, StatusSaid
from qmigd.handshake.source import SourceHandshake
from qmigd.migration.control import HEARTBEATS, LINGER, Control
from qmigd.wire.messages import Error


class Transport(StringTransport):
    """A transport that also knows half-closing, aborting, and how much it is to read."""

    bufferSize = 65536
    half_closed = False
    aborting = False

    def loseWriteConnection(self) -> None:
        self.half_closed = True

    def abortConnection(self) -> None:
        self.aborting = True


class Ends:
    """A destination's control connection, and a source's machine that speaks to it."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.transport = Transport()
        self.control = Control(DestinationHandshake(["a"]), self.clock)
        self.control.makeConnection(self.transport)
        self.source = SourceHandshake()

    def exchange(self) -> list[Event]:
        """Let each hear what the other has said; returns what the source learns."""
        heard = self.source.receive(self.transport.value())
        self.transport.clear()
        self.control.dataReceived(self.source.data_to_send())
        return heard

    def replied(self) -> None:
        self.exchange()
        self.source.reply(["a"])
        self.exchange()

    def wait(self, *kinds: type[Event]) -> Deferred[Any]:
        return Deferred.fromCoroutine(self.control.next(*kinds, deadline=10, what="something"))


class WaitingTests(SynchronousTestCase):
    """Who waits for the peer gets the event, the peer's error, or its silence."""

    def setUp(self) -> None:
        self.ends = Ends()

    def test_event_that_came_before(self) -> None:
        self.ends.replied()
        self.assertEqual(self.successResultOf(self.ends.wait(Selected)).features, ("a",))

    def test_event_that_comes_later(self) -> None:
        self.ends.replied()
        self.successResultOf(self.ends.wait(Selected))
        waiting = self.ends.wait(GuestDescribed)
        self.assertNoResult(waiting)
        self.ends.source.guest({"name": "vm"})
        self.ends.exchange()
        self.assertEqual(self.successResultOf(waiting).description, {"name": "vm"})

    def test_silence(self) -> None:
        """The deadline passes; the sentence says what was waited for."""
        waiting = self.ends.wait(Selected)
        self.ends.clock.advance(10)
        error = self.failureResultOf(waiting, DeadlineError).value
        self.assertIn("something did not come within 10 seconds", str(error))

    def test_error_of_the_peer(self) -> None:
        self.ends.replied()
        self.successResultOf(self.ends.wait(Selected))
        waiting = self.ends.wait(GuestDescribed)
        self.ends.source.error("feature", "I would rather not.")
        self.ends.exchange()
        error = self.failureResultOf(waiting, RemoteError).value
        self.assertEqual(
            (error.code, error.text), ("feature", "the source says: I would rather not.")
        )

    def test_error_right_behind(self) -> None:
        """What the peer said before its ERROR is not acted on, if both have come at once."""
        self.ends.replied()
        self.successResultOf(self.ends.wait(Selected))
        waiting = self.ends.wait(GuestDescribed)
        self.ends.source.guest({})
        self.ends.source.error("feature", "I would rather not.")
        self.ends.exchange()
        self.failureResultOf(waiting, RemoteError)

    def test_violation(self) -> None:
        """The peer gets an ERROR with a text; who waits gets the same."""
        waiting = self.ends.wait(Selected)
        self.ends.transport.clear()
        self.ends.control.dataReceived(b"HTTP/1.1 200 OK\r\n")
        error = self.failureResultOf(waiting, ProtocolError).value
        self.assertEqual(error.code, "bad-magic")
        self.assertEqual(self.ends.transport.value(), Error(error.code, error.text).encode())

    def test_lost(self) -> None:
        waiting = self.ends.wait(Selected)
        self.ends.control.connectionLost(Failure(ConnectionDone()))
        self.failureResultOf(waiting, PeerGone)
        self.failureResultOf(self.ends.wait(Selected), PeerGone)


class LastWordsTests(SynchronousTestCase):
    """A refused peer can read why, and no longer than a moment."""

    def refused(self) -> Ends:
        ends = Ends()
        ends.replied()
        ends.transport.clear()
        ends.control.refuse(PeerGone("You are not wanted.", code="because"))
        return ends

    def test_error_is_said_and_only_one_half_closed(self) -> None:
        """What still comes is read and dropped, so that no reset swallows the ERROR."""
        ends = self.refused()
        self.assertEqual(ends.transport.value(), Error("because", "You are not wanted.").encode())
        self.assertTrue(ends.transport.half_closed)
        ends.control.dataReceived(b"x" * 100_000)
        self.assertFalse(ends.transport.aborting)
        self.assertEqual(ends.transport.producerState, "producing")

    def test_not_for_ever(self) -> None:
        ends = self.refused()
        ends.clock.advance(LINGER)
        self.assertTrue(ends.transport.aborting)

    def test_peer_closes(self) -> None:
        """Nothing is left behind."""
        ends = self.refused()
        ends.control.connectionLost(Failure(ConnectionDone()))
        self.assertEqual(ends.clock.getDelayedCalls(), [])

    def test_no_answer_to_an_error(self) -> None:
        """An ERROR is not answered with an ERROR."""
        ends = Ends()
        ends.replied()
        ends.source.error("feature", "No.")
        ends.exchange()
        ends.transport.clear()
        ends.control.refuse(PeerGone("as well"))
        self.assertEqual(ends.transport.value(), b"")


class LivenessTests(SynchronousTestCase):
    """Once the migration runs, silence is noticed."""

    def setUp(self) -> None:
        self.ends = Ends()
        self.ends.replied()
        self.ends.source.prepare({})
        self.ends.exchange()
        self.ends.control.machine.prepared({})
        self.ends.control.flush()
        self.ends.exchange()
        self.ends.source.start()
        self.ends.exchange()
        self.heard: list[Event | None] = []
        self.ends.control.listen(lambda event: self.heard.append(event))
        self.heard.clear()
        self.ends.control.stay_alive(8.0)

    def test_heartbeats(self) -> None:
        """So many within the time after which a silent side is lost."""
        self.ends.transport.clear()
        for _ in range(HEARTBEATS - 1):
            self.ends.clock.advance(8.0 / HEARTBEATS)
        beats = len(self.ends.transport.value()) // 6
        self.assertEqual(beats, HEARTBEATS - 1)

    def test_silent_peer_is_lost(self) -> None:
        for _ in range(HEARTBEATS):
            self.ends.clock.advance(8.0 / HEARTBEATS)
        self.assertIsInstance(self.ends.control.failure, PeerGone)
        self.assertEqual(self.heard, [None])
        self.assertTrue(self.ends.transport.aborting)
        self.assertEqual(self.ends.clock.getDelayedCalls(), [])

    def test_any_sign_of_life_counts(self) -> None:
        for _ in range(3 * HEARTBEATS):
            self.ends.clock.advance(8.0 / HEARTBEATS)
            self.ends.source.heartbeat()
            self.ends.exchange()
        self.assertIsNone(self.ends.control.failure)
        self.assertEqual(self.heard, [])

    def test_events_are_handed_on(self) -> None:
        """As they come, in order; the end is ``None``."""
        self.ends.source.status({"status": "active"})
        self.ends.source.release({"run": True})
        self.ends.exchange()
        self.ends.control.connectionLost(Failure(ConnectionDone()))
        kinds = [type(event) for event in self.heard]
        self.assertEqual(kinds, [StatusSaid, Released, type(None)])
