"""The file of a saved guest: its head byte by byte, its checksum, and its place on the disk."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import struct
import threading
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.channels.file_streams import pour_in, pour_out
from qmigd.channels.saved_files import BLOCK, NewFile, SavedFile, Stopped, checksum, discard
from qmigd.errors import FileError
from qmigd.interfaces import FORMATS
from qmigd.wire import saved
from qmigd.wire.saved import Head, begin, encode, finish, offset_for

_PAGE = Path(__file__).parents[1] / "docs" / "saved-guests.md"

HEAD = Head(
    format="stream",
    features=(),
    run=True,
    guest={"name": "web1", "machine": "pc-q35-7.2"},
    saved=1700000000.0,
    by="0.1.0",
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)


def whole(head: Head, *, complete: bool = True) -> tuple[Head, bytes]:
    """Return a head that knows its place, and its bytes."""
    head = replace(head, offset=offset_for(head))
    return head, encode(head, complete=complete)


def read(data: bytes, size: int) -> Head:
    """Read a head as a restore does."""
    beginning = begin(data[: saved.FIXED], size)
    return finish(beginning, data[saved.FIXED : saved.FIXED + beginning.size])


class HeadTests(SynchronousTestCase):
    @given(
        st.sampled_from(FORMATS),
        st.lists(st.sampled_from(["mapped-ram", "multifd"]), unique=True),
        st.booleans(),
        st.dictionaries(st.text(max_size=8), _JSON, max_size=5),
        st.integers(0, 2**62),
        st.binary(min_size=32, max_size=32),
    )
    def test_back_and_forth(
        self,
        format: str,
        features: list[str],
        run: bool,
        guest: dict[str, object],
        length: int,
        digest: bytes,
    ) -> None:
        """What is written is what is read, up to a place that is good for any disk."""
        head, data = whole(
            Head(format, tuple(features), run, guest, 1.5, "0.1.0", 0, length, digest)
        )
        self.assertEqual(len(data), head.offset)
        self.assertEqual(head.offset % 4096, 0)
        self.assertEqual(read(data, head.offset + length), head)

    @given(st.integers(0, 400), st.integers(1, 255))
    def test_every_byte_counts(self, at: int, change: int) -> None:
        """A head with a wrong byte is refused in a sentence, wherever that is."""
        head, data = whole(HEAD)
        at %= saved.FIXED + len(head.contents())
        bad = data[:at] + bytes([data[at] ^ change]) + data[at + 1 :]
        error = self.assertRaises(FileError, read, bad, head.offset)
        self.assertRegex(error.text, "^(it|its) ")

    @given(st.binary(max_size=300), st.integers(0, 2**63), st.booleans())
    def test_garbage(self, data: bytes, size: int, magic: bool) -> None:
        """Whatever a file holds, the answer is a sentence, and little is read for it."""
        data = saved.MAGIC * magic + data
        try:
            beginning = begin(data[: saved.FIXED], size)
        except FileError as error:
            self.assertRegex(error.text, "^(it|its) ")
        else:
            self.assertLessEqual(beginning.size, saved.MAX_CONTENTS)
            self.assertRaises(FileError, finish, beginning, data[saved.FIXED :])

    def test_lengths_lie(self) -> None:
        """Sizes that no qmigd writes are refused before anything is read for them."""
        head, data = whole(HEAD)
        for at, form, value in (
            (16, "!I", 2**32 - 1),
            (16, "!I", saved.MAX_CONTENTS + 1),
            (16, "!I", head.offset),
            (16, "!I", 0),
            (24, "!Q", 2**64 - 1),
            (24, "!Q", 0),
            (24, "!Q", head.offset + 1),
            (32, "!Q", 2**64 - 1),
        ):
            bad = bytearray(data)
            struct.pack_into(form, bad, at, value)
            self.assertRaises(FileError, begin, bytes(bad[: saved.FIXED]), head.offset)

    def test_proved_nonsense(self) -> None:
        """Contents that are proved and make no sense are refused all the same."""
        for contents in (b"[]", b"{}", b'{"format":"zip"}', b"\xff\xff", b"[" * 40000):
            fixed = struct.pack("!12sHHIIQQ32s", saved.MAGIC, 1, 1, len(contents), 0, 65536, 0, b"")
            data = fixed + hashlib.sha256(fixed + contents).digest() + contents
            error = self.assertRaises(FileError, read, data, 65536)
            self.assertIn("its head makes no sense", error.text)

    def test_too_much_to_say(self) -> None:
        """A guest whose description has no room is refused when it is to be saved."""
        guest = {"name": "x" * saved.MAX_CONTENTS}
        error = self.assertRaises(FileError, offset_for, replace(HEAD, guest=guest))
        self.assertIn("has room for", error.text)

    def test_documented(self) -> None:
        """The example in the documentation is what is written, byte by byte."""
        _, data = whole(replace(HEAD, length=4096, checksum=bytes(range(32))))
        block = re.search(r"```text\n(0 .*?)```", _PAGE.read_text(), re.DOTALL)
        assert block is not None
        shown = re.sub(r"(?m)^[0-9]+ +|  .*$|\s", "", block[1])
        self.assertEqual(shown, data[: len(shown) // 2].hex())
        self.assertGreater(len(shown) // 2, saved.FIXED)


class ChecksumTests(SynchronousTestCase):
    def sum(self, data: bytes, *, offset: int = 0, holes: bool = False) -> bytes:
        path = Path(self.mktemp())
        with open(path, "wb") as file:
            file.truncate(offset + len(data))
            for at in range(0, len(data), 4096):
                piece = data[at : at + 4096]
                if not holes or any(piece):
                    os.pwrite(file.fileno(), piece, offset + at)
        descriptor = os.open(path, os.O_RDONLY)
        self.addCleanup(os.close, descriptor)
        return checksum(descriptor, offset, len(data), threading.Event())

    def test_documented(self) -> None:
        """It is SHA-256 over number and CRC-32 of each block that is not all zeros."""
        first, third = os.urandom(BLOCK), os.urandom(5000)
        entries = struct.pack("!QI", 0, zlib.crc32(first)) + struct.pack(
            "!QI", 2, zlib.crc32(third)
        )
        self.assertEqual(
            self.sum(first + bytes(BLOCK) + third, offset=4096), hashlib.sha256(entries).digest()
        )
        self.assertEqual(self.sum(b""), hashlib.sha256().digest())

    def test_holes(self) -> None:
        """A hole and zeros that were written come to the same, wherever they are."""
        some = bytearray(5 * BLOCK + 5000)
        some[BLOCK + 7000] = some[3 * BLOCK - 1] = 1
        data = bytes(some)
        self.assertEqual(self.sum(data, holes=True), self.sum(data))
        self.assertEqual(self.sum(data, offset=8192, holes=True), self.sum(data, offset=4096))
        some[-1] = 1
        data = bytes(some)
        self.assertEqual(self.sum(data, holes=True), self.sum(data))
        moved = bytes(BLOCK) + data[:-BLOCK]
        self.assertNotEqual(self.sum(moved), self.sum(data))

    def test_shorter(self) -> None:
        """A file that has become shorter meanwhile is no good."""
        path = Path(self.mktemp())
        path.write_bytes(b"x" * 100)
        descriptor = os.open(path, os.O_RDONLY)
        self.addCleanup(os.close, descriptor)
        self.assertRaises(FileError, checksum, descriptor, 0, 101, threading.Event())

    def test_stopped(self) -> None:
        """It ends when nobody wants it any more."""
        stop = threading.Event()
        stop.set()
        descriptor = os.open(__file__, os.O_RDONLY)
        self.addCleanup(os.close, descriptor)
        self.assertRaises(Stopped, checksum, descriptor, 0, 10, stop)


class DiskTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(self.mktemp()).absolute()
        self.directory.mkdir()
        self.path = self.directory / "saved"

    def new(self, *, replaced: bool = False) -> NewFile:
        file = NewFile(self.path, "1234", replace=replaced)
        self.addCleanup(file.close)
        return file

    def names(self) -> list[str]:
        return sorted(os.listdir(self.directory))

    def test_named_when_published(self) -> None:
        """It has its name only once it is published, and is gone if it never is."""
        file = self.new()
        self.assertEqual(self.names(), [".qmigd-1234.part"])
        file.publish()
        file.close()
        self.assertEqual(self.names(), ["saved"])
        self.path.unlink()
        self.new().close()
        self.assertEqual(self.names(), [])

    def test_never_replaced_unasked(self) -> None:
        """One of that name that comes meanwhile is not replaced, unless that was asked for."""
        file = self.new()
        self.path.write_text("mine")
        error = self.assertRaises(FileError, file.publish)
        self.assertIn("is there already", error.text)
        file.close()
        self.assertEqual((self.names(), self.path.read_text()), (["saved"], "mine"))
        self.new(replaced=True).publish()
        self.assertEqual(self.path.read_text(), "")

    def test_left_by_a_killed_daemon(self) -> None:
        """What was not finished is removed; what has its name stays, and so does the rest."""
        self.assertTrue(discard(str(self.new().temporary)))
        self.assertEqual(self.names(), [])
        self.path.write_text("mine")
        self.assertFalse(discard(f"{self.directory}/.qmigd-9.part"))
        discard(str(self.path))
        self.assertEqual(self.names(), ["saved"])
        # It died between giving it its name and taking away the other one.
        os.link(self.path, self.directory / ".qmigd-9.part")
        self.assertFalse(discard(f"{self.directory}/.qmigd-9.part"))
        self.assertEqual(self.names(), ["saved"])

    def test_unfinished(self) -> None:
        """One that was not finished cannot be restored, whatever it is called."""
        file = self.new()
        head = replace(HEAD, offset=offset_for(HEAD))
        file.write_head(head)
        file.publish()
        error = self.assertRaises(FileError, SavedFile, self.path)
        self.assertIn("never finished", error.text)
        file.write_head(head, complete=True)
        opened = SavedFile(self.path)
        self.assertEqual(opened.head, head)
        opened.close()

    def test_pipe(self) -> None:
        """A pipe without a writer does not keep anybody waiting."""
        os.mkfifo(self.path)
        error = self.assertRaises(FileError, SavedFile, self.path)
        self.assertIn("not a regular file", error.text)


class StreamTests(SynchronousTestCase):
    def out(self, data: bytes, *, packed: bool) -> int:
        """Pour data into a file, at 4096; returns its descriptor."""
        descriptor = os.open(self.mktemp(), os.O_RDWR | os.O_CREAT, 0o600)
        self.addCleanup(os.close, descriptor)
        ours, its = socket.socketpair()

        def feed() -> None:
            with its:
                its.sendall(data)

        feeder = threading.Thread(target=feed)
        feeder.start()
        with ours:
            pour_out(ours, descriptor, 4096, packed=packed, cpus=2)
        feeder.join()
        return descriptor

    def back(self, descriptor: int, *, packed: bool) -> bytes:
        ours, its = socket.socketpair()
        found = bytearray()

        def drain() -> None:
            while data := its.recv(1 << 20):
                found.extend(data)

        reader = threading.Thread(target=drain)
        reader.start()
        try:
            with ours:
                length = os.fstat(descriptor).st_size - 4096
                pour_in(descriptor, 4096, length, ours, packed=packed)
        finally:
            reader.join()
            its.close()
        return bytes(found)

    def test_back_and_forth(self) -> None:
        """What QEMU says is what it gets back, compressed meanwhile or not."""
        data = (os.urandom(5000) + bytes(400_000)) * 8
        for packed in (False, True):
            descriptor = self.out(data, packed=packed)
            self.assertEqual(self.back(descriptor, packed=packed), data)
        self.assertLess(os.fstat(descriptor).st_size, len(data) // 20)

    def test_cut(self) -> None:
        """Compressed data that was cut, or is none, is an error and not a short stream."""
        descriptor = self.out(os.urandom(300_000), packed=True)
        os.ftruncate(descriptor, 200_000)
        error = self.assertRaises(FileError, self.back, descriptor, packed=True)
        self.assertIn("cut", error.text)
        os.pwrite(descriptor, b"no zstd at all", 4096)
        error = self.assertRaises(FileError, self.back, descriptor, packed=True)
        self.assertIn("damaged", error.text)

    def test_bomb(self) -> None:
        """A small file that unpacks to very much takes no more memory than any other."""
        descriptor = self.out(bytes(64 << 20), packed=True)
        self.assertLess(os.fstat(descriptor).st_size, 100_000)
        ours, its = socket.socketpair()
        area = bytearray(1 << 20)
        drain = threading.Thread(target=lambda: all(iter(lambda: its.recv_into(area), 0)))
        drain.start()
        tracemalloc.start()
        try:
            with ours:
                length = os.fstat(descriptor).st_size - 4096
                pour_in(descriptor, 4096, length, ours, packed=True)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            drain.join()
            its.close()
        self.assertLess(most, 8 << 20)

    def test_full(self) -> None:
        """A file that cannot be written says why."""
        descriptor = os.open("/dev/full", os.O_WRONLY)
        self.addCleanup(os.close, descriptor)
        ours, its = socket.socketpair()
        its.sendall(b"x")
        with ours, its:
            error = self.assertRaises(
                FileError, pour_out, ours, descriptor, 0, packed=False, cpus=1
            )
        self.assertIn("No space left on device", error.text)
