"""Peers of the future: what they would say to a peer of today, wrapped around two of today.

Everything that two daemons say to each other passes through.  The Greeting gets a version 2
and features that nobody knows; what is said after it is what version 1 has, as long as
version 1 was chosen, with JSON that has more in it than is known today.  So the source sees
a newer destination and the destination a newer source.  It is written from docs/protocol
alone.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from typing import Any

from tests.minipeer import MAGIC, greet
from tests.rig.proxy import Proxy

__all__ = ["UNKNOWN", "Newer"]

#: Features of the future.
UNKNOWN = ("teleport", "__org.example_time-travel")

_FEATURE = 3
_JSON = frozenset({2, _FEATURE, 4, 5, 9, 11, 12})  # messages with an object
_STRANGE = 99  # a message of version 2

#: What is in the objects of the future, at any place.
_MORE = {"future": {"since": 2, "list": [1, {"deep": None}]}, "where-to": "the moon"}


class Newer(Proxy):
    """A newer source and a newer destination, between two of today.

    :ivar replies: version and features of each Reply.
    :ivar changed: the types of the messages that got more in them, from either side.
    """

    def __init__(self, uri: str, *, stray: bool = False) -> None:
        """
        :param uri: of a daemon on 127.0.0.1.
        :param stray: a message of version 2 is sent in version 1 as well, as the
            destination's first one.
        """
        self.replies: list[tuple[int, list[str]]] = []
        self.changed: set[int] = set()
        self.stray = stray
        super().__init__(int(uri.rpartition(":")[2]))

    def _serve(self, source: socket.socket) -> None:
        with contextlib.suppress(OSError), source, self._connect() as destination:
            greeting = greet(destination)
            source.sendall(
                MAGIC
                + bytes([len(greeting.versions) + 1, 2, *greeting.versions])
                + _features([UNKNOWN[0], *greeting.features, *UNKNOWN[1:]])
            )
            begins = source.recv(len(MAGIC), socket.MSG_WAITALL)
            destination.sendall(begins)
            control = begins == MAGIC
            if control:
                version, count = struct.unpack(">BI", head := source.recv(5, socket.MSG_WAITALL))
                names = [source.recv(source.recv(1)[0], socket.MSG_WAITALL) for _ in range(count)]
                selected = [name.decode() for name in names]
                self.replies.append((version, selected))
                destination.sendall(head + b"".join(bytes([len(one)]) + one for one in names))
                control = bool(selected)  # or the stream follows in clear behind START
            self._carry(source, destination, control=control)

    def _carry(self, source: socket.socket, destination: socket.socket, *, control: bool) -> None:
        ways = ((source, destination), (destination, source))
        threads = [
            threading.Thread(target=self._way, args=(*way, control), daemon=True) for way in ways
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _way(self, one: socket.socket, other: socket.socket, control: bool) -> None:
        with contextlib.suppress(OSError):
            if control and self.stray and one.getpeername()[1] == self._target:
                other.sendall(struct.pack(">HI", _STRANGE, 0))
            while control and (head := one.recv(6, socket.MSG_WAITALL)):
                kind, length = struct.unpack(">HI", head)
                body = one.recv(length, socket.MSG_WAITALL) if length else b""
                if kind in _JSON:
                    self.changed.add(kind)
                    body = _richer(kind, body)
                other.sendall(struct.pack(">HI", kind, len(body)) + body)
            while data := one.recv(65536):
                other.sendall(data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)


def _features(names: list[str]) -> bytes:
    strings = b"".join(bytes([len(name)]) + name.encode() for name in names)
    return struct.pack(">I", len(names)) + strings


def _richer(kind: int, body: bytes) -> bytes:
    """Return the body of a message with more in each of its objects."""
    start = 1 + body[0] if kind == _FEATURE else 0
    said: dict[str, Any] = json.loads(body[start:])
    for inner in ("plan", "terms"):
        if inner in said:
            said[inner] |= _MORE
    for agreement in said.get("plan", {}).get("agreements", {}).values():
        agreement |= _MORE  # as in the FEATURE that it comes from
    return body[:start] + json.dumps(said | _MORE).encode()
