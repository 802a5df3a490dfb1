"""Streams of real QEMUs for tests: they are saved, written down on the way, and given back."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qmigd.stream.events import Event
from qmigd.stream.multifd import DeviceState, Initial, PageData, Unpacker
from qmigd.stream.ram import RamImage
from qmigd.stream.reader import Reader
from tests.rig.bootsector import PAGE, Program
from tests.rig.case import RigCase
from tests.rig.guest import Guest
from tests.rig.news import DEADLINE, Hang
from tests.rig.proxy import OrderlyRecorder
from tests.rig.qemus import require

__all__ = ["BUSY", "StreamCase", "events", "image", "packets", "pieces", "written"]

#: Not a divisor of anything in a stream.
_PIECE = 100_003

#: Keeps dirtying its RAM.
BUSY = Program(pages=4096, pages_per_tick=64, ticks_per_second=100)


def pieces(data: bytes) -> Iterator[bytes]:
    """Cut a stream."""
    for at in range(0, len(data), _PIECE):
        yield data[at : at + _PIECE]


def events(data: bytes, reader: Reader | None = None) -> Iterator[Event]:
    """Read a whole stream, in pieces; each event is to be used before the next."""
    reader = reader or Reader()
    for piece in pieces(data):
        yield from reader.feed(piece)
    yield from reader.close()


def packets(data: bytes) -> Iterator[Initial | PageData | DeviceState]:
    """Read a whole channel of multifd, in pieces."""
    unpacker = Unpacker()
    for piece in pieces(data):
        yield from unpacker.feed(piece)
    unpacker.end()


def image() -> RamImage:
    """Make room for a guest's RAM."""
    return RamImage(lambda block: bytearray(block.length))


@contextlib.contextmanager
def written(path: Path) -> Iterator[str]:
    """Wait at the end until a program that QEMU writes into has written its file as well.

    QEMU's migration has completed once the last bytes are in the program's pipe.  Yields what
    has to follow the program's command: it tells through a pipe of its own.
    """
    pipe = path.with_suffix(".written")
    os.mkfifo(pipe)
    descriptor = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield f"; echo > {pipe}"
        if not select.select([descriptor], [], [], DEADLINE)[0]:
            raise Hang(f"Waited {DEADLINE:g} s in vain for {path} to be written.")
    finally:
        os.close(descriptor)
        pipe.unlink()


class StreamCase(RigCase):
    """Tests with streams."""

    def source(self, label: str, *capabilities: str, **options: Any) -> Guest:
        """Start a guest that keeps dirtying its RAM.

        :param options: for :class:`Guest`.
        """
        options = {"program": BUSY, **options}
        guest = self.guest(require(label), f"source {label}", **options).start()
        guest.wait_ticks(2)
        guest.set_capabilities("events", *capabilities)
        return guest

    def destination(self, label: str, *capabilities: str, **options: Any) -> Guest:
        """Start a QEMU that waits for it, and leaves it paused, so that its RAM is what came.

        :param options: for :class:`Guest`.
        """
        options = {"program": BUSY, "paused": True, **options}
        name = f"destination {label}"
        guest = self.guest(require(label), name, incoming=True, **options).start()
        guest.set_capabilities("events", *capabilities)
        return guest

    def migrate(self, guest: Guest, uri: str, **parameters: Any) -> None:
        """Let QEMU migrate to its end.

        :param parameters: by QEMU's names; ``_`` stands for ``-``.
        """
        if parameters:
            guest.qmp("migrate-set-parameters", **parameters)
        guest.qmp("migrate", uri=uri)
        self.assertEqual("completed", guest.wait_migration("completed", "failed"))

    def save(self, guest: Guest, uri: str = "exec:cat > {}", **parameters: Any) -> bytes:
        """Let QEMU write into a file; returns what it wrote.

        :param uri: with ``{}`` for the file's path.
        """
        path = Path(guest.directory) / "saved"
        if uri.startswith("exec:"):
            with written(path) as tell:
                self.migrate(guest, uri.format(path) + tell, **parameters)
        else:
            self.migrate(guest, uri.format(path), **parameters)
        return path.read_bytes()

    def load(self, guest: Guest, data: bytes, uri: str = "exec:cat {}") -> None:
        """Let QEMU read a file.

        :param uri: with ``{}`` for the file's path.
        """
        path = Path(guest.directory) / "again"
        path.write_bytes(data)
        guest.qmp("migrate-incoming", uri=uri.format(path))
        self.loaded(guest)

    def loaded(self, guest: Guest) -> None:
        """Wait until all has come."""
        status = guest.wait_migration("completed", "failed")
        self.assertEqual("completed", status, guest.log)

    def recorder(self, destination: Guest, command: str = "migrate-incoming") -> OrderlyRecorder:
        """Let QEMU listen behind somebody who writes everything down."""
        recorder = OrderlyRecorder(f"tcp:127.0.0.1:{self._port(destination, command)}")
        self.addCleanup(recorder.close)
        return recorder

    def connected(self, destination: Guest) -> socket.socket:
        """Let QEMU listen, and connect to it."""
        port = self._port(destination, "migrate-incoming")
        return socket.create_connection(("127.0.0.1", port), DEADLINE)

    def play(self, destination: Guest, connections: Sequence[bytes]) -> None:
        """Send QEMU what goes through each connection; they are made in this order."""
        port = self._port(destination, "migrate-incoming")
        with contextlib.ExitStack() as stack:
            threads = []
            for data in connections:
                one = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                threads.append(threading.Thread(target=one.sendall, args=(data,)))
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.loaded(destination)

    def compare(self, ram: RamImage, guest: Guest) -> None:
        """Compare with what QEMU says its RAM is."""
        one, other = ram.blocks["pc.ram"], memoryview(guest.ram())
        self.assertEqual(len(one), len(other))
        if one != other:
            places = range(0, len(one), PAGE)
            wrong = next(at for at in places if one[at : at + PAGE] != other[at : at + PAGE])
            self.fail(f"The RAM differs at {wrong:#x}.")

    def _port(self, destination: Guest, command: str) -> int:
        destination.qmp(command, uri="tcp:127.0.0.1:0")
        return int(destination.qmp("query-migrate")["socket-address"][0]["port"])
