"""The relay: order of channels, loss, refusal, and what is left at the end."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.endpoints import TCP4ClientEndpoint
from twisted.internet.task import Clock
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase

from qmigd.channels.attach import Attachments, open_channel
from qmigd.channels.relay import DestinationRelay, SourceRelay
from qmigd.channels.relay_channels import (
    ChannelEnded,
    ChannelHeld,
    ChannelLost,
    ChannelRefused,
    RelayEvent,
)
from qmigd.channels.secured import Secured
from qmigd.errors import LocalError, PeerGone
from qmigd.handshake.channel import ChannelHandshake
from qmigd.interfaces import ICodec
from qmigd.transports.sockets import tcp_pair
from qmigd.wire.role import RoleHeader

from .test_channels_attach import ID, SECRET, DestinationFactory
from .test_channels_pump import (
    Framed,
    is_open,
    pattern,
    pump_threads,
    read_all,
    reset,
    write_all,
)

MAIN = ("main", 0)
PLAN = [MAIN, ("multifd", 0), ("multifd", 1)]


class RelayCase(TestCase):
    """Has relays made, and sees that nothing is left of them."""

    def setUp(self) -> None:
        """A run directory, which is empty at the end."""
        self.before = pump_threads()
        self.run_dir = Path(tempfile.mkdtemp())
        self.addCleanup(self.run_dir.rmdir)
        self.addCleanup(lambda: self.assertEqual(pump_threads(), self.before))
        self.events: list[RelayEvent] = []
        self._waiting: list[tuple[Callable[[], bool], Deferred[None]]] = []

    def heard(self, event: RelayEvent) -> None:
        """What a relay tells its owner."""
        self.events.append(event)
        self.look()

    def look(self) -> None:
        """See what has come true."""
        for waiting in list(self._waiting):
            condition, done = waiting
            if condition():
                self._waiting.remove(waiting)
                done.callback(None)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that is told of holds."""
        if not condition():
            done: Deferred[None] = Deferred()
            self._waiting.append((condition, done))
            await done
            # And not in the middle of what told of it.
            turn: Deferred[None] = Deferred()
            calls: Any = reactor
            calls.callLater(0, turn.callback, None)
            await turn

    def connect(self, path: str) -> socket.socket:
        """Connect as the source's QEMU does."""
        sock = socket.socket(socket.AF_UNIX)
        self.addCleanup(sock.close)
        sock.connect(path)
        return sock


class SourceTests(RelayCase):
    """:class:`SourceRelay`, with the opening of channels in the test's hands."""

    def setUp(self) -> None:
        """A relay that listens."""
        super().setUp()
        self.opening: list[tuple[tuple[str, int], Deferred[socket.socket]]] = []
        self.relay = SourceRelay(reactor, self.run_dir, PLAN, self.open, self.heard)
        self.addCleanup(self.relay.stop)
        self.path = self.relay.listen().path

    def open(self, name: str, index: int) -> Deferred[socket.socket]:
        """A channel to the peer is asked for."""
        done: Deferred[socket.socket] = Deferred()
        self.opening.append(((name, index), done))
        self.look()
        return done

    async def asked(self, count: int) -> tuple[tuple[str, int], Deferred[socket.socket]]:
        """The last one of so many channels that have been asked for."""
        await self.until(lambda: len(self.opening) >= count)
        self.assertEqual(len(self.opening), count)
        return self.opening[-1]

    def give(self, opened: Deferred[socket.socket]) -> socket.socket:
        """The channel is there; returns the peer's end of it."""
        near, far = tcp_pair()
        self.addCleanup(far.close)
        opened.callback(near)
        return far

    def states(self) -> list[str]:
        """Of the channels, in their order."""
        return [channel.state for channel in self.relay.channels()]

    async def test_private(self) -> None:
        """Nobody else can reach the socket that QEMU connects to."""
        self.assertEqual(Path(self.path).parent, self.run_dir)
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)

    async def test_order(self) -> None:
        """Connections get the planned names in their order, and each waits for the one before."""
        qemu = [self.connect(self.path) for _ in PLAN]
        for number, planned in enumerate(PLAN):
            channel, opened = await self.asked(number + 1)
            self.assertEqual(channel, planned)
            peer = self.give(opened)
            qemu[number].sendall(b"%d" % number)
            self.assertEqual(await deferToThread(peer.recv, 10), b"%d" % number)
        self.assertEqual(self.states(), ["open"] * 3)

    async def test_never_waits_for_all(self) -> None:
        """The first channel works both ways although the others have not come."""
        qemu = self.connect(self.path)
        qemu.sendall(b"early")
        _, opened = await self.asked(1)
        peer = self.give(opened)
        self.assertEqual(await deferToThread(peer.recv, 10), b"early")
        peer.sendall(b"answer")
        self.assertEqual(await deferToThread(qemu.recv, 10), b"answer")
        # One that comes late, as the preempt channel does, is forwarded like any other.
        self.connect(self.path)
        channel, opened = await self.asked(2)
        self.assertEqual(channel, PLAN[1])
        self.assertEqual(self.states(), ["open", "opening"])

    async def test_one_too_many(self) -> None:
        """A connection that was not planned is closed and told of; the others go on."""
        for number in range(len(PLAN)):
            self.connect(self.path)
            self.give((await self.asked(number + 1))[1])
        extra = self.connect(self.path)
        self.assertEqual(await deferToThread(extra.recv, 1), b"")
        [event] = self.events
        self.assertIsInstance(event, ChannelRefused)
        self.assertIn("more than the 3 channels planned", event.reason)
        self.assertEqual(self.states(), ["open"] * 3)

    async def test_not_opened(self) -> None:
        """A channel that the peer does not take is lost, and QEMU's end of it closed."""
        qemu = self.connect(self.path)
        self.connect(self.path)
        _, opened = await self.asked(1)
        opened.errback(PeerGone("The peer has gone."))
        self.assertEqual(await deferToThread(qemu.recv, 1), b"")
        self.assertEqual(
            self.events,
            [ChannelLost(MAIN, "The peer has gone."), ChannelEnded(MAIN, "The peer has gone.")],
        )
        # The next one is tried all the same.
        channel, _ = await self.asked(2)
        self.assertEqual(channel, PLAN[1])
        self.assertEqual(self.states(), ["ended", "opening"])

    async def test_not_opened_on_hold(self) -> None:
        """On hold QEMU's end stays open even where the channel could not be opened."""
        self.relay.hold = True
        qemu = self.connect(self.path)
        _, opened = await self.asked(1)
        opened.errback(PeerGone("The peer has gone."))
        self.assertEqual(self.events, [ChannelLost(MAIN, "The peer has gone.")])
        self.assertTrue(is_open(qemu))
        self.assertEqual(self.states(), ["lost"])
        self.relay.abort("given up")
        self.assertEqual(self.events[1:], [ChannelEnded(MAIN, "given up")])
        self.assertFalse(is_open(qemu))

    async def test_hold_is_over(self) -> None:
        """When hold is over, QEMU notices which channels could not be opened."""
        self.relay.hold = True
        qemu = self.connect(self.path)
        _, opened = await self.asked(1)
        opened.errback(PeerGone("The peer has gone."))
        self.assertTrue(is_open(qemu))
        self.relay.hold = False
        self.assertFalse(is_open(qemu))
        self.assertEqual(self.states(), ["ended"])

    async def test_opening_breaks(self) -> None:
        """Whatever opening a channel raises, the channel is lost and the relay lives."""
        self.connect(self.path)
        _, opened = await self.asked(1)
        opened.errback(ZeroDivisionError())
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual([type(event) for event in self.events], [ChannelLost, ChannelEnded])

    async def test_owner_breaks(self) -> None:
        """An owner that raises does not keep a lost channel open."""

        def broken(event: RelayEvent) -> None:
            raise ZeroDivisionError

        self.relay._on_event = broken
        qemu = self.connect(self.path)
        _, opened = await self.asked(1)
        reset(self.give(opened))
        self.assertEqual(await deferToThread(qemu.recv, 1), b"")
        await self.relay.stop()
        self.assertTrue(self.flushLoggedErrors(ZeroDivisionError))

    async def test_lost(self) -> None:
        """A channel whose peer is lost is told of, and QEMU notices."""
        qemu = self.connect(self.path)
        _, opened = await self.asked(1)
        reset(self.give(opened))
        self.assertEqual(await deferToThread(qemu.recv, 1), b"")
        await self.until(lambda: len(self.events) == 2)
        self.assertEqual([type(event) for event in self.events], [ChannelLost, ChannelEnded])
        self.assertEqual({event.channel for event in self.events}, {MAIN})

    async def test_hold(self) -> None:
        """On hold QEMU's sockets outlive the peer until the relay is aborted."""
        qemu = self.connect(self.path)
        _, opened = await self.asked(1)
        peer = self.give(opened)
        # Said while the channel is open, as before postcopy.
        self.relay.hold = True
        reset(peer)
        await self.until(lambda: len(self.events) == 1)
        self.assertTrue(is_open(qemu))
        self.assertEqual(self.states(), ["lost"])
        await self.relay.stop("given up")
        self.assertFalse(is_open(qemu))
        self.assertEqual(self.events[1:], [ChannelEnded(MAIN, "given up")])

    async def test_hold_of_an_end(self) -> None:
        """On hold the owner, and not QEMU, is told that the peer has closed its end."""
        qemu = self.connect(self.path)
        _, opened = await self.asked(1)
        peer = self.give(opened)
        self.relay.hold = True
        peer.shutdown(socket.SHUT_WR)
        await self.until(lambda: len(self.events) == 1)
        self.assertEqual([type(event) for event in self.events], [ChannelHeld])
        self.assertTrue(is_open(qemu))
        self.assertEqual(self.states(), ["open"])

    async def test_stop_while_opening(self) -> None:
        """Stopping gives up what is being opened, and closes what waits for it."""
        qemu = [self.connect(self.path) for _ in range(2)]
        await self.asked(1)
        await self.relay.stop()
        for sock in qemu:
            self.assertFalse(is_open(sock))
        self.assertEqual(len(self.opening), 1)
        self.assertEqual(list(self.run_dir.iterdir()), [])
        # Stopping again is harmless.
        await self.relay.stop()
        self.assertNotIn(ChannelLost, [type(event) for event in self.events])

    async def test_stop_instead_of_opening(self) -> None:
        """Who is asked to open a channel may stop the relay instead."""
        stopped: list[Deferred[None]] = []

        def stop(name: str, index: int) -> Deferred[socket.socket]:
            stopped.append(self.relay.stop())
            self.look()
            return Deferred()

        self.relay._open_channel = stop
        qemu = self.connect(self.path)
        await self.until(lambda: bool(stopped))
        await stopped[0]
        self.assertFalse(is_open(qemu))

    async def test_long_run_dir(self) -> None:
        """A run directory in which no socket can be made is said so, and nothing is left."""
        deep = self.run_dir / ("x" * 100)
        deep.mkdir()
        self.addCleanup(deep.rmdir)
        error = self.assertRaises(LocalError, SourceRelay, reactor, deep, PLAN, None, None)
        self.assertIn("too long a path", error.text)
        self.assertEqual(list(deep.iterdir()), [])

    async def test_no_run_dir(self) -> None:
        """A run directory that is not there is said so."""
        relay = SourceRelay(reactor, self.run_dir / "gone", PLAN, self.open, self.heard)
        error = self.assertRaises(LocalError, relay.listen)
        self.assertIn("No such file or directory", error.text)

    async def test_codec_cannot_be_made(self) -> None:
        """A codec that cannot even be made loses its channel, and nothing besides."""

        def broken() -> ICodec:
            raise ZeroDivisionError

        self.relay._codec = broken
        qemu = self.connect(self.path)
        _, opened = await self.asked(1)
        self.give(opened)
        self.assertEqual(await deferToThread(qemu.recv, 1), b"")
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual([type(event) for event in self.events], [ChannelLost, ChannelEnded])


class DestinationTests(RelayCase):
    """:class:`DestinationRelay`, with a listening socket for QEMU."""

    def setUp(self) -> None:
        """A relay, and a QEMU that listens where it was told to."""
        super().setUp()
        self.relay = DestinationRelay(reactor, self.run_dir, self.heard)
        self.addCleanup(self.relay.stop)
        self.qemu = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.qemu.close)
        self.qemu.bind(self.relay.address.path)

    async def test_order(self) -> None:
        """QEMU gets the channels in the order in which they came, whatever their names."""
        self.qemu.listen(3)
        order = [("multifd", 1), MAIN, ("multifd", 0)]
        for name, index in order:
            near, far = tcp_pair()
            self.addCleanup(far.close)
            far.sendall(b"%s %d" % (name.encode(), index))
            self.relay.take(name, index, near)
        for name, index in order:
            sock, _ = await deferToThread(self.qemu.accept)
            self.addCleanup(sock.close)
            self.assertEqual(await deferToThread(sock.recv, 100), b"%s %d" % (name.encode(), index))
        self.assertEqual([(each.name, each.index) for each in self.relay.channels()], order)

    async def test_qemu_gone(self) -> None:
        """Where QEMU does not listen the peer's end is closed, with the reason."""
        near, far = tcp_pair()
        self.addCleanup(far.close)
        self.relay.take("main", 0, near)
        self.assertEqual(await deferToThread(far.recv, 1), b"")
        [event] = self.events
        self.assertIsInstance(event, ChannelEnded)
        self.assertIn("guest's process does not take channel main 0", event.reason)

    async def test_after_the_end(self) -> None:
        """A channel that comes after the end is closed."""
        await self.relay.stop()
        near, far = tcp_pair()
        self.addCleanup(far.close)
        self.relay.take("main", 0, near)
        self.assertEqual(far.recv(1), b"")


class BothTests(RelayCase):
    """From QEMU to QEMU, through both relays and the handshake of each channel."""

    async def run_channels(self, plan: list[tuple[str, int]], codec: Any = None) -> None:
        """Move data both ways on every channel at once; end one way, then the other."""
        attachments = Attachments()
        destination = DestinationRelay(reactor, self.run_dir, self.heard, codec)
        self.addCleanup(destination.stop)
        attachments.expect(
            ID, SECRET, plan, lambda name, index, line: destination.take(name, index, line.sock)
        )
        tcp: Any = reactor
        port = tcp.listenTCP(0, DestinationFactory(attachments), interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        endpoint = TCP4ClientEndpoint(reactor, "127.0.0.1", port.getHost().port)

        async def open_it(name: str, index: int) -> socket.socket:
            handshake = Secured(ChannelHandshake(RoleHeader(ID, name, index), SECRET), None)
            return (await open_channel(Clock(), endpoint, handshake, 10)).sock

        source = SourceRelay(reactor, self.run_dir, plan, open_it, self.heard, codec)
        self.addCleanup(source.stop)

        with socket.socket(socket.AF_UNIX) as qemu:
            qemu.bind(destination.address.path)
            qemu.listen(len(plan))
            path = source.listen().path
            near = [self.connect(path) for _ in plan]
            far = [(await deferToThread(qemu.accept))[0] for _ in plan]
        for sock in far:
            self.addCleanup(sock.close)
        data = [bytes([number]) + pattern(1 << 20) for number in range(len(plan))]
        for writers, readers in ((near, far), (far, near)):
            written = [deferToThread(write_all, *each) for each in zip(writers, data, strict=True)]
            read = [deferToThread(read_all, each) for each in readers]
            self.assertEqual(await gatherResults(written), await gatherResults(read))
        await self.until(lambda: len(self.events) == 2 * len(plan))
        self.assertEqual({type(event) for event in self.events}, {ChannelEnded})
        for relay in (source, destination):
            self.assertEqual([(each.name, each.index) for each in relay.channels()], plan)
            self.assertEqual({each.sent for each in relay.channels()}, {len(data[0])})
            self.assertEqual({each.received for each in relay.channels()}, {len(data[0])})
        self.assertEqual(pump_threads(), self.before)

    async def test_ten_channels(self) -> None:
        """Ten channels at once: forty threads, and none left."""
        await self.run_channels([MAIN, *(("multifd", index) for index in range(8)), ("preempt", 0)])

    async def test_codec(self) -> None:
        """The same through a codec, two channels."""
        await self.run_channels([MAIN, ("preempt", 0)], Framed)
