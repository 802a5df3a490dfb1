"""A small peer that shares no code with qmigd, written from docs/protocol.md alone.

It is a source that knows the baseline and nothing else: it reads the Greeting,
selects no feature, names the guest if it is told to, says START, and sends
QEMU's stream right behind it.  It runs as a program too, with QEMU's outgoing
migration on standard input and no return path:

    python minipeer.py HOST PORT [GUEST] < stream
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
from dataclasses import dataclass
from typing import BinaryIO, Protocol

__all__ = ["Greeting", "Refused", "greet", "move"]

MAGIC = b"QEMU-MIGRATE"
VERSION = 1
ERROR, GUEST, START = 1, 2, 6
CHUNK = 256 * 1024


class Refused(Exception):
    """The destination answered with an ERROR.

    :ivar code: what a program reads.
    :ivar text: what a person reads.
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code
        self.text = text


@dataclass(frozen=True)
class Greeting:
    """What the destination said first."""

    versions: list[int]
    features: list[str]


def move(
    host: str,
    port: int,
    stream: socket.socket | BinaryIO,
    guest: str | None = None,
    *,
    deadline: float = 10.0,
) -> int:
    """Carry a stream to a destination, and its return path back; returns at the end of both.

    :param stream: where QEMU's stream is read from.  If it is a socket, the return
        path is written to it.  It is left open, but a socket is shut for writing.
    :param guest: the guest's name on the destination; ``None`` for the only one that waits.
    :param deadline: in seconds, for the connection and the Greeting.
    :returns: how many bytes of the stream were sent.
    :raises Refused: the destination answered with an ERROR.
    :raises OSError: the connection broke.
    """
    with socket.create_connection((host, port), timeout=deadline) as peer:
        greeting = greet(peer)
        if VERSION not in greeting.versions:
            raise ValueError(f"the destination speaks none but {greeting.versions}")
        opening = MAGIC + struct.pack(">BI", VERSION, 0)
        if guest is not None:
            opening += _message(GUEST, json.dumps({"name": guest}).encode())
        opening += _message(START)
        peer.settimeout(None)
        back = _Back(peer, stream)
        back.start()
        sent = _forth(stream, peer, opening)
        back.join()
    if back.refusal is not None:
        raise back.refusal
    return sent


class Readable(Protocol):
    """What the Greeting can be read from: a socket, or what looks like one."""

    def recv(self, count: int, /) -> bytes: ...


def greet(peer: Readable) -> Greeting:
    """Read the Greeting, and not a byte more."""
    if (magic := _exactly(peer, 12)) != MAGIC:
        raise ValueError(f"a Greeting should not begin with {magic!r}")
    versions = list(_exactly(peer, _exactly(peer, 1)[0]))
    (count,) = struct.unpack(">I", _exactly(peer, 4))
    return Greeting(versions, [_string(peer) for _ in range(count)])


def _message(kind: int, body: bytes = b"") -> bytes:
    return struct.pack(">HI", kind, len(body)) + body


def _exactly(peer: Readable, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = peer.recv(count - len(data))
        if not piece:
            raise ConnectionError("the destination closed the connection")
        data += piece
    return data


def _string(peer: Readable) -> str:
    return _exactly(peer, _exactly(peer, 1)[0]).decode("ascii")


def _forth(stream: socket.socket | BinaryIO, peer: socket.socket, opening: bytes) -> int:
    """Send the opening and the stream, the stream's first bytes in the same segment as START."""
    sent = 0
    try:
        while data := os.read(stream.fileno(), CHUNK):
            peer.sendall(opening + data)
            opening = b""
            sent += len(data)
        if opening:
            peer.sendall(opening)
        peer.shutdown(socket.SHUT_WR)
    except OSError:
        # The destination has closed; what it said first, if anything, is the reason.
        pass
    return sent


class _Back(threading.Thread):
    """Carries the return path back, or finds the ERROR that stands in its place."""

    def __init__(self, peer: socket.socket, stream: socket.socket | BinaryIO) -> None:
        super().__init__(daemon=True)
        self.refusal: Refused | None = None
        self._peer = peer
        self._stream = stream

    def run(self) -> None:
        try:
            self._carry()
        except OSError:
            pass
        finally:
            if isinstance(self._stream, socket.socket):
                self._end_stream(self._stream)

    def _carry(self) -> None:
        data = b""
        while len(data) < 6 and (piece := self._peer.recv(6 - len(data))):
            data += piece
        # QEMU's own message of type 1 has a 16-bit length, which is 4.
        if len(data) == 6 and data[:3] == b"\0\1\0" and data[3] <= 1:
            (length,) = struct.unpack(">I", data[2:])
            body = _exactly(self._peer, length)
            end = 1 + body[0]
            self.refusal = Refused(body[1:end].decode("ascii"), body[end:].decode())
            return
        while data:
            if isinstance(self._stream, socket.socket):
                self._stream.sendall(data)
            data = self._peer.recv(CHUNK)

    def _end_stream(self, stream: socket.socket) -> None:
        """Let whoever sends the stream see the end, so that :func:`_forth` comes to its own."""
        how = socket.SHUT_RDWR if self.refusal is not None else socket.SHUT_WR
        with contextlib.suppress(OSError):
            stream.shutdown(how)


if __name__ == "__main__":
    try:
        moved = move(sys.argv[1], int(sys.argv[2]), sys.stdin.buffer, *sys.argv[3:4])
    except (Refused, OSError, ValueError) as error:
        sys.exit(f"minipeer: {error}")
    print(f"{moved} bytes sent")
