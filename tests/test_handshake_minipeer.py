"""The peer that was written from docs/protocol alone, against the destination's machine."""

from __future__ import annotations

import io
import os
import socket
import tempfile
import threading
from collections.abc import Callable

from twisted.trial.unittest import SynchronousTestCase

from qmigd.handshake import DestinationHandshake
from qmigd.handshake.events import Event, GuestDescribed, Selected, Started
from tests import minipeer


class Destination(threading.Thread):
    """One connection of a destination, on blocking sockets.

    :ivar told: the events of the handshake.
    :ivar stream: what came after START.
    """

    def __init__(self, then: Callable[[DestinationHandshake], bytes]) -> None:
        super().__init__(daemon=True)
        self.told: list[Event] = []
        self.stream = b""
        self._then = then
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def run(self) -> None:
        with self._listener, self._listener.accept()[0] as connection:
            handshake = DestinationHandshake(("multifd",))
            connection.sendall(handshake.data_to_send())
            while wanted := handshake.wanted:
                self.told += handshake.receive(connection.recv(wanted))
            connection.sendall(self._then(handshake))
            if handshake.closed:
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                self.stream += piece


class MiniPeer(SynchronousTestCase):
    """The baseline works between two programs that share nothing but the page."""

    def serve(self, then: Callable[[DestinationHandshake], bytes]) -> Destination:
        destination = Destination(then)
        destination.start()
        self.addCleanup(destination.join, 10)
        return destination

    def test_stream_and_return_path(self) -> None:
        """The stream arrives whole, the guest is named, the return path comes back."""
        stream = b"QEVM" + os.urandom(1 << 20)
        back = b"\x00\x02\x00\x04\x00\x00\x00\x07" + os.urandom(1000)
        destination = self.serve(lambda handshake: back)
        ours, qemus = socket.socketpair()
        got: list[bytes] = []

        def qemu() -> None:
            qemus.sendall(stream)
            qemus.shutdown(socket.SHUT_WR)
            while piece := qemus.recv(65536):
                got.append(piece)

        thread = threading.Thread(target=qemu, daemon=True)
        thread.start()
        with ours, qemus:
            sent = minipeer.move("127.0.0.1", destination.port, ours, "web")
            thread.join(10)
            destination.join(10)
        self.assertEqual(sent, len(stream))
        self.assertEqual(
            destination.told, [Selected(1, ()), GuestDescribed({"name": "web"}), Started(True)]
        )
        self.assertTrue(destination.stream == stream)
        self.assertEqual(b"".join(got), back)

    def test_file(self) -> None:
        """A stream out of a file arrives whole, without a guest's name."""
        destination = self.serve(lambda handshake: b"")
        with tempfile.TemporaryFile() as stream:
            stream.write(b"QEVM" + bytes(1000))
            stream.seek(0, io.SEEK_SET)
            os.lseek(stream.fileno(), 0, os.SEEK_SET)
            minipeer.move("127.0.0.1", destination.port, stream)
        destination.join(10)
        self.assertEqual(destination.told, [Selected(1, ()), Started(True)])
        self.assertEqual(destination.stream, b"QEVM" + bytes(1000))

    def test_refused(self) -> None:
        """An ERROR in place of the return path is raised with its code and text."""

        def refuse(handshake: DestinationHandshake) -> bytes:
            handshake.error("guest-not-found", "No guest “web” waits here.")
            return handshake.data_to_send()

        destination = self.serve(refuse)
        ours, qemus = socket.socketpair()
        with ours, qemus:
            qemus.sendall(b"QEVM")
            error = self.assertRaises(
                minipeer.Refused, minipeer.move, "127.0.0.1", destination.port, ours, "web"
            )
        self.assertEqual(error.code, "guest-not-found")
        self.assertEqual(error.text, "No guest “web” waits here.")
