"""A TCP connection in the middle, under the test's hand.

It stands between two QEMUs, or between a source's daemon and a destination's.  What the
destination says can be kept back, and all connections can be dropped at once, as if the
network had reset them.
"""

from __future__ import annotations

import contextlib
import socket
import threading

__all__ = ["Proxy"]


class Proxy:
    """Forwards every connection to one port.

    :ivar port: where it listens, on 127.0.0.1.
    :ivar uri: the same for a daemon or a QEMU.
    """

    def __init__(self, target: int, *, only: bytes = b"") -> None:
        """Begin to listen.

        :param target: the port of 127.0.0.1 that connections are forwarded to.
        :param only: :meth:`hold` and :meth:`drop` are for the connections that begin
            with these bytes only.
        """
        self._target = target
        self._only = only
        self._open = threading.Event()
        self._open.set()
        self._pairs: list[tuple[bool, socket.socket, socket.socket]] = []
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.uri = f"tcp:127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def hold(self) -> None:
        """From now on keep back what the destination says."""
        self._open.clear()

    def drop(self) -> None:
        """Drop the connections, both halves, with what is kept back."""
        for meant, *ends in self._pairs:
            if meant:
                for end in ends:
                    _shut(end)
        self._open.set()

    def close(self) -> None:
        """Drop everything and listen no more."""
        self._closed = True
        _shut(self._listener)
        self._listener.close()
        for _, *ends in self._pairs:
            for end in ends:
                _shut(end)
        self._open.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._closed:
                source, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(source,), daemon=True).start()

    def _serve(self, source: socket.socket) -> None:
        """Carry one connection; its sockets are closed when both directions have ended."""
        with contextlib.suppress(OSError), source:
            destination = socket.create_connection(("127.0.0.1", self._target))
            with destination:
                back = threading.Thread(target=self._back, args=(destination, source), daemon=True)
                self._forth(source, destination, back)
                back.join()

    def _forth(
        self, source: socket.socket, destination: socket.socket, back: threading.Thread
    ) -> None:
        # A Greeting comes before anything that the source says.
        back.start()
        with contextlib.suppress(OSError):
            first = source.recv(65536)
            self._pairs.append((first.startswith(self._only), source, destination))
            while first:
                destination.sendall(first)
                first = source.recv(65536)
        _shut(destination, socket.SHUT_WR)

    def _back(self, destination: socket.socket, source: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := destination.recv(65536):
                if (True, source, destination) in self._pairs:
                    self._open.wait()
                source.sendall(data)
        _shut(source, socket.SHUT_WR)


def _shut(end: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(how)
