"""The pump, between real sockets."""

from __future__ import annotations

import contextlib
import hashlib
import select
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import TestCase
from zope.interface import implementer

from qmigd.channels.codecs import chain
from qmigd.channels.pump import BUFFER_SIZE, SEND_BUFFER, Flow, Pump
from qmigd.interfaces import ICodec
from qmigd.transports.sockets import tcp_pair

MIB = 1 << 20


def read_all(sock: socket.socket) -> str:
    """Read to the end; return the digest of what came."""
    digest = hashlib.sha256()
    while data := sock.recv(MIB):
        digest.update(data)
    return digest.hexdigest()


def write_all(sock: socket.socket, data: bytes) -> str:
    """Write, and end the stream; return the digest of what was written."""
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    return hashlib.sha256(data).hexdigest()


def reset(sock: socket.socket) -> None:
    """Close a TCP connection the hard way."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def pattern(size: int) -> bytes:
    """Bytes in which nothing repeats at the size of a buffer."""
    return hashlib.shake_128(b"pattern").digest(size)


def is_open(sock: socket.socket) -> bool:
    """Whether the other end has neither sent anything nor closed."""
    try:
        sock.recv(1, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    return False


def pump_threads() -> set[threading.Thread]:
    """The threads of pumps."""
    return {thread for thread in threading.enumerate() if thread.name.endswith((" in", " out"))}


@implementer(ICodec)
class Framed:
    """A codec with frames, which holds back the beginning of an unfinished one."""

    def __init__(self) -> None:
        self.left = b""
        self.over = False

    def encode(self, data: memoryview) -> bytes:
        return struct.pack(">I", len(data)) + bytes(data).swapcase()

    def finish(self) -> bytes:
        return struct.pack(">I", 0)

    def decode(self, data: memoryview) -> bytes:
        self.left += data
        out = bytearray()
        while len(self.left) >= 4:
            (size,) = struct.unpack(">I", self.left[:4])
            if size > 2 * BUFFER_SIZE or self.over:
                raise ValueError("no frame begins like this")
            if len(self.left) < 4 + size:
                break
            self.over = not size
            out += self.left[4 : 4 + size].swapcase()
            self.left = self.left[4 + size :]
        return bytes(out)


class PumpCase(TestCase):
    """Has pumps made, and sees that nothing is left of them."""

    #: What moves their bytes, both ways.
    mover = "copy"

    def setUp(self) -> None:
        """Every test leaves no thread behind."""
        self.before = pump_threads()
        self.addCleanup(lambda: self.assertEqual(pump_threads(), self.before))

    def make(
        self,
        wire: socket.socket | None = None,
        codec: Callable[[], ICodec] | None = None,
        on_lost: Callable[[str], None] | None = None,
    ) -> tuple[Pump, socket.socket, socket.socket]:
        """Start a pump; return it, QEMU's socket and the peer's."""
        qemu, guest = socket.socketpair(socket.AF_UNIX)
        peer, ours = tcp_pair()
        if wire is not None:
            peer.close()
            ours.close()
            ours = wire
        self.lost: list[str] = []
        self.lost_once: Deferred[str] = Deferred()
        self.held: list[None] = []
        self.ended: Deferred[str] = Deferred()

        def lost(reason: str) -> None:
            self.lost.append(reason)
            if on_lost is not None:
                on_lost(reason)
            self.lost_once.callback(reason)

        call: Any = reactor
        pump = Pump(
            "main 0",
            guest,
            ours,
            call=call.callFromThread,
            on_lost=lost,
            on_held=lambda: self.held.append(None),
            on_end=self.ended.callback,
            codec=codec,
            outward=self.mover,
            inward=self.mover,
        )
        self.pump = pump
        self.addCleanup(qemu.close)
        self.addCleanup(peer.close)
        self.addCleanup(self.end, pump, self.ended)
        pump.start()
        return pump, qemu, peer

    def end(self, pump: Pump, ended: Deferred[str]) -> Deferred[str] | None:
        """Leave nothing of a pump."""
        pump.abort("the test is over")
        return ended if not ended.called else None

    def fill(self, sock: socket.socket, limit: int) -> int:
        """Write until nothing more is taken; return how much was."""
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        sock.setblocking(False)
        taken = 0
        # A pump that is only slow makes this stop early, and the test weaker, not fail.
        while taken < limit and poll.poll(200):
            with contextlib.suppress(BlockingIOError):
                taken += sock.send(bytes(64 << 10))
        return taken

    async def threads_left(self, count: int) -> None:
        """Wait until the pump has so many threads, and knows it."""
        calls: Any = reactor
        while True:
            over = len(pump_threads() - self.before) == count
            turn: Deferred[None] = Deferred()
            calls.callFromThread(turn.callback, None)
            await turn
            if over:
                break


class PumpTests(PumpCase):
    """:class:`Pump`."""

    async def test_half_close(self) -> None:
        """The end of one stream is passed on and leaves the other one alone, both ways."""
        pump, qemu, peer = self.make()
        there, back = pattern(9 * MIB + 7), pattern(5 * MIB + 3)
        written, read = await gatherResults(
            [deferToThread(write_all, qemu, there), deferToThread(read_all, peer)]
        )
        self.assertEqual(written, read)
        self.assertIsNone(pump.ended)
        written, read = await gatherResults(
            [deferToThread(write_all, peer, back), deferToThread(read_all, qemu)]
        )
        self.assertEqual(written, read)
        self.assertEqual(await self.ended, "both ends have said all")
        self.assertEqual((pump.sent, pump.received), (len(there), len(back)))
        self.assertEqual(self.lost, [])

    async def test_half_close_of_the_peer(self) -> None:
        """The peer may be the first to end its stream, with everything still in flight."""
        _, qemu, peer = self.make()
        data = pattern(3 * MIB)
        writing = deferToThread(write_all, peer, data)
        there, back = await gatherResults([writing, deferToThread(read_all, qemu)])
        self.assertEqual(there, back)
        there, back = await gatherResults(
            [deferToThread(write_all, qemu, data), deferToThread(read_all, peer)]
        )
        self.assertEqual(there, back)
        await self.ended

    async def test_pieces_of_any_size(self) -> None:
        """Small and large alternate; each comes through while nothing follows it."""
        _, qemu, peer = self.make()
        for size in (1, 3 * MIB + 1, 7, 64 << 10, MIB, 5 * MIB, 1, 1):
            for writer, reader in ((peer, qemu), (qemu, peer)):
                writing = deferToThread(writer.sendall, pattern(size))
                data = await deferToThread(reader.recv, size, socket.MSG_WAITALL)
                await writing
                self.assertEqual(data, pattern(size))

    async def test_end_right_behind_bulk(self) -> None:
        """An end and a reset that come while reads are gathered are noticed like any other."""
        for close in (socket.socket.close, reset):
            _, qemu, peer = self.make()
            writing = deferToThread(peer.sendall, pattern(5 * MIB))
            await deferToThread(qemu.recv, 3 * MIB, socket.MSG_WAITALL)
            reading = deferToThread(qemu.recv, 3 * MIB, socket.MSG_WAITALL)
            await writing
            close(peer)
            await reading
            qemu.close()
            await self.ended

    async def test_both_full(self) -> None:
        """With both directions full and nobody reading, everything still comes through."""
        wire, peer = tcp_pair()
        self.addCleanup(peer.close)
        for sock in (wire, peer):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        _, qemu, _ = self.make(wire)
        # More than anything on the way can hold: both writers get stuck.
        data = pattern(2 * SEND_BUFFER + 8 * MIB)
        writing = [deferToThread(write_all, each, data) for each in (qemu, peer)]
        await gatherResults([deferToThread(self.wait_stuck, each) for each in (qemu, peer)])
        self.assertFalse(any(each.called for each in writing))
        reading = [deferToThread(read_all, each) for each in (qemu, peer)]
        digests = await gatherResults([*writing, *reading])
        self.assertEqual(len(set(digests)), 1)
        await self.ended

    def wait_stuck(self, sock: socket.socket) -> None:
        """Wait until nothing can be written for a while."""
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        while poll.poll(100):
            pass

    async def test_backpressure(self) -> None:
        """Where nobody reads, no more is taken from QEMU than the buffers on the way hold."""
        wire, peer = tcp_pair()
        self.addCleanup(peer.close)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        pump, qemu, _ = self.make(wire)
        taken = await deferToThread(self.fill, qemu, 64 * MIB)
        room = BUFFER_SIZE + sum(
            sock.getsockopt(socket.SOL_SOCKET, option)
            for sock, option in (
                (qemu, socket.SO_SNDBUF),
                (wire, socket.SO_SNDBUF),
                (peer, socket.SO_RCVBUF),
            )
        )
        self.assertLessEqual(taken, room)
        self.assertLess(room, 4 * MIB)
        # And all of it comes once somebody reads.
        qemu.setblocking(True)
        qemu.shutdown(socket.SHUT_WR)
        digest = await deferToThread(read_all, peer)
        self.assertEqual(digest, hashlib.sha256(bytes(taken)).hexdigest())
        self.assertEqual(pump.sent, taken)

    async def test_reset_by_the_peer(self) -> None:
        """A peer that is lost in the middle is told of once, and QEMU's socket is closed."""
        _, qemu, peer = self.make()
        qemu.sendall(b"x")
        self.assertEqual(await deferToThread(peer.recv, 1), b"x")
        reset(peer)
        self.assertIn("the peer closed its end", await self.lost_once)
        self.assertEqual(await deferToThread(qemu.recv, 1), b"")
        self.assertIn("the peer closed its end", await self.ended)
        self.assertEqual(len(self.lost), 1)

    async def test_reset_while_writing(self) -> None:
        """A peer that is lost with the pump in the middle of writing to it is lost as well."""
        _, qemu, peer = self.make()
        await deferToThread(self.fill, qemu, 64 * MIB)
        reset(peer)
        await self.ended
        self.assertEqual(len(self.lost), 1)
        with self.assertRaises(ConnectionError):
            qemu.setblocking(True)
            qemu.sendall(bytes(MIB))

    async def test_guest_gone(self) -> None:
        """A QEMU that died is no loss of the peer; the peer's socket is closed."""
        _, qemu, peer = self.make()
        peer.sendall(b"x")
        await deferToThread(select.select, [qemu], [], [])
        # With something unread: the pump reads a reset, and not an end.
        qemu.close()
        self.assertEqual(await deferToThread(peer.recv, 1), b"")
        self.assertIn("the guest's process closed its end", await self.ended)
        self.assertEqual(self.lost, [])

    async def test_guest_gone_while_written_to(self) -> None:
        """A QEMU that dies with the pump in the middle of writing to it ends the pump."""
        _, qemu, peer = self.make()
        await deferToThread(self.fill, peer, 64 * MIB)
        qemu.close()
        self.assertIn("the guest's process closed its end", await self.ended)
        self.assertEqual(self.lost, [])

    async def test_hold(self) -> None:
        """On hold the guest's socket outlives the peer, until the owner aborts."""
        pump, qemu, peer = self.make()
        pump.hold = True
        reset(peer)
        await self.lost_once
        qemu.sendall(b"into the void")
        await self.threads_left(0)
        self.assertTrue(is_open(qemu))
        self.assertIsNone(pump.ended)
        pump.abort("given up")
        self.assertEqual(await self.ended, "given up")
        self.assertEqual(qemu.recv(1), b"")

    async def test_hold_said_late(self) -> None:
        """The owner can say hold when it is told of the loss."""
        _, qemu, peer = self.make(on_lost=lambda _: setattr(self.pump, "hold", True))
        reset(peer)
        await self.lost_once
        self.assertTrue(is_open(qemu))

    async def test_hold_ends_with_the_guest(self) -> None:
        """On hold a QEMU that closes its socket by itself ends the pump."""
        pump, qemu, peer = self.make()
        pump.hold = True
        reset(peer)
        await self.lost_once
        qemu.close()
        await self.ended

    async def test_hold_of_an_end(self) -> None:
        """On hold the end of the peer's stream is not passed on: a dead peer looks like it."""
        pump, qemu, peer = self.make()
        pump.hold = True
        peer.shutdown(socket.SHUT_WR)
        await self.threads_left(1)
        self.assertTrue(is_open(qemu))
        self.assertEqual(len(self.held), 1)
        # The other direction goes on, and its end is the pump's.
        there, back = await gatherResults(
            [deferToThread(write_all, qemu, b"last words"), deferToThread(read_all, peer)]
        )
        self.assertEqual(there, back)
        self.assertEqual(await self.ended, "both ends have said all")
        self.assertEqual(self.lost, [])

    async def test_hold_is_over(self) -> None:
        """What QEMU was not told on hold, it is told when that is over."""
        pump, qemu, peer = self.make()
        pump.hold = True
        peer.shutdown(socket.SHUT_WR)
        await self.threads_left(1)
        pump.hold = False
        self.assertEqual(await deferToThread(qemu.recv, 1), b"")
        self.assertIsNone(pump.ended)

    async def test_hold_of_a_loss_is_over(self) -> None:
        """The same of a peer that was lost."""
        pump, qemu, peer = self.make()
        pump.hold = True
        reset(peer)
        await self.lost_once
        pump.hold = False
        self.assertIn("the peer closed its end", await self.ended)
        self.assertEqual(qemu.recv(1), b"")

    async def test_abort_idle(self) -> None:
        """Aborting wakes threads that wait for something to read."""
        pump, qemu, peer = self.make()
        self.assertEqual(len(pump_threads() - self.before), 2)
        pump.abort("enough")
        pump.abort("enough again")
        self.assertEqual(await self.ended, "enough")
        self.assertEqual(pump_threads(), self.before)
        self.assertEqual(qemu.recv(1), b"")
        self.assertEqual(peer.recv(1), b"")

    async def test_abort_full(self) -> None:
        """Aborting wakes threads that wait for somebody to read, in both directions."""
        pump, qemu, peer = self.make()
        await deferToThread(self.fill, qemu, 64 * MIB)
        await deferToThread(self.fill, peer, 64 * MIB)
        pump.abort("enough")
        self.assertEqual(await self.ended, "enough")
        self.assertEqual(pump_threads(), self.before)

    async def test_no_thread(self) -> None:
        """Where no thread can be started, both ends are closed and the reason is given."""
        started: list[Flow] = []
        start = Flow.start

        def one_only(flow: Flow) -> None:
            if started:
                raise RuntimeError("can't start new thread")
            started.append(flow)
            start(flow)

        self.patch(Flow, "start", one_only)
        _, qemu, peer = self.make()
        self.assertIn("no thread could be started", await self.ended)
        self.assertEqual((qemu.recv(1), peer.recv(1)), (b"", b""))


class CodecTests(PumpCase):
    """A pump with a codec."""

    async def test_round_trip(self) -> None:
        """What a codec encodes on one side, it decodes on the other, cut anywhere."""
        near, far = tcp_pair()
        one, source, _ = self.make(near, chain([Framed, Framed]))
        one_ended = self.ended
        two, destination, _ = self.make(far, chain([Framed, Framed]))
        data = pattern(5 * MIB + 1)
        for writer, reader in ((source, destination), (destination, source)):
            written, read = await gatherResults(
                [deferToThread(write_all, writer, data), deferToThread(read_all, reader)]
            )
            self.assertEqual(written, read)
        await gatherResults([one_ended, self.ended])
        self.assertEqual((one.sent, two.received), (len(data), len(data)))

    async def test_encoded_on_the_wire(self) -> None:
        """The wire carries what the codec made, and its last words at the end."""
        pump, qemu, peer = self.make(codec=Framed)
        write_all(qemu, b"Stream")
        chunks = bytearray()
        while data := await deferToThread(peer.recv, 100):
            chunks += data
        self.assertEqual(bytes(chunks), b"\0\0\0\x06sTREAM\0\0\0\0")
        self.assertEqual(pump.sent, 6)

    async def test_not_decodable(self) -> None:
        """Bytes that are not the codec's end the channel, with the codec's reason."""
        _, qemu, peer = self.make(codec=Framed)
        peer.sendall(b"\xff\xff\xff\xff")
        reason = await self.ended
        self.assertIn("could not be decoded: no frame begins like this", reason)
        self.assertEqual(self.lost, [reason])
        self.assertEqual(qemu.recv(1), b"")

    async def test_codec_breaks(self) -> None:
        """A codec that raises anything else ends its channel, and nothing besides."""

        class Broken(Framed):
            def encode(self, data: memoryview) -> bytes:
                raise KeyError("oops")

        _, qemu, _peer = self.make(codec=Broken)
        qemu.sendall(b"x")
        reason = await self.ended
        self.assertIn("could not be encoded: the codec failed: KeyError('oops')", reason)
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)
