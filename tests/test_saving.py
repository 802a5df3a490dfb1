"""Guests that are saved into files and restored: real QEMUs, daemons as processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.rig.files import SLOWLY, FileCase, small_disk
from tests.rig.news import ask_until
from tests.rig.pair import NAME, Pair, same_ram, settings_of
from tests.rig.proofs import counted_without_a_gap, only_one_runs
from tests.rig.qemus import require
from tests.rig.qmp import QmpError


class JourneyTests(FileCase):
    """Out of one QEMU into a file, and out of the file into another QEMU."""

    def check(self, source: str, destination: str, wanted: str | None, format: str) -> None:
        pair = self.files(source, destination)
        pair.source.wait_ticks(2)
        saved = self.done(pair, "save", **({"format": wanted} if wanted else {}))
        self.assertEqual(saved["file"]["format"], format)
        features = ["mapped-ram", "multifd"] if format == "mapped-ram" else []
        self.assertEqual(saved["file"]["features"], features)
        self.assertEqual(saved["file"]["size"], os.stat(self.path).st_size)
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        self.assertGreater(saved["ram"]["transferred"], 1 << 20)
        self.assertEqual(pair.source.status(), "postmigrate")
        self.assertEqual(self.left(), [os.path.basename(self.path)])
        pair.prove_settings()
        self.check_inspected(pair, format, features)
        restored = self.done(pair, "restore")
        self.assertEqual(restored["file"]["format"], format)
        pair.prove_moved()

    def check_inspected(self, pair: Pair, format: str, features: list[str]) -> None:
        """Let qmigctl say what is in the file."""
        command = "from qmigd.cli.main import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", command, "inspect", "--json", self.path],
            capture_output=True,
            check=True,
        )
        answer = json.loads(done.stdout)
        self.assertTrue(answer["complete"])
        self.assertEqual(format, answer["saved"]["format"])
        self.assertEqual(NAME, answer["saved"]["guest"]["name"])
        self.assertLessEqual({*features}, {*answer["capabilities"]})
        (ram, *_) = answer["ram"]["blocks"]
        self.assertEqual(("pc.ram", pair.source.memory), (ram["name"], ram["length"]))
        self.assertGreater(ram["pages"]["normal"], pair.source.program.pages)
        fields = {device["name"]: device["fields"] for device in answer["devices"]}
        self.assertEqual(16, len(fields["cpu"]["env.regs"]))

    def test_mapped_10_11(self) -> None:
        """Mapped RAM out of QEMU 10.0 into QEMU 11."""
        self.check("10.0", "11", None, "mapped-ram")

    def test_mapped_11_10(self) -> None:
        """Mapped RAM out of QEMU 11 into QEMU 10.0."""
        self.check("11", "10.0", "mapped-ram", "mapped-ram")

    def test_stream_7_11(self) -> None:
        """QEMU 11 takes the stream of QEMU 7.2."""
        self.check("7.2", "11", None, "stream")

    def test_stream_10_7(self) -> None:
        """QEMU 7.2 takes the stream of QEMU 10.0."""
        self.check("10.0", "7.2", "stream", "stream")

    def test_zstd_7_10(self) -> None:
        """A compressed stream out of QEMU 7.2 into QEMU 10.0."""
        self.check("7.2", "10.0", "zstd", "zstd")

    def test_zstd_11_7(self) -> None:
        """A compressed stream out of QEMU 11 into QEMU 7.2."""
        self.check("11", "7.2", "zstd", "zstd")


class AfterTests(FileCase):
    """What becomes of a guest that was saved."""

    def test_paused(self) -> None:
        """A guest that was paused is paused when it is restored, every byte as it was."""
        pair = self.files("10.0", policy={"exclude": ["multifd"]})
        pair.source.qmp("stop")
        saved = self.done(pair, "save")
        self.assertEqual(saved["file"]["features"], ["mapped-ram"])
        restored = self.done(pair, "restore")
        self.assertIn("paused", restored["step"])
        self.assertEqual(pair.destination.status(), "paused")
        same_ram(pair.source, pair.destination, everything=True)
        self.assertEqual(pair.destination.lines, [])
        pair.destination.qmp("cont")
        only_one_runs(pair.destination, pair.source)
        counted_without_a_gap(pair.source, pair.destination)

    def check_snapshot(self, label: str, *, live: bool, format: str) -> None:
        pair = self.files(label)
        done = self.done(pair, "save", after="continue", live=live, format=format)
        self.assertIn("goes on", done["step"])
        pair.source.wait_ticks(3)
        pair.source.check_ram()
        pair.prove_settings()
        self.assertTrue(pair.source.running())
        before = {line.tick for line in pair.source.lines}
        pair.source.close()
        self.done(pair, "restore")
        pair.destination.wait_ticks(3)
        pair.destination.check_ram()
        first = pair.destination.lines[0].tick
        # It goes on where it was saved, which the source has passed.
        self.assertTrue({first, first - 1} & before, (first, before))
        counted_without_a_gap(pair.destination)

    def test_continue(self) -> None:
        """A guest that is to go on has stood still only as long as QEMU needed."""
        self.check_snapshot("7.2", live=False, format="stream")

    def test_live(self) -> None:
        """A guest that writes to its RAM while that is saved is whole in the file."""
        self.check_snapshot("11", live=True, format="mapped-ram")

    def test_quit(self) -> None:
        """With ``quit`` its QEMU ends, once the file has its name; one of that name may go."""
        pair = self.files("10.0")
        Path(self.path).write_text("an older file")
        self.done(pair, "save", after="quit", replace=True, checksum=False)
        pair.source.process.wait()
        self.done(pair, "restore")
        pair.destination.wait_ticks(2)
        pair.destination.check_ram()

    def test_direct(self) -> None:
        """With the tunable ``direct-io`` QEMU goes past the page cache, and gets what it wants."""
        pair = self.files("10.0")
        self.done(pair, "save", tunables={"direct-io": True, "multifd-channels": "3"})
        self.done(pair, "restore", tunables={"direct-io": True, "multifd-channels": 2})
        pair.prove_moved()

    def test_launched(self) -> None:
        """A QEMU that the daemon starts itself takes the guest as well."""
        self.path = os.path.abspath(self.mktemp())
        pair = self.pair("7.2", launch=True).start(launched=True)
        self.done(pair, "save")
        self.begin(pair, "restore")
        pair.destination.wait_for_monitor()
        self.over(pair, "restore")
        pair.prove_moved()


class BrokenTests(FileCase):
    """Whatever breaks while a guest is being saved: it runs on, and there is no file."""

    def prove_unsaved(self, pair: Pair) -> None:
        pair.source.wait_running()
        self.assertEqual(self.left(), [])
        pair.wait_settings(pair.source)
        only_one_runs(pair.source, pair.destination, ticks=3)
        counted_without_a_gap(pair.source)
        pair.source.check_ram()

    def check_full(self, label: str, **arguments: Any) -> None:
        os.mkdir(directory := os.path.abspath(self.mktemp()))
        pair = self.pair(label)
        pair.here = self.daemon(
            "on a small disk",
            guests={NAME: {"qmp": f"unix:{pair.source.qmp_path}"}},
            prefix=small_disk(directory, "3m"),
        )
        pair.start()
        self.path = f"{directory}/saved"
        self.failed(pair, "save", "No space left on device", **arguments)
        seen = f"/proc/{pair.here.process.pid}/root{directory}"
        self.assertEqual(os.listdir(seen), [])
        self.prove_unsaved(pair)
        # And to a larger disk it can be saved.
        self.path = os.path.abspath(self.mktemp())
        self.done(pair, "save")
        self.done(pair, "restore")
        pair.prove_moved()

    def test_full_mapped(self) -> None:
        """A disk that is full while QEMU itself writes."""
        self.check_full("10.0")

    def test_full_stream(self) -> None:
        """A disk that is full while qmigd writes for QEMU 7.2, which could not say so."""
        self.check_full("7.2", live=True)

    def check_cancel(self, label: str, **arguments: Any) -> None:
        pair = self.files(label)
        self.begin(pair, "save", tunables={"max-bandwidth": SLOWLY}, **arguments)
        pair.wait(pair.here, "active")
        self.assertEqual(len(self.left()), 1)
        pair.cancel()
        self.over(pair, "save", "cancelled")
        self.prove_unsaved(pair)

    def test_cancel_mapped(self) -> None:
        """The user cancels while QEMU writes; the guest had been stopped."""
        self.check_cancel("11")

    def test_cancel_zstd(self) -> None:
        """The user cancels while qmigd compresses; the guest had been running."""
        self.check_cancel("7.2", format="zstd", live=True)

    def test_daemon_killed(self) -> None:
        """A daemon that is killed lets the guest run on when it is started again."""
        pair = self.files("10.0")
        self.begin(pair, "save", tunables={"max-bandwidth": SLOWLY})
        pair.wait(pair.here, "active")
        pair.here.kill()
        pair.here.start()
        self.prove_unsaved(pair)

    def test_name_taken(self) -> None:
        """A file of that name that comes meanwhile stays, and the guest, saved by then, runs on."""
        pair = self.files("11")
        self.begin(pair, "save", tunables={"max-bandwidth": SLOWLY})
        pair.wait(pair.here, "active")
        Path(self.path).write_text("mine")
        pair.set(max_bandwidth=1 << 30)
        self.assertIn("is there already", pair.failed(pair.here))
        self.assertEqual(Path(self.path).read_text(), "mine")
        Path(self.path).unlink()
        self.prove_unsaved(pair)

    def test_daemon_stopped(self) -> None:
        """A daemon that is told to end lets the guest run on before it does."""
        pair = self.files("7.2")
        self.begin(pair, "save", tunables={"max-bandwidth": SLOWLY})
        pair.wait(pair.here, "active")
        pair.here.stop()
        self.assertIn("qmigd is being stopped; the guest goes on here", pair.here.log)
        self.prove_unsaved(pair)

    def test_daemon_killed_restoring(self) -> None:
        """A guest that QEMU had read to the end runs when the daemon is started again."""
        pair = self.files("10.0")
        self.done(pair, "save")
        self.done(pair, "restore")
        pair.there.kill()
        pair.destination.qmp("stop")
        changed = {"name": "multifd", "was": settings_of(pair.destination)["multifd"]}
        pair.destination.set_capabilities("multifd", on=not changed["was"])
        entry = {
            "migration": pair.id,
            "role": "destination",
            "guest": NAME,
            "qmp": f"unix:{pair.destination.qmp_path}",
            "peer": f"file:{self.path}",
            "stage": "receiving",
            "file": self.path,
            "run": True,
            "capabilities": {"multifd": changed["was"]},
            "parameters": {},
        }
        journal = Path(pair.there.config["daemon"]["state-dir"]) / "migrations"
        (journal / f"{pair.id}.destination.jsonl").write_text(json.dumps(entry) + "\n")
        pair.there.start()
        pair.destination.wait_running()
        pair.wait_settings(pair.destination)
        pair.prove_moved()

    def test_both_killed(self) -> None:
        """What a crash of the host leaves is removed when the daemon is there again."""
        pair = self.files("7.2")
        self.begin(pair, "save", tunables={"max-bandwidth": SLOWLY})
        pair.wait(pair.here, "active")
        pair.here.kill()
        pair.source.kill()
        self.assertEqual(len(self.left()), 1)
        pair.here.start()
        ask_until(lambda: pair.here.execute("query-version") and not self.left(), "the file to go")

    def test_qemu_hangs(self) -> None:
        """A QEMU that does not answer gets its guest back when it does, however late."""
        pair = self.files("10.0", here={"guest_deadline": 0.5})
        self.begin(pair, "save", tunables={"max-bandwidth": SLOWLY})
        pair.wait(pair.here, "active")
        pair.source.process.signal(signal.SIGSTOP)
        entry = self.over(pair, "save", "failed")
        self.assertIn("goes on waiting", entry["step"])
        self.assertEqual(self.left(), [])
        pair.source.process.signal(signal.SIGCONT)
        self.prove_unsaved(pair)

    def test_qemu_killed(self) -> None:
        """A QEMU that dies takes its guest along, but leaves no half of it behind."""
        pair = self.files("7.2")
        self.begin(pair, "save", tunables={"max-bandwidth": SLOWLY})
        pair.wait(pair.here, "active")
        pair.source.kill()
        self.over(pair, "save", "failed")
        self.assertEqual(self.left(), [])


class RefusalTests(FileCase):
    """What cannot be: a sentence, and neither the guest nor the QEMU that waits is touched."""

    def refused(self, pair: Pair, command: str, *words: str, **arguments: Any) -> None:
        arguments = {"guest": NAME, "file": self.path, **arguments}
        daemon = self.side(pair, command)
        error = self.assertRaises(QmpError, daemon.execute, command, arguments)
        for word in words:
            self.assertIn(word, error.text)
        self.assertNotIn("Traceback", daemon.log)

    def test_save(self) -> None:
        """Before the guest is touched: places, formats, tunables, guests."""
        pair = self.files("10.0", "7.2")
        there = os.path.dirname(self.path)
        Path(self.path).write_text("mine")
        wrong: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
            ({}, ("is there already", "replaced")),
            ({"file": there}, ("not a regular file",)),
            ({"file": "saved"}, ("absolute path",)),
            ({"file": f"{there}/no/saved"}, (f"no directory {there}/no",)),
            ({"file": "/proc/saved"}, ("/proc",)),
            ({"file": f"{there}/x", "format": "zip"}, ("'mapped-ram', 'stream', 'zstd'",)),
            (
                {"file": f"{there}/x", "format": "zstd", "tunables": {"multifd-channels": 4}},
                ("'multifd-channels' means nothing", "zstd"),
            ),
            (
                {"file": f"{there}/x", "format": "stream", "tunables": {"direct-io": True}},
                ("'direct-io' means nothing",),
            ),
            (
                {"file": f"{there}/x", "tunables": {"multifd-compression": "zstd"}},
                ("does not go with mapped-ram", "format zstd"),
            ),
            ({"file": f"{there}/x", "tunables": {"multifd": True}}, ("feature",)),
            ({"file": f"{there}/x", "guest": "vn"}, ("no guest 'vn'", NAME)),
        )
        for arguments, words in wrong:
            self.refused(pair, "save", *words, **arguments)
        self.assertEqual(Path(self.path).read_text(), "mine")
        self.assertEqual(pair.here.execute("query-migrate"), [])
        arguments = {"guest": NAME, "file": f"{there}/x", "format": "mapped-ram"}
        pair.listen(pair.there)
        error = self.assertRaises(QmpError, pair.there.execute, "save", arguments)
        self.assertIn("waits for a migration itself", error.text)
        pair.prove_stayed()

    def test_restore(self) -> None:
        """A file that is none, cut, unfinished, or damaged; then the good one, into that QEMU."""
        pair = self.files("10.0")
        self.refused(pair, "restore", "No such file")
        self.done(pair, "save")
        good, self.path = self.path, os.path.abspath(self.mktemp())
        data = Path(good).read_bytes()
        there = os.path.dirname(self.path)
        self.refused(pair, "restore", "not a regular file", file=there)
        self.refused(pair, "restore", "does not begin with QMIGD-SAVED", file="/bin/sh")
        for change, words in (
            (b"", "does not begin with"),
            (data[:50], "it is cut"),
            (data[:-1], "it was cut"),
            (data + b"x", "something was added"),
            (data[:14] + b"\0\0" + data[16:], "never finished"),
            (data[:12] + b"\0\2" + data[14:], "version 2"),
            (data[:16] + b"\xff" * 4 + data[20:], "damaged"),
            (data[:200] + b"!" + data[201:], "checksum is wrong"),
        ):
            Path(self.path).write_bytes(change)
            self.refused(pair, "restore", words)
        at = next(at for at in range(len(data) - 4096, 0, -4096) if any(data[at : at + 4096]))
        byte = bytes([data[at + 100] ^ 1])
        Path(self.path).write_bytes(data[: at + 100] + byte + data[at + 101 :])
        self.failed(pair, "restore", "checksum of what was saved is wrong")
        self.assertEqual(pair.destination.status(), "inmigrate")
        self.path = good
        self.refused(pair, "restore", "no guest 'vn'", guest="vn")
        self.done(pair, "restore")
        pair.prove_moved()
        self.failed(pair, "restore", "does not wait to be restored, it is running")
        self.assertTrue(pair.destination.running())

    def test_other_guest(self) -> None:
        """QEMU 7.2 has no mapped RAM; and another guest is told before any RAM is read."""
        pair = self.files("7.2")
        pair.destination.close()
        self.refused(
            pair, "save", "guest vm has no mapped-ram", "format stream", format="mapped-ram"
        )
        self.done(pair, "save")
        pair.destination = self.waiting_guest("7.2", memory=48, machine="pc-i440fx-7.1").start()
        pair.there.config["guest"][NAME] = {"qmp": f"unix:{pair.destination.qmp_path}"}
        pair.there.restart()
        entry = self.failed(pair, "restore", "the machine type is", "the memory is", "no RAM")
        self.assertNotIn("ram", entry)
        self.assertEqual(pair.destination.status(), "inmigrate")

    def test_old_qemu(self) -> None:
        """QEMU 7.2 reads no mapped RAM, and ends with a stream that it cannot load."""
        pair = self.files("10.0", "7.2")
        self.done(pair, "save", after="continue")
        self.failed(pair, "restore", "guest vm has no mapped-ram", "into a newer one")
        self.assertEqual(pair.destination.status(), "inmigrate")
        self.done(pair, "save", format="zstd", checksum=False, replace=True)
        data = bytearray(Path(self.path).read_bytes())
        data[-3000] ^= 0xFF
        Path(self.path).write_bytes(data)
        entry = self.failed(pair, "restore", "the file is damaged")
        self.assertIn("ended", entry["step"])
        pair.destination.process.wait()
        self.assertEqual(pair.destination.lines, [])

    def test_cancel_restore(self) -> None:
        """A restore that is cancelled before RAM is read leaves the QEMU waiting."""
        pair = self.files("7.2")
        self.done(pair, "save")
        pair.destination.process.signal(signal.SIGSTOP)
        self.begin(pair, "restore")
        pair.there.execute("migrate-cancel", guest=NAME)
        pair.destination.process.signal(signal.SIGCONT)
        self.over(pair, "restore", "cancelled")
        self.assertEqual(pair.destination.status(), "inmigrate")
        before = settings_of(pair.destination)
        self.done(pair, "restore")
        self.assertEqual(settings_of(pair.destination), before)
        pair.prove_moved()


class QemuTests(FileCase):
    """What QEMU alone does with a file that it is given: why qmigd goes between."""

    def test_no_file(self) -> None:
        """QEMU 11 takes no file as ``fd:``."""
        guest = self.guest(require("11")).start()
        with socket.socket(socket.AF_UNIX) as monitor, open(self.mktemp(), "wb") as file:
            monitor.connect(guest.qmp_path)
            said = monitor.makefile("rb")
            said.readline()
            answer: dict[str, Any] = {}
            for command, arguments, descriptors in (
                ("qmp_capabilities", {}, []),
                ("getfd", {"fdname": "file"}, [file.fileno()]),
                ("migrate", {"uri": "fd:file"}, []),
            ):
                message = json.dumps({"execute": command, "arguments": arguments})
                socket.send_fds(monitor, [message.encode()], descriptors)
                answer = json.loads(said.readline())
        self.assertIn("error", answer)
        self.assertTrue(guest.running())
