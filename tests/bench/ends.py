"""The two ends of the course (see ``course``): a source and a sink, in the places of the QEMUs.

A script and not a module of the package: everything that is in ``tests`` brings Hypothesis
with it, and several of these start for each run, some under emulation.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence

#: Bytes that the source writes at a time.
_WRITE = 512 << 10

#: What the sink says.
_BEGUN, _ENDED = b"b", b"e"


def _expect(sock: socket.socket, word: bytes) -> None:
    if sock.recv(1) != word:
        raise RuntimeError("not everything came through")


def _handed(sock: socket.socket) -> socket.socket:
    """Return the socket that is sent there."""
    with sock:
        _, (descriptor,), _, _ = socket.recv_fds(sock, 1, 1)
    return socket.socket(fileno=descriptor)


def _source(handed: bool, count: int, size: int, paths: Sequence[str]) -> None:
    """Send a byte, then ``size`` bytes on each of ``count`` connections when told to."""
    data = memoryview(mmap.mmap(-1, _WRITE))
    data[:] = os.urandom(_WRITE)

    def connect(path: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        return _handed(sock) if handed else sock

    def send(sock: socket.socket, size: int) -> None:
        while size > 0:
            sock.sendall(data[:size])
            size -= _WRITE
        # Not before something has come through: a kernel takes TLS over only on a
        # connection that is open in both directions.
        _expect(sock, _BEGUN)
        sock.shutdown(socket.SHUT_WR)
        _expect(sock, _ENDED)
        sock.close()

    for path in paths:
        send(connect(path), 1)
    _say("ready")
    sys.stdin.readline()
    begun, cpu = time.perf_counter(), time.process_time()
    threads = [
        threading.Thread(target=send, args=(connect(paths[number % len(paths)]), size))
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _say(f"{time.perf_counter() - begun} {time.process_time() - cpu}")
    sys.stdin.readline()


def _sink(handed: bool, path: str) -> None:
    """Read every connection to its end, and say on it when it began and when it ended."""

    def take(sock: socket.socket) -> None:
        buffer = bytearray(1 << 20)
        # One that brings nothing only looks whether the relay is there.
        if sock.recv_into(buffer):
            sock.sendall(_BEGUN)
            while sock.recv_into(buffer):
                pass
            sock.sendall(_ENDED)
        sock.close()

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(16)
        _say("ready")
        while True:
            sock = server.accept()[0]
            end = _handed(sock) if handed else sock
            threading.Thread(target=take, args=(end,), daemon=True).start()


def _say(text: str) -> None:
    """Tell the benchmark."""
    print(text, flush=True)


def _main(words: list[str]) -> None:
    match words:
        case ["source", how, count, size, *paths]:
            _source(how == "handed", int(count), int(size), paths)
        case ["sink", how, path]:
            _sink(how == "handed", path)


if __name__ == "__main__":
    _main(sys.argv[1:])
