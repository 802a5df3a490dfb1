"""Kernel TLS on a kernel that has it."""

from __future__ import annotations

import errno
import hashlib
import random
import select
import socket
import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread

from qmigd.channels.kernel_tls import CIPHERS, TrafficKeys, install, lost, probe
from qmigd.channels.pump import Pump
from qmigd.errors import LocalError, PeerGone
from qmigd.transports.sockets import tcp_pair
from tests.rig.lane import KernelCase
from tests.rig.tls_records import read_exactly, sessions
from tests.rig.wire import Wire

T = TypeVar("T")

_CIPHER = CIPHERS[0]

#: linux/tls.h: the level, the option that names a record's type, and two types.
_SOL_TLS, _RECORD_TYPE, _ALERT, _HANDSHAKE = 282, 1, 21, 22

#: Bytes of data in a full record.
_RECORD = 1 << 14

#: Bytes of a "big" transfer: many records, and more than the buffers of a connection hold
#: while nobody reads.
_BIG = 8 << 20


def _noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _counters() -> dict[str, int]:
    """Return the kernel's own count of what its TLS has done."""
    lines = Path("/proc/net/tls_stat").read_text().splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


class KernelTlsCase(KernelCase):
    """A test with a session, one or both ends of which go on in the kernel."""

    def connected(self) -> tuple[socket.socket, socket.socket]:
        pair = tcp_pair()
        for sock in pair:
            self.addCleanup(sock.close)
        return pair

    def wire(self) -> Wire:
        wire = Wire()
        self.addCleanup(wire.close)
        return wire

    def both(
        self,
        cipher: str = _CIPHER,
        pair: tuple[socket.socket, socket.socket] | None = None,
    ) -> tuple[socket.socket, socket.socket]:
        """Return the sockets of a client and a server, both in the kernel's hands."""
        ends = sessions(cipher, *(pair or self.connected()))
        for end in ends:
            install(end.sock, end.keys())
        return ends[0].sock, ends[1].sock

    def fill(self, sock: socket.socket, data: bytes, size: int) -> int:
        """Write without waiting, ``size`` bytes at a time; returns how many were taken."""
        sock.setblocking(False)
        sent = 0
        while True:
            try:
                sent += sock.send(data[sent : sent + size])
            except BlockingIOError:
                return sent

    def send_all(self, sock: socket.socket, data: bytes) -> None:
        """Write, and end the stream."""
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    def rest(self, sock: socket.socket) -> bytes:
        """Return what comes until the end of the stream."""
        received = bytearray()
        while more := sock.recv(1 << 20):
            received += more
        return bytes(received)

    def later(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Call something in another thread."""
        pool = ThreadPoolExecutor(1)
        self.addCleanup(pool.shutdown)
        return pool.submit(function, *arguments)


class TransferTests(KernelTlsCase):
    def test_probe(self) -> None:
        """The kernel is found to have all three ciphers."""
        self.assertEqual(probe().ciphers, CIPHERS)

    def check(self, cipher: str) -> None:
        """Check that either end sends small and big things to the other."""
        before = _counters()
        pair = self.both(cipher)
        for one, other in (pair, pair[::-1]):
            one.sendall(b"small")
            self.assertEqual(read_exactly(other, 5), b"small")
            data = _noise(_BIG)
            sent = self.later(one.sendall, data)
            self.assertEqual(_digest(read_exactly(other, _BIG)), _digest(data))
            sent.result()
        after = _counters()
        for name in ("TlsTxSw", "TlsRxSw"):
            self.assertEqual(after[name], before[name] + 2, name)
        self.assertEqual(after["TlsDecryptError"], before["TlsDecryptError"])

    def test_aes_128_gcm(self) -> None:
        """Both ways with AES-128-GCM."""
        self.check("TLS_AES_128_GCM_SHA256")

    def test_aes_256_gcm(self) -> None:
        """Both ways with AES-256-GCM."""
        self.check("TLS_AES_256_GCM_SHA384")

    def test_chacha20_poly1305(self) -> None:
        """Both ways with ChaCha20-Poly1305."""
        self.check("TLS_CHACHA20_POLY1305_SHA256")

    def test_one_side(self) -> None:
        """An end in the kernel and one in user space understand each other, whichever is which."""
        data = _noise(300_000)
        for cipher in CIPHERS:
            for number in (0, 1):
                ends = sessions(cipher, *self.connected())
                kernel, user = ends[number], ends[1 - number]
                install(kernel.sock, kernel.keys())
                user.send(data)
                self.assertEqual(read_exactly(kernel.sock, len(data)), data)
                sent = self.later(kernel.sock.sendall, data)
                received = b""
                while len(received) < len(data):
                    received += user.receive()
                sent.result()
                self.assertEqual(received, data)

    def test_one_side_first(self) -> None:
        """What has arrived before the kernel takes over is decrypted as well."""
        for number in (0, 1):
            ends = sessions(_CIPHER, *self.connected())
            early, late = ends[number], ends[1 - number]
            keys = late.keys()
            for word in (b"one ", b"two ", b"three "):
                early.send(word)
            install(early.sock, early.keys())
            early.sock.sendall(b"four")
            self.assertEqual(late.sock.recv(1, socket.MSG_PEEK), b"\x17")
            install(late.sock, keys)
            self.assertEqual(read_exactly(late.sock, 18), b"one two three four")

    def test_nothing_said(self) -> None:
        """A server may go on in the kernel with nothing said, and a client once it has heard."""
        client, server = sessions(_CIPHER, *self.connected(), greet=False)
        install(server.sock, server.keys())
        server.sock.sendall(b"hello")
        self.assertEqual(client.receive(), b"hello")
        install(client.sock, client.keys())
        client.sock.sendall(b"answer")
        self.assertEqual(server.sock.recv(100), b"answer")

    def test_backpressure(self) -> None:
        """A writer is held up by a reader that does not read, and nothing is lost."""
        one, other = self.both()
        data = _noise(4 * _BIG)
        sent = self.fill(one, data, 100_000)
        self.assertLess(sent, len(data))
        self.assertFalse(select.select([], [one], [], 0)[1])
        got = self.later(read_exactly, other, sent + 5)
        self.assertEqual(select.select([], [one], [], 60)[1], [one])
        one.setblocking(True)
        one.sendall(b"after")
        self.assertEqual(got.result(), data[:sent] + b"after")


class WireTests(KernelTlsCase):
    def test_nothing_is_readable(self) -> None:
        """Between the two, everything is records of data, and none of it is what was written."""
        wire = self.wire()
        ends = self.both(pair=wire.ends)
        starts = [len(seen) for seen in wire.seen]
        words = b"guest RAM, page by page. " * 4000
        for one, other in (ends, ends[::-1]):
            one.sendall(words)
            self.assertEqual(read_exactly(other, len(words)), words)
        for seen, start in zip(wire.seen, starts, strict=True):
            tail = bytes(seen[start:])
            self.assertNotIn(b"guest", tail)
            self.assertNotIn(b"page", tail)
            self.assertGreater(len(tail), len(words))
            while tail:
                self.assertEqual(tail[:3], b"\x17\x03\x03")
                tail = tail[5 + int.from_bytes(tail[3:5], "big") :]

    def test_tampered(self) -> None:
        """A record of which a bit was changed on the way fails at the reader, for good."""
        wire = self.wire()
        one, other = self.both(pair=wire.ends)
        one.sendall(b"right")
        self.assertEqual(read_exactly(other, 5), b"right")
        before = _counters()["TlsDecryptError"]
        wire.flip(0, 5 + 3)
        one.sendall(b"wrong")
        self.fails(other, errno.EBADMSG)
        self.assertEqual(_counters()["TlsDecryptError"], before + 1)
        one.sendall(b"right again")
        self.fails(other, errno.EBADMSG)

    def fails(self, sock: socket.socket, number: int) -> None:
        """Check that nothing can be read, and why."""
        error = self.assertRaises(OSError, sock.recv, 100)
        self.assertEqual(error.errno, number, error)

    def test_wrong_key(self) -> None:
        """What was sent under another key fails at the reader."""
        one, other = sessions(_CIPHER, *self.connected())
        keys = one.keys()
        install(other.sock, other.keys())
        wrong = TrafficKeys(_CIPHER, keys.sending[::-1], keys.receiving, b"", keys.last_received)
        install(one.sock, wrong)
        one.sock.sendall(b"not for you")
        self.fails(other.sock, errno.EBADMSG)

    def test_wrong_number(self) -> None:
        """A record that is missing is noticed."""
        one, other = sessions(_CIPHER, *self.connected())
        keys = one.keys()
        install(one.sock, TrafficKeys(_CIPHER, keys.sending, keys.receiving, b"", b""))
        install(other.sock, other.keys())
        one.sock.sendall(b"out of order")
        self.fails(other.sock, errno.EBADMSG)

    def test_peer_has_hung_up(self) -> None:
        """A connection that the peer has closed is no failure of TLS."""
        one, other = sessions(_CIPHER, *self.connected())
        other.sock.shutdown(socket.SHUT_WR)
        self.assertEqual(one.sock.recv(1), b"")
        error = self.assertRaises(PeerGone, install, one.sock, one.keys())
        self.assertIn("The connection was closed", error.text)

    def test_key_of_another_session(self) -> None:
        """A session whose last records are not its own is refused before the kernel sees it."""
        one, _ = sessions(_CIPHER, *self.connected())
        other, _ = sessions(_CIPHER, *self.connected())
        keys, others = one.keys(), other.keys()
        mixed = TrafficKeys(
            _CIPHER, keys.sending, keys.receiving, keys.last_sent, others.last_received
        )
        error = self.assertRaises(LocalError, install, one.sock, mixed)
        self.assertIn("received", error.text)

    def test_not_connected(self) -> None:
        """A socket that is no TCP connection any more is refused like one that the peer closed."""
        one, other = sessions(_CIPHER, *self.connected())
        keys = one.keys()
        one.sock.shutdown(socket.SHUT_RDWR)
        other.sock.close()
        error = self.assertRaises(PeerGone, install, one.sock, keys)
        self.assertIn("The connection was closed", error.text)


class EndTests(KernelTlsCase):
    def test_half_close(self) -> None:
        """Who shuts its side for writing is read to the end, and can still read."""
        for number in (0, 1):
            pair = self.both()
            one, other = pair[number], pair[1 - number]
            data = _noise(_BIG)
            sent = self.later(self.send_all, one, data)
            self.assertEqual(read_exactly(other, _BIG), data)
            self.assertEqual(other.recv(1), b"")
            sent.result()
            other.sendall(b"answer")
            self.assertEqual(read_exactly(one, 6), b"answer")
            other.close()
            self.assertEqual(one.recv(1), b"")

    def test_no_close_notify(self) -> None:
        """The end of a stream is TCP's alone: not a record is sent for it."""
        wire = self.wire()
        one, other = self.both(pair=wire.ends)
        one.sendall(b"all")
        self.assertEqual(read_exactly(other, 3), b"all")
        before = len(wire.seen[0])
        one.close()
        self.assertEqual(other.recv(1), b"")
        self.assertEqual(len(wire.seen[0]), before)

    def test_user_space_reads_the_end(self) -> None:
        """A user-space end sees the bare end of the connection, which OpenSSL does not like."""
        one, other = sessions(_CIPHER, *self.connected())
        install(one.sock, one.keys())
        one.sock.sendall(b"all")
        one.sock.shutdown(socket.SHUT_WR)
        self.assertEqual(other.receive(), b"all")
        self.assertRaises(EOFError, other.receive)

    def test_half_close_of_a_non_blocking_writer(self) -> None:
        """A writer that does not wait, and shuts its side, may lose what it was told is sent."""
        lost = []
        # How much fits before a record goes in part only depends on the kernel.
        for room in range(20_000, 120_000, 5000):
            one, other = self.both()
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
            data = _noise(1 << 20)
            sent = self.fill(one, data, _RECORD)
            one.shutdown(socket.SHUT_WR)
            received = self.rest(other)
            self.assertEqual(received, data[: len(received)])
            if len(received) < sent:
                lost.append(one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        self.assertEqual(set(lost), {errno.EPIPE})

    def test_cut_inside_a_record(self) -> None:
        """A stream that ends inside a record ends there, with nothing of the record handed out."""
        one, other = sessions(_CIPHER, *self.connected())
        install(other.sock, other.keys())
        one.send(b"whole")
        one.sock.sendall(b"\x17\x03\x03\x00\x40" + bytes(20))
        one.sock.shutdown(socket.SHUT_WR)
        self.assertEqual(other.sock.recv(100), b"whole")
        self.assertEqual(other.sock.recv(100), b"")

    def reset(self) -> socket.socket:
        """Return the one end of a connection that the other has reset."""
        one, other = self.both()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
        return other

    def test_reset_and_a_writer(self) -> None:
        """A connection that was reset is an error for who writes to it, and lost."""
        sock = self.reset()
        self.assertRaises(ConnectionResetError, sock.sendall, b"?")
        self.assertTrue(lost(sock))

    def test_reset_and_a_reader(self) -> None:
        """It is an error for a reader; who only writes after that is not told any more."""
        sock = self.reset()
        self.assertRaises(ConnectionResetError, sock.recv, 1)
        self.assertEqual(sock.recv(1), b"")
        self.assertEqual(sock.send(b"?"), 1)
        self.assertTrue(lost(sock))

    def test_reset_while_writing(self) -> None:
        """A writer that was waiting for room is woken, and may be told that all has gone well."""
        one, other = self.both()
        sending = self.later(one.sendall, _noise(4 * _BIG))
        other.recv(1)
        other.close()
        self.assertIn(
            type(sending.exception()), (type(None), BrokenPipeError, ConnectionResetError)
        )
        self.assertTrue(lost(one))
        self.assertEqual(one.send(b"?"), 1)

    def test_not_lost(self) -> None:
        """A connection is not lost while one of its directions is open."""
        one, other = self.both()
        self.assertFalse(lost(one))
        other.shutdown(socket.SHUT_WR)
        self.assertEqual(one.recv(1), b"")
        self.assertFalse(lost(one))
        self.assertFalse(lost(other))
        one.close()
        self.assertEqual(other.recv(1), b"")
        self.assertTrue(lost(other))


class OtherRecordTests(KernelTlsCase):
    def send(self, sock: socket.socket, kind: int, content: bytes) -> None:
        """Send a record of another type than data, by the kernel."""
        sock.sendmsg([content], [(_SOL_TLS, _RECORD_TYPE, bytes([kind]))])

    def test_alert(self) -> None:
        """An alert is EIO to a plain reader, and data to one that has room and does not look."""
        one, other = self.both()
        self.send(one, _ALERT, b"\x01\x00")
        error = self.assertRaises(OSError, other.recv, 100)
        self.assertEqual(error.errno, errno.EIO)
        one, other = self.both()
        self.send(one, _ALERT, b"\x01\x00")
        data, control, _, _ = other.recvmsg(100, 100)
        self.assertEqual(data, b"\x01\x00")
        self.assertEqual(control, [(_SOL_TLS, 2, bytes([_ALERT]))])

    def test_close_notify(self) -> None:
        """What a user-space end sends to close the session is such an alert."""
        one, other = sessions(_CIPHER, *self.connected())
        install(other.sock, other.keys())
        one.close_notify()
        self.assertEqual(
            other.sock.recvmsg(100, 100)[:2], (b"\x01\x00", [(_SOL_TLS, 2, bytes([_ALERT]))])
        )

    def test_key_update(self) -> None:
        """A KeyUpdate never becomes data for a plain reader, nor what comes after it."""
        one, other = self.both()
        self.send(one, _HANDSHAKE, b"\x18\x00\x00\x01\x00")
        error = self.assertRaises(OSError, other.recv, 100)
        self.assertEqual(error.errno, errno.EIO)
        one.sendall(b"data")
        error = self.assertRaises(OSError, other.recv, 100)
        self.assertIn(error.errno, (errno.EIO, errno.EKEYEXPIRED))

    def test_ticket(self) -> None:
        """Tickets that were not read before the kernel took over are EIO to a plain reader."""
        client, server = sessions(_CIPHER, *self.connected(), greet=False)
        install(client.sock, client.keys())
        server.send(b"data")
        error = self.assertRaises(OSError, client.sock.recv, 100)
        self.assertEqual(error.errno, errno.EIO)


class RelayTests(KernelTlsCase):
    def pump(self, wire: socket.socket) -> tuple[socket.socket, Deferred]:
        """Begin to pump between a unix socket, whose other end is returned, and ``wire``."""
        ours, guest = socket.socketpair()
        self.addCleanup(ours.close)
        ended: Deferred[str] = Deferred()
        pump = Pump(
            "main 0",
            guest,
            wire,
            call=reactor.callFromThread,  # type: ignore[attr-defined]
            on_lost=lambda reason: None,
            on_held=lambda: None,
            on_end=ended.callback,
        )
        pump.start()
        return ours, ended

    async def test_both_ways(self) -> None:
        """A relay's pumps carry a stream each way through kernel TLS, and the ends of both."""
        sides = [self.pump(sock) for sock in self.both()]
        (source, _), (destination, _) = sides
        data, back = _noise(_BIG), _noise(_BIG // 2)

        sending = [
            self.later(self.send_all, sock, what)
            for sock, what in ((source, data), (destination, back))
        ]
        reading = [deferToThread(self.rest, sock) for sock in (source, destination)]
        self.assertEqual(_digest(await reading[0]), _digest(back))
        self.assertEqual(_digest(await reading[1]), _digest(data))
        for _, ended in sides:
            await ended
        for one in sending:
            one.result()
