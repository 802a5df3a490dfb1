"""The memory guest by itself: two of them, moved by QMP, without a daemon."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from typing import Any

from twisted.trial.unittest import TestCase

from qmigd.guests.process import look
from qmigd.stream import events
from qmigd.stream.reader import Reader
from tests.rig.daemons import free_ports
from tests.rig.memory import MemoryGuest, moved_whole
from tests.rig.qmp import QmpError
from tests.rig.users import locking

#: Bytes a second that are less than what a guest writes.
_SLOW = 8 << 20
_SMALL = ("-m", "32M", "-dirty-rate", "32M")
#: The same, full: moved slowly, it takes some seconds at least.
_FULL = (*_SMALL, "-fill", "random")


class MemoryCase(TestCase):
    def guest(self, name: str, *argv: str, before: Sequence[str] = ()) -> MemoryGuest:
        guest = MemoryGuest(name, argv, before=before)
        self.addCleanup(guest.close)
        return guest.launch()

    def pair(self, *argv: str, before: Sequence[str] = ()) -> tuple[MemoryGuest, MemoryGuest]:
        """:param before: what the source is started by."""
        argv = argv or _SMALL
        source = self.guest("source", *argv, before=before)
        destination = self.guest("destination", *argv, "-incoming", "defer")
        return source.wait(), destination.wait()

    def set(self, *guests: MemoryGuest, capabilities: tuple[str, ...], **parameters: Any) -> None:
        for guest in guests:
            guest.qmp(
                "migrate-set-capabilities",
                capabilities=[
                    {"capability": name, "state": True}
                    for name in ("events", "return-path", *capabilities)
                ],
            )
            if parameters:
                guest.qmp("migrate-set-parameters", **parameters)

    def begin(self, source: MemoryGuest, destination: MemoryGuest, uri: str = "") -> None:
        uri = uri or f"unix:{destination.directory}/stream"
        destination.qmp("migrate-incoming", {"uri": uri, "exit-on-error": False})
        source.qmp("migrate", uri=uri)


class MoveTests(MemoryCase):
    def move(self, *capabilities: str, uri: str = "", argv: Any = (), **parameters: Any) -> Any:
        """Move a guest by precopy, check it, and return the source's last word."""
        source, destination = self.pair(*argv)
        parameters.setdefault("max_bandwidth", 1 << 40)
        self.set(source, destination, capabilities=capabilities, **parameters)
        source.wait_ticks(5)
        self.begin(source, destination, uri)
        done = source.wait_migration("completed", "failed")
        self.assertEqual("completed", done["status"], done)
        destination.wait_migration("completed")
        there, here = source.ram(), destination.ram()
        untouched = len(there) // 2  # by the workload, which goes on over here
        self.assertEqual(there[:untouched], here[:untouched])
        moved_whole(source, destination)
        return done

    def test_one_channel(self) -> None:
        """Its RAM is right and it goes on counting where it stopped; holes cost next to nothing."""
        done = self.move()
        self.assertEqual(0, done["ram"]["multifd-bytes"])
        self.assertGreater(done["ram"]["duplicate"], 1000)
        self.assertLess(done["ram"]["transferred"], 24 << 20)

    def test_multifd_over_tcp(self) -> None:
        """Pages go over several channels, in packets; the downtime is within the limit."""
        done = self.move(
            "multifd",
            uri=f"tcp:127.0.0.1:{free_ports()[0]}",
            argv=("-m", "32M", "-dirty-rate", "16M", "-fill", "random", "-pattern", "random"),
            multifd_channels=3,
            downtime_limit=1000,
        )
        self.assertGreater(done["ram"]["multifd-bytes"], 32 << 20)
        self.assertLessEqual(done["downtime"], 1000)

    def test_compressed(self) -> None:
        """The channels of multifd compress with zlib and zstd."""
        for compression in ("zlib", "zstd"):
            argv = ("-m", "16M", "-dirty-rate", "4M")
            self.move("multifd", argv=argv, multifd_compression=compression)

    def test_zero_copy(self) -> None:
        """MSG_ZEROCOPY sends the right pages; what the kernel copied all the same is counted."""
        done = self.move(
            *("multifd", "zero-copy-send"),
            uri=f"tcp:127.0.0.1:{free_ports()[0]}",
            argv=("-m", "32M", "-dirty-rate", "64M", "-fill", "random"),
        )
        # On loopback the kernel always copies (Documentation/networking/msg_zerocopy.rst).
        self.assertGreater(done["ram"]["dirty-sync-missed-zero-copy"], 0)

    def test_zero_copy_without_locked_memory(self) -> None:
        """One that may lock nothing sends copies; qmigd sees beforehand that it may not."""
        argv = ("-m", "8M", "-dirty-rate", "1M", "-fill", "random")
        source, destination = self.pair(*argv, before=locking(0))
        found = look(source.process.pid, source.process.pid)
        assert found is not None
        self.assertEqual(0, found.memlock)
        self.set(source, destination, capabilities=("multifd", "zero-copy-send"))
        self.begin(source, destination, f"tcp:127.0.0.1:{free_ports()[0]}")
        done = source.wait_migration("completed", "failed")
        self.assertEqual("completed", done["status"], done)
        moved_whole(source, destination)

    def test_converges(self) -> None:
        """A guest that dirties more than can be sent is slowed down until it can be moved."""
        source, destination = self.pair("-m", "32M", "-dirty-rate", "64M")
        self.set(
            *(source, destination),
            capabilities=("auto-converge",),
            max_bandwidth=32 << 20,
            downtime_limit=100,
            cpu_throttle_initial=50,
            cpu_throttle_increment=49,
        )
        source.wait_ticks(20)
        self.begin(source, destination)
        throttled = False
        while not throttled:
            shown = source.qmp("query-migrate")
            self.assertIn(shown["status"], ("setup", "active"))
            throttled = shown.get("cpu-throttle-percentage", 0) >= 50
        source.wait_migration("completed")
        moved_whole(source, destination)

    def test_postcopy(self) -> None:
        """The guest goes first, and gets each page that it asks for; with all kinds of channels."""
        for capabilities in (
            ("postcopy-ram",),
            ("postcopy-ram", "postcopy-preempt"),
            ("postcopy-ram", "postcopy-preempt", "multifd"),
        ):
            argv = ["-m", "16M", "-dirty-rate", "64M", "-fill", "random", "-pattern", "random"]
            if "postcopy-preempt" in capabilities:
                argv.append("-mem-prealloc")  # what has not come is a fault nevertheless
            source, destination = self.pair(*argv)
            self.set(
                *(source, destination),
                capabilities=capabilities,
                max_bandwidth=_SLOW,
                max_postcopy_bandwidth=8 * _SLOW,
            )
            self.begin(source, destination)
            source.wait_migration("active")
            source.qmp("migrate-start-postcopy")
            done = source.wait_migration("completed", "failed", "postcopy-paused")
            self.assertEqual("completed", done["status"], done)
            self.assertGreater(done["ram"]["postcopy-requests"], 0)
            self.assertGreater(destination.qmp("query-faults")["count"], 0)
            destination.wait_migration("completed")
            moved_whole(source, destination)

    def test_paused(self) -> None:
        """A guest that was stopped stays stopped at the other side."""
        source, destination = self.pair()
        self.set(source, destination, capabilities=())
        source.qmp("stop")
        self.begin(source, destination)
        source.wait_migration("completed")
        destination.wait_migration("completed")
        self.assertEqual("paused", destination.status())
        self.assertEqual(source.ram(), destination.ram())
        destination.check()


class FailureTests(MemoryCase):
    def goes_on(self, source: MemoryGuest) -> None:
        """It runs at the source, with all its RAM."""
        self.assertEqual("running", source.status())
        source.wait_ticks(2)
        source.check()

    def test_cancelled(self) -> None:
        """A move that is cancelled leaves the guest where it is, and another one can follow."""
        source, destination = self.pair(*_FULL)
        self.set(source, destination, capabilities=(), max_bandwidth=_SLOW)
        self.begin(source, destination)
        source.wait_migration("active")
        source.qmp("migrate_cancel")
        source.wait_migration("cancelled")
        failed = destination.wait_migration("failed")
        self.assertIn("load of migration failed", failed["error-desc"])
        self.goes_on(source)
        again = self.guest("again", *_FULL, "-incoming", "defer").wait()
        self.set(source, again, capabilities=(), max_bandwidth=1 << 40)
        self.begin(source, again)
        source.wait_migration("completed")
        moved_whole(source, again)

    def test_destination_killed(self) -> None:
        """A destination that dies in precopy is noticed, and the guest goes on."""
        source, destination = self.pair(*_FULL)
        self.set(source, destination, capabilities=(), max_bandwidth=_SLOW)
        self.begin(source, destination)
        source.wait_migration("active")
        destination.process.kill()
        self.assertIn("broke", source.wait_migration("failed")["error-desc"])
        self.goes_on(source)

    def test_broken_in_postcopy(self) -> None:
        """A stream that breaks in postcopy lets neither side go on alone."""
        source, destination = self.pair(*_FULL)
        self.set(
            *(source, destination),
            capabilities=("postcopy-ram",),
            max_bandwidth=_SLOW,
            max_postcopy_bandwidth=1 << 20,
        )
        self.begin(source, destination)
        source.wait_migration("active")
        source.qmp("migrate-start-postcopy")
        source.wait_migration("postcopy-active")
        source.qmp("migrate_cancel")
        source.wait_migration("postcopy-paused")
        destination.wait_migration("postcopy-paused")
        with self.assertRaisesRegex(QmpError, "just being completed"):
            source.qmp("cont")
        self.assertFalse(source.clock()["running"])

    def test_another_guest(self) -> None:
        """What does not fit is refused with what is wrong; the process ends if it is to."""
        source = self.guest("source", *_SMALL)
        uri = f"unix:{source.directory}/stream"
        destination = self.guest("destination", "-m", "16M", "-incoming", uri).wait()
        source.wait()
        self.set(source, capabilities=())
        source.qmp("migrate", uri=uri)
        source.wait_migration("failed")
        self.goes_on(source)
        self.assertEqual(1, destination.process.wait())
        self.assertIn("the guest has the RAM blocks", destination.log)

    def test_refused(self) -> None:
        """What makes no sense is refused as a QEMU would refuse it."""
        source, destination = self.pair()
        for guest, command, arguments, words in (
            (source, "migrate", {"uri": "exec:cat"}, "cannot migrate over exec"),
            (source, "migrate-incoming", {"uri": "tcp::1"}, "was not specified"),
            (source, "migrate-start-postcopy", {}, "must be started before"),
            (source, "migrate-set-parameters", {"downtime-limit": -1}, "expects a value from"),
            (source, "migrate-set-parameters", {"nothing": 1}, "is unexpected"),
            (destination, "migrate", {"uri": "unix:/nowhere"}, "waiting for an incoming"),
            (destination, "migrate-incoming", {"uri": "unix:/nowhere/x"}, "Failed to listen"),
            (destination, "quite", {}, "has not been found"),
        ):
            with self.assertRaisesRegex(QmpError, words):
                guest.qmp(command, arguments)


class StreamTests(MemoryCase):
    def test_readable(self) -> None:
        """Its stream is QEMU's format: a reader that does not know it finds everything."""
        source = self.guest(
            "source", "-m", "8M", "-dirty-rate", "1M", "-fill", "random", "-S"
        ).wait()
        self.set(source, capabilities=())
        path = f"{source.directory}/stream"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        received = bytearray()

        def take() -> None:
            connection, _ = listener.accept()
            with connection:
                # The answer to the ping, and that all is well.
                connection.sendall(bytes.fromhex("00020004000000010001000400000000"))
                while data := connection.recv(1 << 16):
                    received.extend(data)

        thread = threading.Thread(target=take)
        thread.start()
        source.qmp("migrate", uri=f"unix:{path}")
        source.wait_migration("completed")
        thread.join()
        listener.close()
        reader = Reader()
        found = [*reader.feed(received), *reader.close()]
        kinds = {type(event) for event in found}
        for kind in (events.Header, events.Configuration, events.RamBlocks, events.Description):
            self.assertIn(kind, kinds)
        ram = bytearray(8 << 20)
        for event in found:
            if isinstance(event, events.Pages):
                for offset, page in zip(event.offsets.tolist(), event.data, strict=True):
                    ram[offset : offset + len(page)] = page.tobytes()
        self.assertEqual(source.ram(), ram)
