"""The movers: whatever holds for a pump holds with each of them, and bytes come whole.

The kernel that the tests run on may lack one; ``tests/kernel`` runs the same where it may not.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import random
import resource
import socket
import threading
from collections.abc import Callable
from typing import ClassVar
from unittest import SkipTest

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase

from qmigd.channels.movers import copy, mover_for, sending
from qmigd.channels.movers.common import BUFFER_SIZE, End
from qmigd.channels.movers.probing import obstacle
from qmigd.channels.movers.receiving import Receiving
from qmigd.channels.movers.ring import Ring
from qmigd.channels.movers.sending import COPIED_ENOUGH
from qmigd.channels.pump import SEND_BUFFER
from qmigd.interfaces import MOVERS
from qmigd.transports.sockets import tcp_pair
from qmigd.transports.zero_copy import enable
from tests import test_channels_pump as pumps
from tests.test_channels_pump import MIB, pattern, read_all, reset, write_all

#: MSG_ZEROCOPY and SO_ZEROCOPY of Linux.
MSG_ZEROCOPY = 0x4000000
SO_ZEROCOPY = 60

#: CAP_IPC_LOCK of linux/capability.h, and the version of the structures around it.
CAP_IPC_LOCK = 14
CAPABILITY_VERSION = 0x20080522


def write_in_pieces(sock: socket.socket, data: bytes, seed: int) -> str:
    """Write in pieces of odd sizes, small and large ones, and end the stream."""
    sizes = random.Random(seed)
    view = memoryview(data)
    while view:
        size = sizes.choice((1, sizes.randrange(1, 5000), sizes.randrange(1, 900_000)))
        sock.sendall(view[:size])
        view = view[size:]
    sock.shutdown(socket.SHUT_WR)
    return hashlib.sha256(data).hexdigest()


def write_without_copying(sock: socket.socket, data: bytes) -> str:
    """Write with MSG_ZEROCOPY, whole pages of them, and end the stream."""
    sock.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    area = mmap.mmap(-1, len(data))
    area[:] = data
    view = memoryview(area)
    while view:
        view = view[sock.send(view[: 256 << 10], MSG_ZEROCOPY) :]
    sock.shutdown(socket.SHUT_WR)
    return hashlib.sha256(data).hexdigest()


def read_in_pieces(sock: socket.socket, seed: int) -> str:
    """Read in pieces of odd sizes to the end; return the digest of what came."""
    sizes = random.Random(seed)
    digest = hashlib.sha256()
    while data := sock.recv(sizes.choice((1, sizes.randrange(1, 5000), MIB))):
        digest.update(data)
    return digest.hexdigest()


class MoverTests(pumps.PumpTests):
    """A pump that copies; those below do everything with another mover."""

    #: Whether a kernel without it is a reason to skip.
    may_lack: ClassVar[bool] = True

    def setUp(self) -> None:
        """Where the kernel cannot do it, it says why."""
        reason = obstacle(self.mover, "send") or obstacle(self.mover, "receive")
        if reason is not None:
            if self.may_lack:
                raise SkipTest(f"{self.mover}: {reason}")
            self.fail(reason)
        super().setUp()

    async def test_odd_pieces_both_ways(self) -> None:
        """Whatever the pieces that are written and read, both streams come whole."""
        pump, qemu, peer = self.make()
        there, back = random.Random(1).randbytes(12 * MIB), random.Random(2).randbytes(11 * MIB)
        digests = await gatherResults(
            [
                deferToThread(write_in_pieces, qemu, there, 3),
                deferToThread(read_in_pieces, peer, 4),
                deferToThread(write_in_pieces, peer, back, 5),
                deferToThread(read_in_pieces, qemu, 6),
            ]
        )
        self.assertEqual(digests[0], digests[1])
        self.assertEqual(digests[2], digests[3])
        self.assertEqual(await self.ended, "both ends have said all")
        self.assertEqual((pump.sent, pump.received), (len(there), len(back)))

    async def test_pages_from_the_peer(self) -> None:
        """What comes in whole pages, as from a card with header split, comes whole."""
        _, qemu, peer = self.make()
        data = random.Random(1).randbytes(9 * MIB + 77)
        writing = deferToThread(write_without_copying, peer, data)
        there, back = await gatherResults([writing, deferToThread(read_all, qemu)])
        self.assertEqual(there, back)

    async def test_through_two(self) -> None:
        """Two pumps after each other, as on two hosts."""
        near, far = tcp_pair()
        one, source, _ = self.make(near)
        one_ended = self.ended
        two, destination, _ = self.make(far)
        data = random.Random(1).randbytes(28 * MIB + 4097)
        written, read = await gatherResults(
            [deferToThread(write_all, source, data), deferToThread(read_all, destination)]
        )
        self.assertEqual(written, read)
        destination.close()
        await gatherResults([one_ended, self.ended])
        self.assertEqual((one.sent, two.received), (len(data), len(data)))

    async def test_to_and_fro(self) -> None:
        """Questions and answers pass at once, in bulk's wake too: nothing is waited for."""
        _, qemu, peer = self.make()

        def answer() -> None:
            for size in (1, 3 * MIB, 200):
                for _ in range(100 if size < MIB else 1):
                    peer.sendall(peer.recv(size, socket.MSG_WAITALL))

        def ask() -> bool:
            right = True
            for size in (1, 3 * MIB, 200):
                for number in range(100 if size < MIB else 1):
                    question = pattern(size + number)[number:]
                    writing = threading.Thread(target=qemu.sendall, args=(question,))
                    writing.start()
                    right &= qemu.recv(size, socket.MSG_WAITALL) == question
                    writing.join()
            return right

        answering = deferToThread(answer)
        self.assertTrue(await deferToThread(ask))
        await answering

    async def test_backpressure_of_the_guest(self) -> None:
        """Where QEMU does not read, no more is taken from the peer than the buffers hold."""
        wire, peer = tcp_pair()
        self.addCleanup(peer.close)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        pump, qemu, _ = self.make(wire)
        taken = await deferToThread(self.fill, peer, 64 * MIB)
        # The kernel doubles what it is asked for, for its own part of it.
        room = BUFFER_SIZE + 2 * SEND_BUFFER
        room += peer.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        room += wire.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        self.assertLessEqual(taken, room)
        self.assertLess(room, 6 * MIB)
        peer.setblocking(True)
        peer.shutdown(socket.SHUT_WR)
        digest = await deferToThread(read_all, qemu)
        self.assertEqual(digest, hashlib.sha256(bytes(taken)).hexdigest())
        self.assertEqual(pump.received, taken)

    async def test_ends_in_the_middle(self) -> None:
        """With both ways full in the middle, a reset, a death and an abort end it."""
        ends: tuple[Callable[[socket.socket, socket.socket], None], ...] = (
            lambda qemu, peer: reset(peer),
            lambda qemu, peer: qemu.close(),
            lambda qemu, peer: self.pump.abort("enough"),
        )
        for end in ends:
            _, qemu, peer = self.make()
            for sock in (qemu, peer):
                await deferToThread(self.fill, sock, 64 * MIB)
            end(qemu, peer)
            await self.ended
            qemu.close()
            peer.close()

    async def test_nothing_is_left(self) -> None:
        """However it ends, no descriptor and no mapping of a socket is left."""
        # The reactor has pipes of its own, once it runs.
        await deferToThread(lambda: None)
        before = self.left()
        for data in (b"", pattern(3 * MIB)):
            _, qemu, peer = self.make()
            await gatherResults(
                [
                    deferToThread(write_all, qemu, data),
                    deferToThread(read_all, peer),
                    deferToThread(write_all, peer, data),
                    deferToThread(read_all, qemu),
                ]
            )
            await self.ended
            qemu.close()
            peer.close()
        self.assertEqual(self.left(), before)

    def left(self) -> tuple[list[str], int]:
        """The sockets and pipes of this process, and how many are mapped."""
        found = []
        for descriptor in os.listdir("/proc/self/fd"):
            try:
                found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            except FileNotFoundError:
                # That of the directory itself.
                continue
        with open("/proc/self/maps") as maps:
            return sorted(f for f in found if ":[" in f), maps.read().count("socket:[")


class SpliceTests(MoverTests):
    """A pump that splices."""

    mover = "splice"

    async def test_no_descriptor_for_a_pipe(self) -> None:
        """Where no descriptor is left for a pipe, bytes are copied."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        source, qemu = socket.socketpair()
        sink, peer = tcp_pair()
        for sock in (source, qemu, sink, peer):
            self.addCleanup(sock.close)
        highest = os.dup(0)
        os.close(highest)
        ends: list[End] = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
        try:
            qemu.sendall(b"all the same")
            qemu.shutdown(socket.SHUT_WR)
            ends.append(mover_for("splice", source, sink)(source, sink, lambda size: None))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self.assertEqual(ends, [End("eof")])
        self.assertEqual(peer.recv(100), b"all the same")


class ZeroCopyTests(MoverTests):
    """A pump that sends with MSG_ZEROCOPY and receives with TCP_ZEROCOPY_RECEIVE."""

    mover = "zerocopy"

    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """A TCP connection that ends with the test."""
        ends = tcp_pair()
        for end in ends:
            self.addCleanup(end.close)
        return ends

    async def test_completions(self) -> None:
        """Each buffer is free again once the kernel says so, which also says that it copied."""
        wire, peer = self.sockets()
        enable(wire)
        sender = sending.Sending(wire)
        data = pattern(64 << 10)

        def send() -> str:
            digest = hashlib.sha256()
            for _ in range(COPIED_ENOUGH):
                sender.wait_for_buffer()
                sender.send(memoryview(data))
                digest.update(data)
            while sender.ring.outstanding:
                sender.wait()
            wire.shutdown(socket.SHUT_WR)
            return digest.hexdigest()

        written, read = await gatherResults([deferToThread(send), deferToThread(read_all, peer)])
        self.assertEqual(written, read)
        self.assertEqual(sender.ring.copied, COPIED_ENOUGH)

    async def test_lost_while_waiting(self) -> None:
        """Whoever waits for a buffer is woken when the connection is lost or shut."""
        for end in (lambda wire, peer: reset(peer), lambda wire, peer: wire.shutdown(2)):
            wire, peer = self.sockets()
            enable(wire)
            sender = sending.Sending(wire)
            # One more is waited for than there are.
            sender.ring = Ring(1, 1000)
            sender.ring.sent()
            waiting: Deferred[None] = deferToThread(sender.wait_for_buffer)
            end(wire, peer)
            await self.assertFailure(waiting, ConnectionResetError, BrokenPipeError)

    async def test_locked_memory(self) -> None:
        """Where no memory may be locked, bytes are copied."""
        source, qemu = socket.socketpair()
        wire, peer = self.sockets()
        self.addCleanup(source.close)
        self.addCleanup(qemu.close)
        refused: list[int] = []

        def move() -> End:
            # A thread's own capability, and the process's limit.
            header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
            sets = (ctypes.c_uint32 * 6)()
            libc = ctypes.CDLL(None, use_errno=True)
            self.assertEqual(libc.capget(header, sets), 0)
            sets[0] &= ~(1 << CAP_IPC_LOCK)
            self.assertEqual(libc.capset(header, sets), 0)
            refused.append(self.refused(wire))
            return sending.send(source, wire, lambda size: None)

        soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_MEMLOCK, (soft, hard))
        ends: list[End] = []
        mover = threading.Thread(target=lambda: ends.append(move()))
        mover.start()
        data = pattern(9 * MIB)
        writing = deferToThread(write_all, qemu, data)
        read = deferToThread(peer.recv, len(data), socket.MSG_WAITALL)
        written = await writing
        self.assertEqual(hashlib.sha256(await read).hexdigest(), written)
        await deferToThread(mover.join)
        self.assertEqual(ends, [End("eof")])
        self.assertEqual(len(refused), 1)

    def refused(self, sock: socket.socket) -> int:
        """See that the kernel does refuse it; return the error's number."""
        enable(sock)
        with self.assertRaises(OSError) as raised:
            sock.send(bytes(64 << 10), MSG_ZEROCOPY)
        return raised.exception.errno or 0

    async def test_pages_are_mapped(self) -> None:
        """Whole pages are mapped and not copied, and come in the stream's order."""
        peer, wire = self.sockets()
        receiving = Receiving(wire)
        self.addCleanup(receiving.close)
        data = random.Random(1).randbytes(4 * MIB)
        writing = deferToThread(write_without_copying, peer, data)
        digest = hashlib.sha256()
        sizes = {"mapped": 0, "copied": 0}

        def read() -> None:
            while pieces := receiving.next():
                for piece in pieces:
                    sizes["copied" if isinstance(piece.obj, mmap.mmap) else "mapped"] += len(piece)
                    digest.update(piece)
                receiving.give_back()

        await deferToThread(read)
        self.assertEqual(await writing, digest.hexdigest())
        self.assertEqual(sum(sizes.values()), len(data))
        self.assertGreater(sizes["mapped"], sizes["copied"])


class ChoiceTests(SynchronousTestCase):
    """Which mover serves which sockets."""

    def test_unix_sockets(self) -> None:
        """Where neither end is TCP, nothing is to be had without copying."""
        one, other = socket.socketpair()
        self.addCleanup(one.close)
        self.addCleanup(other.close)
        self.assertIs(mover_for("zerocopy", one, other), copy)

    def test_unknown(self) -> None:
        """A mover that there is not is an error, and the others are named."""
        one, other = socket.socketpair()
        self.addCleanup(one.close)
        self.addCleanup(other.close)
        with self.assertRaisesRegex(ValueError, "there are copy, splice, zerocopy"):
            mover_for("pigeon", one, other)
        for name in MOVERS:
            mover_for(name, one, other)


class RingTests(SynchronousTestCase):
    """:class:`Ring`, against a list of all calls."""

    @given(st.data(), st.integers(1, 4), st.sampled_from([0, 7, (1 << 32) - 3]))
    def test_any_completions(self, data: st.DataObject, buffers: int, first: int) -> None:
        """A buffer is free exactly when all calls out of it are complete, in whatever order."""
        ring = Ring(buffers, first)
        calls: list[tuple[int, int]] = []
        number = first
        for _ in range(data.draw(st.integers(0, 40))):
            act = data.draw(st.sampled_from(["send", "turn", "complete"]))
            if act == "send":
                calls.append((number, ring.current))
                ring.sent()
                number = (number + 1) % (1 << 32)
            elif act == "turn":
                ring.turn()
            elif calls:
                low = data.draw(st.integers(0, len(calls) - 1))
                high = data.draw(st.integers(low, len(calls) - 1))
                # The kernel names a range of calls that follow each other.
                high = next(
                    (at - 1 for at in range(low + 1, high + 1)
                     if (calls[at][0] - calls[at - 1][0]) % (1 << 32) != 1),
                    high,
                )  # fmt: skip
                ring.completed(calls[low][0], calls[high][0], False)
                del calls[low : high + 1]
            self.assertEqual(ring.outstanding, len(calls))
            self.assertEqual(ring.free, ring.current not in [buffer for _, buffer in calls])
        self.assertEqual(ring.copied, 0)

    def test_out_of_order(self) -> None:
        """Later calls may complete before earlier ones, and a range may span complete ones."""
        for first in (0, (1 << 32) - 3):
            ring = Ring(4, first)
            for _ in range(4):
                ring.sent()
                ring.sent()
                ring.turn()
            # Call n goes out of buffer n // 2; of 8 and 9 the ring does not know.
            for low, high, outstanding, busy in (
                (2, 3, 6, [0, 2, 3]),
                (4, 5, 4, [0, 3]),
                (7, 7, 3, [0, 3]),
                (1, 6, 1, [0]),
                (2, 3, 1, [0]),
                (0, 9, 0, []),
            ):
                ring.completed((first + low) % (1 << 32), (first + high) % (1 << 32), False)
                self.assertEqual(ring.outstanding, outstanding)
                self.assertEqual(_busy(ring, 4), busy)

    def test_copied(self) -> None:
        """Completions of copied bytes count each call, until one was not copied."""
        ring = Ring(2)
        for _ in range(6):
            ring.sent()
        ring.completed(0, 2, True)
        self.assertEqual(ring.copied, 3)
        ring.completed(0, 2, True)
        self.assertEqual(ring.copied, 3)
        ring.completed(3, 3, False)
        self.assertEqual(ring.copied, 0)
        ring.completed(4, 9, True)
        self.assertEqual((ring.copied, ring.outstanding), (2, 0))


def _busy(ring: Ring, buffers: int) -> list[int]:
    """Return the buffers that are not free, having taken each its turn."""
    found = []
    for _ in range(buffers):
        if not ring.free:
            found.append(ring.current)
        ring.turn()
    return found
