"""A wire between two ends, with somebody on it who sees everything and may change it."""

from __future__ import annotations

import contextlib
import socket
import threading

from qmigd.transports.sockets import tcp_pair

__all__ = ["Wire"]


class Wire:
    """Two TCP connections and what carries the bytes from the one to the other.

    :ivar ends: the sockets at its two ends.
    :ivar seen: what has been carried from each of the ends, as it was sent.
    """

    def __init__(self) -> None:
        """Join the ends."""
        one, inner = tcp_pair()
        other_inner, other = tcp_pair()
        self.ends = one, other
        self.seen = bytearray(), bytearray()
        self._flips: list[int | None] = [None, None]
        self._inner = inner, other_inner
        self._threads = [
            threading.Thread(target=self._carry, args=(number,), daemon=True) for number in (0, 1)
        ]
        for thread in self._threads:
            thread.start()

    def flip(self, end: int, ahead: int) -> None:
        """Flip a bit of what that end sends: ``ahead`` bytes behind what it has sent so far."""
        self._flips[end] = len(self.seen[end]) + ahead

    def _carry(self, end: int) -> None:
        source, sink = self._inner[end], self._inner[1 - end]
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(1 << 16)):
                start = len(self.seen[end])
                self.seen[end].extend(data)
                flip = self._flips[end]
                if flip is not None and start <= flip < len(self.seen[end]):
                    data[flip - start] ^= 1
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close everything."""
        for sock in (*self.ends, *self._inner):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for sock in (*self.ends, *self._inner):
            sock.close()
