"""A connection in the middle, under the test's hand.

It stands between two QEMUs, between a source's daemon and a destination's, or between a
daemon and its QEMU's monitor.  What the destination says can be kept back, and all
connections can be dropped at once, as if the network had reset them.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field

__all__ = ["Deaf", "OrderlyRecorder", "Proxy", "Recorder", "Tamperer"]


class Proxy:
    """Forwards every connection to one place.

    :ivar port: where it listens, on 127.0.0.1.
    :ivar uri: the same for a daemon or a QEMU.
    """

    def __init__(self, target: int | str, *, but_first: bool = False) -> None:
        """Begin to listen.

        :param target: the port of 127.0.0.1 that connections are forwarded to, or the path
            of a unix socket; then it listens on another one beside that, and has no port.
        :param but_first: :meth:`hold` and :meth:`drop` are not for the connection that is
            made first, which is a migration's control connection.
        """
        self._target = target
        self._but_first = but_first
        self._open = threading.Event()
        self._open.set()
        self._pairs: list[tuple[bool, socket.socket, socket.socket]] = []
        self._closed = False
        self.port = 0
        if isinstance(target, str):
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(f"{target}.proxy")
            self._listener.listen()
            self.uri = f"unix:{target}.proxy"
        else:
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
            self._join(source, self._connect())

    def _join(self, source: socket.socket, destination: socket.socket) -> None:
        with destination:
            back = threading.Thread(target=self._back, args=(destination, source), daemon=True)
            self._forth(source, destination, back)
            back.join()

    def passed_on(self, data: bytes, source: socket.socket, *, by_source: bool) -> bytes:
        """Say what goes on where these bytes have come."""
        return data

    def _connect(self) -> socket.socket:
        if isinstance(self._target, int):
            return socket.create_connection(("127.0.0.1", self._target))
        destination = socket.socket(socket.AF_UNIX)
        try:
            destination.connect(self._target)
        except OSError:
            destination.close()
            raise
        return destination

    def _forth(
        self, source: socket.socket, destination: socket.socket, back: threading.Thread
    ) -> None:
        # A Greeting comes before anything that the source says.
        back.start()
        with contextlib.suppress(OSError):
            first = source.recv(65536)
            meant = not self._but_first or bool(self._pairs)
            self._pairs.append((meant, source, destination))
            while first:
                destination.sendall(self.passed_on(first, source, by_source=True))
                first = source.recv(65536)
        _shut(destination, socket.SHUT_WR)

    def _back(self, destination: socket.socket, source: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := destination.recv(65536):
                if (True, source, destination) in self._pairs:
                    self._open.wait()
                source.sendall(self.passed_on(data, source, by_source=False))
        _shut(source, socket.SHUT_WR)


@dataclass
class _Bytes:
    """What has gone over one connection."""

    there: bytearray = field(default_factory=bytearray)
    back: bytearray = field(default_factory=bytearray)


class Recorder(Proxy):
    """Writes down every byte, as somebody on the way could."""

    def __init__(self, uri: str) -> None:
        """:param uri: of a daemon on 127.0.0.1."""
        self._recorded: dict[socket.socket, _Bytes] = {}
        super().__init__(int(uri.rpartition(":")[2]))

    def passed_on(self, data: bytes, source: socket.socket, *, by_source: bool) -> bytes:
        recorded = self._recorded.setdefault(source, _Bytes())
        (recorded.there if by_source else recorded.back).extend(data)
        return data

    @property
    def connections(self) -> list[tuple[bytes, bytes]]:
        """What went to the destination and what came back, for each connection in order."""
        return [(bytes(one.there), bytes(one.back)) for one in self._recorded.values()]


class OrderlyRecorder(Recorder):
    """The same, for QEMUs: the destination gets the connections in the order that they are made in.

    Up to 7.2 that is how it tells its main channel from the others.
    """

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while not self._closed:
                source, _ = self._listener.accept()
                self._recorded[source] = _Bytes()
                pair = (source, self._connect())
                threading.Thread(target=self._both, args=pair, daemon=True).start()

    def _both(self, source: socket.socket, destination: socket.socket) -> None:
        with contextlib.suppress(OSError), source:
            self._join(source, destination)


class Deaf(Proxy):
    """Takes some connections, and then says nothing on any other."""

    def __init__(self, uri: str, connections: int) -> None:
        """:param uri: of a daemon on 127.0.0.1."""
        self._served = connections
        super().__init__(int(uri.rpartition(":")[2]))

    def _serve(self, source: socket.socket) -> None:
        if self._served:
            self._served -= 1
            super()._serve(source)
        else:
            self._pairs.append((True, source, source))


class Tamperer(Proxy):
    """Changes one bit of what a source sends on a connection but the first, once."""

    def __init__(self, uri: str, *, after: int) -> None:
        """
        :param uri: of a daemon on 127.0.0.1.
        :param after: so many bytes are left alone first.
        """
        self.done = False
        self._after = after
        self._passed: dict[socket.socket, int] = {}
        super().__init__(int(uri.rpartition(":")[2]), but_first=True)

    def passed_on(self, data: bytes, source: socket.socket, *, by_source: bool) -> bytes:
        if self.done or not by_source or (True, source) not in [one[:2] for one in self._pairs]:
            return data
        passed = self._passed[source] = self._passed.get(source, 0) + len(data)
        if passed <= self._after:
            return data
        self.done = True
        return data[:-1] + bytes([data[-1] ^ 1])


def _shut(end: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(how)
