"""A relay's TLS on a socket: what goes in at one end comes out at the other, in good pieces."""

from __future__ import annotations

import random
import socket
import threading
from typing import Any, cast

from twisted.trial.unittest import SynchronousTestCase

from qmigd.channels.tls import TlsSession, TlsSocket
from tests.rig.certificates import Authority

_KIB = 1 << 10
_MIB = 1 << 20

#: What a relay's thread has room for.
_ROOM = _MIB


class _Wire:
    """A socket with one direction: keeps what is sent, and hands it out as it is asked for.

    :ivar pieces: what was sent.
    """

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self._left = bytearray()

    def sendall(self, data: bytes | bytearray) -> None:
        self.pieces.append(bytes(data))
        self._left += data

    def recv_into(self, buffer: memoryview, size: int) -> int:
        size = min(size, len(self._left))
        buffer[:size] = self._left[:size]
        del self._left[:size]
        return size


class TlsSocketTests(SynchronousTestCase):
    def setUp(self) -> None:
        credentials = Authority(self.mktemp()).host("127.0.0.1").load()
        self.near, self.far = (TlsSession(credentials, server=server) for server in (False, True))
        while not (self.near.established and self.far.established):
            self.far.receive(self.near.data_to_send())
            self.near.receive(self.far.data_to_send())

    def both_on(self, wire: Any) -> tuple[TlsSocket, TlsSocket]:
        """Return the two ends, joined by one and the same object."""
        sock = cast(socket.socket, wire)
        return TlsSocket(sock, self.near), TlsSocket(sock, self.far)

    def test_both_ways(self) -> None:
        """Pieces of any size come whole and in order, both ways at once, and then the end."""
        seed = random.randrange(1 << 32)
        odd = random.Random(seed)
        left, right = socket.socketpair()
        ends = TlsSocket(left, self.near), TlsSocket(right, self.far)
        data = [odd.randbytes(5 * _MIB + odd.randrange(_MIB)) for _ in ends]
        found = [bytearray(), bytearray()]

        def write(number: int) -> None:
            pieces, at = random.Random(seed + number), 0
            while at < len(data[number]):
                size = pieces.choice((1, 77, 16 * _KIB, 300 * _KIB, _MIB))
                ends[number].sendall(data[number][at : at + size])
                at += size
            ends[number].shutdown(socket.SHUT_WR)

        def read(number: int) -> None:
            buffer = bytearray(_ROOM)
            while size := ends[1 - number].recv_into(buffer):
                found[number] += memoryview(buffer)[:size]

        threads = [
            threading.Thread(target=work, args=(number,))
            for work in (write, read)
            for number in (0, 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for end in ends:
            end.close()
        self.assertEqual([bytes(one) for one in found], data, f"seed {seed}")

    def test_full_reads(self) -> None:
        """What one read of the socket has brought is given out at once: no record stays behind.

        A read of one record, on top of each great one, would cost a call of QEMU's as well.
        """
        near, far = self.both_on(_Wire())
        for _ in range(8 * _MIB // (8 * _KIB)):
            near.sendall(bytes(8 * _KIB))  # a record, which is not as long as it could be
        buffer = bytearray(_ROOM)
        taken = [far.recv_into(buffer) for _ in range(8)]
        self.assertGreater(min(taken), _ROOM - 64 * _KIB)

    def test_full_writes(self) -> None:
        """Many records go out at once."""
        wire = _Wire()
        self.both_on(wire)[0].sendall(bytes(_MIB))
        self.assertEqual(len(wire.pieces), 4)

    def test_changed(self) -> None:
        """A record that was changed on its way is an error that says so."""
        wire = _Wire()
        self.both_on(wire)[0].sendall(b"payload")
        record = bytearray(wire.pieces[0])
        record[-1] ^= 1
        wire = _Wire()
        wire.sendall(record)
        _, far = self.both_on(wire)
        error = self.assertRaises(OSError, far.recv_into, bytearray(_ROOM))
        self.assertIn("damaged", str(error))
