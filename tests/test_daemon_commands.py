"""The daemon's commands with real QEMUs: what they answer, and how they refuse."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import uuid
from typing import Any

from qmigd.cli.options import Exit
from tests.rig.daemons import free_ports
from tests.rig.pair import FEATURES, KNOWN, NAME, SLOW, Pair, PairCase, start
from tests.rig.qemus import LABELS, require
from tests.rig.qmp import QmpClient, QmpError


class RefusalTests(PairCase):
    """Moves that cannot begin: a clear sentence, soon, and no guest touched."""

    def setUp(self) -> None:
        """Give every refusal a pair with deadlines short enough to be waited for."""
        self.deadlines = {"handshake_deadline": 2.0, "guest_deadline": 2.0}

    def small(self, **options: Any) -> Pair:
        return self.pair("7.2", here=self.deadlines, there=self.deadlines, **options)

    def check_nothing_moved(self, pair: Pair) -> None:
        """Check that not one byte of RAM has been moved, and that nothing is set."""
        for guest in (pair.source, pair.destination):
            if guest.alive:
                self.assertEqual(guest.migration(), "none")
        pair.prove_stayed()

    def refused(self, pair: Pair, *words: str) -> dict[str, str]:
        """Begin a move that has to fail without anything being moved; returns the error."""
        pair.begin("direct")
        reason = pair.failed(pair.here)
        for word in words:
            self.assertIn(word, reason)
        entry = pair.entry(pair.here)
        self.assertNotIn("ram", entry)
        self.assertEqual(entry["owner"], "source")
        self.check_nothing_moved(pair)
        error: dict[str, str] = entry["error"]
        return error

    def test_unknown_guest(self) -> None:
        """A guest that nobody knows is refused with the nearest names."""
        daemon = self.daemon(guests={"web1": {"qmp": "unix:/nowhere/qmp"}}).start()
        for command, arguments in (
            ("migrate", {"guest": "web2", "uri": "tcp:127.0.0.1:1"}),
            ("query-features", {"guest": "web2"}),
            ("query-tunables", {"guest": "web2"}),
            ("query-migrate", {"guest": "web2"}),
            ("migrate-start-postcopy", {"guest": "web2"}),
            ("migrate-cancel", {"guest": "web2"}),
            ("migrate-set-parameters", {"guest": "web2", "tunables": {}}),
            ("guest-remove", {"name": "web2"}),
        ):
            error = self.assertRaises(QmpError, daemon.execute, command, arguments)
            self.assertIn("no guest 'web2'", error.text, command)
            self.assertIn("web1", error.text)

    def test_no_migration(self) -> None:
        """What is about a migration is refused where there is none."""
        pair = self.small().start()
        for command, arguments in (
            ("migrate-start-postcopy", {}),
            ("migrate-cancel", {}),
            ("migrate-set-parameters", {"tunables": {"max-bandwidth": 1}}),
        ):
            error = self.assertRaises(
                QmpError, pair.here.execute, command, {"guest": NAME, **arguments}
            )
            self.assertIn("not being migrated", error.text)
        error = self.assertRaises(QmpError, pair.here.execute, "query-migrate", id="x")
        self.assertIn("no migration x", error.text)

    def test_wrong_arguments(self) -> None:
        """Wrong tunables, features and addresses are refused before anything begins."""
        pair = self.small().start()
        for words, arguments in (
            (("multifd", "feature", "negotiated"), {"tunables": {"multifd": True}}),
            (("tls-creds", "feature 'tls'", "negotiated"), {"tunables": {"tls-creds": "tls0"}}),
            (("max-bandwith", "max-bandwidth"), {"tunables": {"max-bandwith": 1}}),
            (("max-bandwidth", "fast"), {"tunables": {"max-bandwidth": "fast"}}),
            (("multifdd", "multifd"), {"prefer": ["multifdd"]}),
            (("hand-over", "handover"), {"require": ["hand-over"]}),
            (("multifd",), {"require": ["multifd"], "exclude": ["multifd"]}),
            (("127.0.0.1",), {"uri": "127.0.0.1:16516"}),
            (("tcp",), {"uri": "tcp:127.0.0.1:99999999"}),
        ):
            error = self.assertRaises(
                QmpError,
                pair.here.execute,
                "migrate",
                {"guest": NAME, "uri": pair.there.uri, **arguments},
            )
            for word in words:
                self.assertIn(word, error.text)
        self.assertEqual(pair.here.execute("query-migrate"), [])
        # The guest is free again.
        pair.move("direct")
        pair.prove_moved()
        for daemon in (pair.here, pair.there):
            for said in ("begins", "has completed"):
                self.assertRegex(daemon.log, f"migration {pair.id} of guest {NAME} .*{said}")
            self.assertNotIn("Factory object", daemon.log)

    def test_no_peer(self) -> None:
        """A port where nobody listens is named in the error."""
        pair = self.small().start()
        pair.begin("direct", uri=f"tcp:127.0.0.1:{free_ports()[0]}")
        self.assertIn("127.0.0.1", pair.failed(pair.here))
        self.assertEqual(pair.entry(pair.here)["error"]["class"], "peer-gone")
        self.check_nothing_moved(pair)

    def test_silent_peer(self) -> None:
        """One who accepts and says nothing is given up after the handshake's deadline."""
        pair = self.small().start()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            pair.begin("direct", uri=f"tcp:127.0.0.1:{listener.getsockname()[1]}")
            self.assertIn("has not greeted", pair.failed(pair.here))
        self.assertEqual(pair.entry(pair.here)["error"]["class"], "no-greeting")
        self.check_nothing_moved(pair)

    def test_other_protocol(self) -> None:
        """One who speaks something else is told from a qmigd."""
        pair = self.small().start()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            pair.begin("direct", uri=f"tcp:127.0.0.1:{listener.getsockname()[1]}")
            with listener.accept()[0] as connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")
                self.assertIn("SSH", pair.failed(pair.here))
        self.check_nothing_moved(pair)

    def test_peer_cancels(self) -> None:
        """One who ends it because its user wants that has cancelled it; it did not fail."""
        pair = self.small().start()
        self.check_said(pair, "cancelled", b"\0\1\0\0\0\x10\x09cancelledenough", "enough")
        self.check_said(pair, "failed", b"\0\1\0\0\0\x0c\x04fullno room", "no room")
        # What is no message at all, right behind a good greeting.
        self.check_said(pair, "failed", b"\xff" * 6, "message")
        self.check_nothing_moved(pair)

    def check_said(self, pair: Pair, status: str, said: bytes, words: str) -> None:
        """Begin a move to one who says that right behind its greeting."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            pair.begin("relay", uri=f"tcp:127.0.0.1:{listener.getsockname()[1]}")
            with listener.accept()[0] as connection:
                connection.sendall(b"QEMU-MIGRATE\1\1\0\0\0\1\7multifd" + said)
                event = pair.wait(pair.here, status)
        self.assertIn(words, event.data["error"]["desc"])

    def test_guest_not_there(self) -> None:
        """A destination that does not know the guest says which ones it knows."""
        pair = self.small()
        pair.there.config["guest"] = {"other": pair.there.config["guest"][NAME]}
        self.refused(pair.start(), f"'{NAME}'", "other")

    def test_guest_that_waits_by_itself(self) -> None:
        """A QEMU that was told on its command line where to wait is left to wait there."""
        for label in LABELS:
            pair = self.pair(label, here=self.deadlines, there=self.deadlines)
            pair.destination = self.noisy_guest(label, "waits", incoming="tcp:127.0.0.1:0")
            pair.there.config["guest"][NAME] = {"qmp": f"unix:{pair.destination.qmp_path}"}
            pair.start().begin("direct")
            reason = pair.failed(pair.here)
            self.assertIn("the destination says: guest vm does not wait for a migration", reason)
            self.assertIn("waits for a stream by itself", reason)
            self.assertEqual(pair.destination.status(), "inmigrate")
            pair.prove_stayed()

    def test_guest_not_waiting(self) -> None:
        """A destination whose QEMU runs a guest does not take another one in."""
        pair = self.small()
        pair.destination = self.noisy_guest("7.2", "destination")
        pair.there.config["guest"][NAME] = {"qmp": f"unix:{pair.destination.qmp_path}"}
        pair.start()
        pair.begin("direct")
        self.assertIn("-incoming defer", pair.failed(pair.here))
        for guest in (pair.source, pair.destination):
            self.assertEqual(guest.migration(), "none")
            guest.wait_ticks(3)
        pair.prove_settings()

    def test_source_waits_itself(self) -> None:
        """A source whose QEMU waits for a guest has nothing that could be moved."""
        pair = self.small()
        pair.source.close()
        pair.source = self.waiting_guest("7.2", "source")
        pair.here.config["guest"][NAME] = {"qmp": f"unix:{pair.source.qmp_path}"}
        pair.start()
        pair.begin("direct")
        self.assertIn("waits for a migration itself", pair.failed(pair.here))

    def test_moved_twice(self) -> None:
        """What was moved away cannot be moved again from here."""
        pair = self.small().start()
        pair.move("direct")
        pair.begin("direct")
        self.assertIn("moved away already", pair.failed(pair.here))
        only = pair.destination
        only.wait_ticks(2)

    def test_preflight(self) -> None:
        """A destination that differs is refused in a moment, with what it is that differs."""
        pair = self.small()
        del pair.there.config["guest"]
        start(pair.here, pair.there, pair.source)
        for words, options in (
            (("memory", str(32 << 20), str(48 << 20)), {"memory": 48}),
            (("pc-i440fx-7.2", "pc-i440fx-7.1"), {"machine": "pc-i440fx-7.1"}),
            (("virtio-rng-pci",), {"extra": ("-device", "virtio-rng-pci,id=rng")}),
            (("CPU",), {"extra": ("-smp", "2")}),
            (("UUID",), {"identity": uuid.uuid4()}),
        ):
            pair.destination = self.waiting_guest("7.2", "destination", **options).start()
            pair.there.execute("guest-add", name=NAME, qmp=f"unix:{pair.destination.qmp_path}")
            pair.remember()
            error = self.refused(pair, *words)
            self.assertEqual(error["class"], "preflight")
            entry = pair.entry(pair.here)
            self.assertLess(entry["ended"] - entry["started"], 2.0)
            pair.there.execute("guest-remove", name=NAME)
            pair.destination.close()

    def test_busy_monitor(self) -> None:
        """A QEMU whose QMP socket has a client is told from one that is not there."""
        pair = self.small().start()
        client = QmpClient.connect(pair.source.qmp_path)
        self.addCleanup(client.close)
        error = self.assertRaises(QmpError, pair.begin, "direct")
        self.assertIn("one client at a time", error.text)
        shown = pair.here.execute("query-guests")[0]
        self.assertEqual(shown["state"], "busy")
        self.assertIn("one client at a time", shown["reason"])
        self.check_nothing_moved(pair)
        client.close()
        pair.move("direct")
        pair.prove_moved()

    def test_busy_destination(self) -> None:
        """The same at the destination."""
        pair = self.small().start()
        client = QmpClient.connect(pair.destination.qmp_path)
        self.addCleanup(client.close)
        self.refused(pair, "one client at a time")
        client.close()
        pair.move("direct")
        pair.prove_moved()

    def test_dead_qemu(self) -> None:
        """A QEMU that is gone is said to be gone."""
        pair = self.small().start()
        pair.source.kill()
        error = self.assertRaises(QmpError, pair.begin, "direct")
        self.assertIn("cannot reach", error.text)
        self.assertEqual(pair.here.execute("query-guests")[0]["state"], "unreachable")

    def test_in_migration(self) -> None:
        """A guest that is being moved is not moved a second time, nor removed."""
        pair = self.small().start()
        pair.begin("direct", bandwidth=SLOW)
        first = pair.id
        pair.wait(pair.here, "active")
        error = self.assertRaises(QmpError, pair.begin, "direct")
        self.assertIn(first, error.text)
        pair.id = first
        shown = pair.here.execute("query-guests")[0]
        self.assertEqual((shown["state"], shown["migration"]), ("running", first))
        pair.set(max_bandwidth=1 << 30)
        pair.completed()
        pair.prove_moved()


class HangingQemuTests(PairCase):
    """A QEMU that has stopped answering ends a move in an error, not in a wait for ever."""

    def hanging(self, who: str) -> Pair:
        deadlines = {"guest_deadline": 1.0, "peer_deadline": 1.0}
        pair = self.pair("7.2", here=deadlines, there=deadlines).start()
        self.victim = pair.destination if who == "destination" else pair.source
        return pair

    def test_destination_before(self) -> None:
        """A destination's QEMU that does not answer fails the move; the guest goes on."""
        pair = self.hanging("destination")
        self.victim.process.signal(signal.SIGSTOP)
        pair.begin("direct")
        self.assertIn("does not greet", pair.failed(pair.here))
        self.victim.process.signal(signal.SIGCONT)
        pair.prove_stayed()
        pair.move("direct")
        pair.prove_moved()

    def test_destination_meanwhile(self) -> None:
        """One that stops answering while RAM comes in does, too."""
        for path in ("direct", "relay"):
            pair = self.hanging("destination")
            pair.begin(path, bandwidth=SLOW)
            pair.wait(pair.here, "active")
            self.victim.process.signal(signal.SIGSTOP)
            self.assertTrue(pair.failed(pair.here))
            self.victim.process.signal(signal.SIGCONT)
            pair.prove_stayed()

    def test_source(self) -> None:
        """A source's QEMU that does not answer: the destination is not left half full."""
        pair = self.hanging("source")
        pair.begin("direct", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        self.victim.process.signal(signal.SIGSTOP)
        pair.failed(pair.here)
        pair.failed(pair.there)
        self.assertNotEqual(pair.destination.status(), "running")
        self.victim.process.signal(signal.SIGCONT)
        pair.source.wait_running()
        pair.source.wait_ticks(5)
        self.assertEqual(pair.destination.lines, [])


class QueryTests(PairCase):
    def test_features(self) -> None:
        """What a host, a guest and a pair can do, and why not."""
        pair = self.pair("7.2").start()
        pair.source.set_capabilities("xbzrle")
        host = pair.here.execute("query-features")["features"]
        self.assertEqual([feature["name"] for feature in host], sorted(KNOWN))
        offered = {feature["name"] for feature in host if feature["offered"]}
        self.assertLessEqual({*FEATURES}, offered)
        for feature in host:
            self.assertEqual(feature["offered"], "reason" not in feature, feature)
        alone = self.by_name(pair.here.execute("query-features", guest=NAME))
        self.assertFalse(alone["multifd"]["offered"])
        self.assertIn("xbzrle", alone["multifd"]["reason"])
        self.assertEqual(alone["multifd"]["where"], "process")
        self.assertTrue(alone["postcopy-ram"]["offered"])
        pair.source.set_capabilities("xbzrle", on=False)
        both = pair.here.execute("query-features", guest=NAME, uri=pair.there.uri)
        self.assertEqual((both["peer"], both["path"]), (pair.there.uri, "handover"))
        self.assertFalse(self.by_name(both)["multifd"]["selected"])
        self.assertIn("postcopy-ram", self.by_name(both)["multifd"]["reason"])
        self.assertEqual(self.by_name(both)["multifd"]["where"], "conflict")
        # It was only a question.
        for guest in (pair.source, pair.destination):
            self.assertEqual(guest.migration(), "none")
        pair.prove_settings()
        for daemon in (pair.here, pair.there):
            self.assertEqual(daemon.execute("query-migrate"), [])
        error = self.assertRaises(QmpError, pair.here.execute, "query-features", uri=pair.there.uri)
        self.assertIn("guest", error.text)

    def by_name(self, answer: dict[str, list[dict[str, str]]]) -> dict[str, dict[str, str]]:
        return {feature["name"]: feature for feature in answer["features"]}

    def test_excluding_destination(self) -> None:
        """What the destination's operator excludes is not offered, and the source says so."""
        wanted = {
            "reason": "policy of the destination: it is excluded",
            "where": "policy",
            "side": "destination",
        }
        pair = self.pair("7.2")
        pair.there.config["policy"] = {"exclude": ["postcopy-ram"]}
        pair.start()
        both = self.by_name(pair.here.execute("query-features", guest=NAME, uri=pair.there.uri))
        self.assertLessEqual(wanted.items(), both["postcopy-ram"].items())
        # Where it is required, there is no plan, and so no word from the destination.
        pair.begin("", require=["postcopy-ram"], exclude=[])
        self.assertIn("destination host: its qmigd does not offer it", pair.failed(pair.here))
        self.assertTrue(both["multifd"]["selected"])

    def test_requiring_destination(self) -> None:
        """What the destination's operator requires binds the source."""
        pair = self.pair("7.2")
        pair.there.config["policy"] = {"require": ["multifd"]}
        pair.start()
        pair.begin("direct", "postcopy")
        self.assertIn("multifd", pair.failed(pair.here))
        pair.begin("", require=[], exclude=[])
        self.assertIn("multifd", pair.completed()["plan"]["features"])
        pair.prove_moved()

    def test_tunables(self) -> None:
        """Tunables are those of the guest's own QEMU, with their values."""
        for label, has, has_not in (
            ("7.2", "multifd-zstd-level", "zero-page-detection"),
            ("11", "zero-page-detection", "compress-level"),
        ):
            pair = self.pair(label)
            start(pair.here, pair.source)
            found = {
                tunable["name"]: tunable
                for tunable in pair.here.execute("query-tunables", guest=NAME)
            }
            self.assertIn(has, found)
            self.assertNotIn(has_not, found)
            self.assertEqual([name for name in found if name.startswith("tls-")], [])
            self.assertEqual(found["max-bandwidth"]["value"], 128 << 20)
            self.assertEqual(found["max-bandwidth"]["type"], "int")
            self.assertIn("zstd", found["multifd-compression"]["values"])
            self.assertTrue(found["x-checkpoint-delay"]["unstable"])

    def test_add_and_remove(self) -> None:
        """A guest that is added can be moved, one that is removed cannot."""
        pair = self.pair("7.2")
        for daemon in (pair.here, pair.there):
            del daemon.config["guest"]
        pair.start()
        self.assertEqual(pair.here.execute("query-guests"), [])
        pair.add()
        shown = pair.here.execute("query-guests")[0]
        self.assertEqual((shown["name"], shown["state"]), (NAME, "running"))
        self.assertFalse(shown["configured"])
        self.assertEqual(pair.there.execute("query-guests")[0]["state"], "inmigrate")
        missing = pair.there.execute("guest-add", name="nobody", qmp="unix:/nowhere")
        self.assertEqual((missing["name"], missing["state"]), ("nobody", "unreachable"))
        self.assertIn("there is no socket /nowhere", missing["reason"])
        pair.there.execute("guest-remove", name="nobody")
        free = self.guest(require("7.2"), "free").start()
        self.assertEqual(
            pair.here.execute("guest-add", name="free", qmp=f"unix:{free.qmp_path}")["state"],
            "running",
        )
        error = self.assertRaises(QmpError, pair.add)
        self.assertIn("already", error.text)
        error = self.assertRaises(QmpError, pair.add, "other")
        self.assertIn(f"guest '{NAME}'", error.text)
        pair.move("direct")
        pair.prove_moved()
        pair.here.execute("guest-remove", name=NAME)
        error = self.assertRaises(QmpError, pair.begin, "direct")
        self.assertIn("no guest", error.text)

    def test_no_qmp_of_a_guest(self) -> None:
        """A socket that is not the QMP socket of a guest's QEMU is told from one, at once."""
        daemon = self.daemon()
        listen, people = f"{daemon.directory}/peers", f"{daemon.directory}/people"
        daemon.config["daemon"]["listen"] = [f"unix:{listen}"]
        daemon.start()
        monitor = f"socket,id=people,path={people},server=on,wait=off"
        extra = ("-chardev", monitor, "-mon", "chardev=people,mode=readline")
        guest = self.guest(require("7.2"), extra=extra).start()
        for number, (path, words) in enumerate(
            (
                (daemon.monitor_path, "is the management socket of a qmigd"),
                (people, "is a QEMU's monitor for people (HMP)"),
                (listen, "begins with 'QEMU-MIGRATE"),
                (guest.directory, "is no socket"),
            )
        ):
            found = daemon.execute("guest-add", name=f"g{number}", qmp=f"unix:{path}")
            self.assertIn(words, found["reason"])
        shown = [entry["state"] for entry in daemon.execute("query-guests")]
        self.assertEqual(shown, ["unreachable"] * 4)
        for command in ("query-features", "query-tunables"):
            error = self.assertRaises(QmpError, daemon.execute, command, guest="g0")
            self.assertIn("is the management socket of a qmigd", error.text)
        # And the other way round.
        for path, words in (
            (guest.qmp_path, "is the QMP socket of a guest, and"),
            (people, "does not greet as qmigd does"),
        ):
            script = "from qmigd.cli.main import main; main()"
            argv = [sys.executable, "-c", script, "--socket", path, "guests"]
            done = subprocess.run(argv, capture_output=True, check=False, text=True)
            self.assertEqual(done.returncode, Exit.UNREACHABLE)
            self.assertIn(words, done.stderr)
            self.assertIn(path, done.stderr)

    def test_configured(self) -> None:
        """A guest of the configuration is not removed at run time."""
        daemon = self.daemon(guests={NAME: {"qmp": "unix:/nowhere/qmp"}}).start()
        error = self.assertRaises(QmpError, daemon.execute, "guest-remove", name=NAME)
        self.assertIn("configuration", error.text)
