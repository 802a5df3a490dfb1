"""Guests that move between a qmigd and a QEMU that no qmigd drives, in either direction."""

from __future__ import annotations

import contextlib
import re
import socket
from typing import Any

from tests.rig.daemons import Daemon, free_ports
from tests.rig.guest import Guest
from tests.rig.news import ask_until, wait_until
from tests.rig.pair import FEATURES, SLOW, PairCase, same_ram, settings_of, start
from tests.rig.proofs import counted_without_a_gap, only_one_runs
from tests.rig.qmp import QmpError


def moved(source: Guest, destination: Guest) -> None:
    """Check that the guest has gone over whole, and runs there alone."""
    destination.wait_running()
    with destination.stopped():
        same_ram(source, destination)
    only_one_runs(destination, source, ticks=5)
    counted_without_a_gap(source, destination)
    destination.check_ram()


class FromQemuTests(PairCase):
    """``migrate`` typed at a QEMU, to a port that a qmigd has for one guest."""

    def two(
        self,
        source: str,
        destination: str,
        *,
        unix: bool = False,
        launch: bool = False,
        incoming: bool = True,
        **options: Any,
    ) -> tuple[Guest, Guest, Daemon, str]:
        """Start a QEMU alone, and a daemon with a guest that waits; returns its port as well."""
        one = self.noisy_guest(source, "source")
        two = self.noisy_guest(destination, "destination", incoming=incoming)
        uri = f"unix:{two.directory}/in" if unix else f"tcp:127.0.0.1:{free_ports()[0]}"
        table: dict[str, Any] = {"launch": two.launch} if launch else {}
        table = table or {"qmp": f"unix:{two.qmp_path}"}
        daemon = self.daemon(guests={"vm": {**table, "legacy-listen": uri}}, **options)
        start(one, daemon, *([] if launch else [two]))
        return one, two, daemon, uri

    def type_migrate(self, source: Guest, uri: str, wanted: str = "completed") -> None:
        source.qmp("migrate-set-parameters", max_bandwidth=1 << 30)
        source.qmp("migrate", uri=uri)
        self.assertEqual(wanted, source.wait_migration("completed", "failed"))

    def arrived(self, daemon: Daemon) -> dict[str, Any]:
        """Wait until the daemon has done with a migration, and return what it says of that."""
        daemon.monitor.wait_event(
            "MIGRATION", where=lambda data: data["status"] in ("completed", "failed")
        )
        entry: dict[str, Any] = daemon.execute("query-migrate")[-1]
        return entry

    def logged(self, daemon: Daemon, text: str) -> None:
        wait_until(lambda: re.search(text, daemon.log), lambda: f"{text!r} in\n{daemon.log}")

    def test_tcp(self) -> None:
        """It arrives without a feature, and the log says so; the QEMU gets its settings back."""
        source, destination, daemon, uri = self.two("7.2", "7.2")
        destination.set_capabilities("multifd", "x-ignore-shared")
        before = settings_of(destination)
        source.set_capabilities("events")
        self.type_migrate(source, uri)
        moved(source, destination)
        entry = self.arrived(daemon)
        self.assertEqual(
            ("completed", "destination", "destination"),
            (entry["status"], entry["role"], entry["owner"]),
        )
        self.assertEqual([], entry["plan"]["features"])
        self.assertIn("no qmigd at the source", entry["plan"]["path-reason"])
        left = {one["name"]: one["reason"] for one in entry["plan"]["left-out"]}
        self.assertLessEqual(set(FEATURES), set(left))
        self.assertEqual("source host: there is no qmigd, and so no negotiation", left["multifd"])
        self.assertEqual(before, settings_of(destination))
        self.assertRegex(
            daemon.log,
            r"guest vm comes in from tcp:127.0.0.1:\d+ as QEMU's plain stream: no qmigd is there, "
            r"and no feature is used",
        )
        self.assertRegex(daemon.log, r"guest vm has arrived from tcp:127.0.0.1:\d+")

    def test_unix_launched(self) -> None:
        """Over a unix socket, into a QEMU that the daemon starts for it."""
        source, destination, daemon, uri = self.two("10.0", "11", unix=True, launch=True)
        source.set_capabilities("events", "return-path")
        self.type_migrate(source, uri)
        destination.wait_for_monitor()
        moved(source, destination)
        entry = self.arrived(daemon)
        self.assertEqual("completed", entry["status"])
        self.assertIn(uri, entry["peer"])

    def test_from_11(self) -> None:
        """Out of QEMU 11, into 10.0."""
        source, destination, daemon, uri = self.two("11", "10.0")
        source.set_capabilities("events", "return-path")
        self.type_migrate(source, uri)
        moved(source, destination)
        self.assertEqual("completed", self.arrived(daemon)["status"])

    def test_not_waiting(self) -> None:
        """Where the guest does not wait, the source goes on, and the log has the reason."""
        source, destination, daemon, uri = self.two("7.2", "10.0", incoming=False)
        source.set_capabilities("events", "return-path")
        self.type_migrate(source, uri, "failed")
        source.wait_running()
        source.wait_ticks(2)
        self.logged(
            daemon,
            r"a plain stream for guest vm from tcp:127.0.0.1:\d+ was refused: guest vm does not "
            r"wait for a migration, it is running",
        )
        self.assertTrue(destination.running())
        self.assertEqual([], daemon.execute("query-migrate"))

    def test_something_else(self) -> None:
        """What is no plain stream is refused with a reason, and the guest's QEMU waits on."""
        source, destination, daemon, uri = self.two("10.0", "7.2")
        for said, reason in (
            (
                b"\x11\x22\x33\x44\0\0\0\1",
                "it is a further channel of a migration with several",
            ),
            (b"\x16\x03\x01\x02\0", "it begins with TLS; unset tls-creds at the source"),
            (b"GET / HTTP/1.1", "it does not begin as QEMU's stream does, but with b'GET '"),
            (b"QE", "the connection was closed before anything came|did not come within"),
        ):
            with socket.create_connection(("127.0.0.1", int(uri.split(":")[2]))) as stranger:
                stranger.sendall(said[:2])
                stranger.sendall(said[2:])
                if len(said) > 2:
                    with contextlib.suppress(ConnectionResetError):
                        self.assertEqual(b"", stranger.recv(1))
                    self.logged(daemon, f"was refused: {reason}")
        self.assertEqual("inmigrate", destination.status())
        destination.qmp("object-add", {"id": "creds", "qom-type": "tls-creds-anon"})
        destination.qmp("migrate-set-parameters", tls_creds="creds")
        source.set_capabilities("events", "return-path")
        self.type_migrate(source, uri, "failed")
        self.logged(daemon, "was refused: the process of guest vm has tls-creds set")
        destination.qmp("migrate-set-parameters", tls_creds="")
        source.wait_running()
        self.type_migrate(source, uri)
        moved(source, destination)

    def test_cut_off(self) -> None:
        """A stream that ends in the middle does not leave half a guest here."""
        source, destination, daemon, uri = self.two("10.0", "7.2")
        source.set_capabilities("events", "return-path")
        source.qmp("migrate-set-parameters", max_bandwidth=SLOW)
        source.qmp("migrate", uri=uri)
        source.monitor.wait_event("MIGRATION_PASS")
        self.logged(daemon, "guest vm comes in")
        source.qmp("migrate_cancel")
        source.wait_migration("cancelled")
        entry = self.arrived(daemon)
        self.assertEqual(("failed", "not here"), (entry["status"], entry["step"]))
        self.assertGreater(len(entry["error"]["desc"]), 20)
        only_one_runs(source, destination, ticks=5)

    def test_daemon_killed(self) -> None:
        """QEMU has the connection: the guest arrives all the same, and is put in order later."""
        source, destination, daemon, uri = self.two("7.2", "10.0")
        destination.set_capabilities("postcopy-ram")
        before = settings_of(destination)
        source.set_capabilities("events", "return-path")
        source.qmp("migrate-set-parameters", max_bandwidth=SLOW)
        source.qmp("migrate", uri=uri)
        source.monitor.wait_event("MIGRATION_PASS")
        self.logged(daemon, "guest vm comes in")
        destination.wait_migration("active")
        daemon.kill()
        source.qmp("migrate-set-parameters", max_bandwidth=1 << 30)
        self.assertEqual("completed", source.wait_migration("completed", "failed"))
        daemon.restart()
        self.logged(daemon, "was interrupted by the end of an earlier qmigd: it runs here")
        moved(source, destination)
        self.assertEqual(before, settings_of(destination))


class ToQemuTests(PairCase):
    """``qmigctl migrate`` to a place where no qmigd greets."""

    def two(
        self, source: str, destination: str, **options: Any
    ) -> tuple[Guest, Guest, Daemon, str]:
        """Start a daemon with a guest, and a QEMU alone that waits; returns where."""
        options.setdefault("handshake_deadline", 0.3)
        uri = f"tcp:127.0.0.1:{free_ports()[0]}"
        one = self.noisy_guest(source, "source")
        two = self.noisy_guest(destination, "destination", incoming=uri)
        daemon = self.daemon(guests={"vm": {"qmp": f"unix:{one.qmp_path}"}}, **options)
        start(one, two, daemon)
        return one, two, daemon, uri

    def migrate(self, daemon: Daemon, uri: str, **more: Any) -> dict[str, Any]:
        """Have a guest migrated, and return what is known of it at the end."""
        tunables = {"max-bandwidth": 1 << 30}
        begun = daemon.execute("migrate", guest="vm", uri=uri, tunables=tunables, **more)
        return self.ended(daemon, begun["id"])

    def ended(self, daemon: Daemon, migration: str) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            (entry,) = daemon.execute("query-migrate", id=migration)
            return entry if "ended" in entry else {}

        return ask_until(look, lambda: f"the end of the migration; {daemon.log}")

    def moves(self, source: str, destination: str) -> None:
        one, two, daemon, uri = self.two(source, destination)
        before = settings_of(one)
        entry = self.migrate(daemon, uri, legacy="allow")
        self.assertEqual(("completed", "moved"), (entry["status"], entry["step"]), entry)
        moved(one, two)
        self.assertEqual(before, settings_of(one))
        plan = entry["plan"]
        self.assertEqual(("handover", []), (plan["path"], plan["features"]))
        left = {one["name"]: one["reason"] for one in plan["left-out"]}
        self.assertEqual(
            "destination host: there is no qmigd, and so no negotiation", left["multifd"]
        )
        self.assertIn(
            f"guest vm goes to {uri} as QEMU's plain stream: no qmigd has greeted there", daemon.log
        )

    def test_7_2(self) -> None:
        """Where that is allowed, a QEMU alone gets the plain stream: into 7.2."""
        self.moves("7.2", "7.2")

    def test_10_0(self) -> None:
        """The same into 10.0."""
        self.moves("7.2", "10.0")

    def test_11(self) -> None:
        """The same into 11."""
        self.moves("10.0", "11")

    def test_refused(self) -> None:
        """By default it is refused, with the command that would allow it; the guest goes on."""
        source, destination, daemon, uri = self.two("7.2", "10.0")
        entry = self.migrate(daemon, uri)
        self.assertEqual(("failed", "no-greeting"), (entry["status"], entry["error"]["class"]))
        said = entry["error"]["desc"]
        self.assertIn(f"{uri} takes connections, but has not greeted within 0.3 seconds", said)
        self.assertIn(f"qmigctl migrate vm {uri} --legacy allow", said)
        only_one_runs(source, destination, ticks=5)
        counted_without_a_gap(source)
        # As the text says: QEMU waits for one connection, and that was it.
        self.assertNotEqual("inmigrate", destination.status())

    def test_not_without_what_is_required(self) -> None:
        """What takes a qmigd, and is required, is not done without; a question moves nothing."""
        source, destination, daemon, _ = self.two("10.0", "10.0")
        with socket.create_server(("127.0.0.1", 0)) as silent:
            uri = f"tcp:127.0.0.1:{silent.getsockname()[1]}"
            for more, reason in (
                ({"require": ["tls"]}, "tls is required, a feature that takes one"),
                ({"require": ["multifd"]}, "multifd is required, a feature that takes one"),
                ({"require": ["relay"]}, "relay is required, the path that takes one"),
                ({"exclude": ["handover"]}, "handover, which would be the only one, is excluded"),
            ):
                entry = self.migrate(daemon, uri, legacy="allow", **more)
                self.assertIn(reason, entry["error"]["desc"])
                self.assertEqual("no-greeting", entry["error"]["class"])
                with silent.accept()[0] as connection:
                    self.assertEqual(b"", connection.recv(1))
            error = self.assertRaises(
                QmpError, daemon.execute, "query-features", guest="vm", uri=uri
            )
            self.assertIn("has not greeted", str(error))
            with silent.accept()[0] as connection:
                self.assertEqual(b"", connection.recv(1))
        only_one_runs(source, destination, ticks=5)

    def test_half_a_greeting(self) -> None:
        """Who has begun to greet is no QEMU, and gets nothing."""
        source, destination, daemon, _ = self.two("7.2", "7.2", policy={"legacy": "allow"})
        with socket.create_server(("127.0.0.1", 0)) as slow:
            uri = f"tcp:127.0.0.1:{slow.getsockname()[1]}"
            begun = daemon.execute("migrate", guest="vm", uri=uri)
            with slow.accept()[0] as connection:
                connection.sendall(b"QEMU-MIG")
                entry = self.ended(daemon, begun["id"])
                self.assertNotIn(b"QEVM", connection.recv(100))
        self.assertIn("greeting did not come within", entry["error"]["desc"])
        only_one_runs(source, destination, ticks=5)

    def test_cancel(self) -> None:
        """The user cancels: the guest goes on here, and its QEMU gets its settings back."""
        source, destination, daemon, uri = self.two("10.0", "11", policy={"legacy": "allow"})
        before = settings_of(source)
        begun = daemon.execute("migrate", guest="vm", uri=uri, tunables={"max-bandwidth": SLOW})
        daemon.monitor.wait_event("MIGRATION_PASS")
        daemon.execute("migrate-cancel", guest="vm")
        entry = self.ended(daemon, begun["id"])
        self.assertEqual("cancelled", entry["status"])
        only_one_runs(source, destination, ticks=5)
        counted_without_a_gap(source)
        self.assertEqual(before, settings_of(source))

    def test_destination_dies(self) -> None:
        """The QEMU at the other side is killed: the guest goes on here."""
        source, destination, daemon, uri = self.two("10.0", "7.2", policy={"legacy": "allow"})
        begun = daemon.execute("migrate", guest="vm", uri=uri, tunables={"max-bandwidth": SLOW})
        daemon.monitor.wait_event("MIGRATION_PASS")
        destination.kill()
        entry = self.ended(daemon, begun["id"])
        self.assertEqual("failed", entry["status"])
        only_one_runs(source, destination, ticks=5)
        counted_without_a_gap(source)

    def test_to_a_port_for_it(self) -> None:
        """A port of a qmigd for plain streams is such a place as well."""
        source, waiting = self.two_guests("7.2", "10.0")
        uri = f"unix:{waiting.directory}/in"
        here = self.daemon(
            guests={"vm": {"qmp": f"unix:{source.qmp_path}"}}, handshake_deadline=0.3
        )
        there = self.daemon(
            "there", guests={"vm": {"qmp": f"unix:{waiting.qmp_path}", "legacy-listen": uri}}
        )
        start(source, waiting, here, there)
        entry = self.migrate(here, uri, legacy="allow")
        self.assertEqual("completed", entry["status"], entry)
        moved(source, waiting)
