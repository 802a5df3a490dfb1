"""QemuGuest, on real QEMUs."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from qmigd.errors import ArgumentError, DeadlineError, GuestBusy, GuestError, GuestGone
from qmigd.guests.qemu import GONE, QemuGuest
from qmigd.interfaces import Settings
from tests.rig.bootsector import Program
from tests.rig.case import RigCase
from tests.rig.guest import Guest
from tests.rig.news import DEADLINE, Hang
from tests.rig.qemus import LABELS, require
from tests.rig.qmp import QmpError

#: Bytes per second of a precopy that takes some seconds.
SLOW = 4 << 20

Error = TypeVar("Error", bound=Exception)


class QemuCase(RigCase):
    """Starts rig guests and takes hold of them with QemuGuest."""

    async def held(self, guest: Guest) -> QemuGuest:
        """Attach to a guest of the rig, until the test ends."""
        held = QemuGuest(reactor, guest.name, f"unix:{guest.qmp_path}")
        await held.attach()
        self.addCleanup(held.detach)
        return held

    async def refused(self, attempt: Awaitable[object], kind: type[Error]) -> Error:
        """Return the error that an attempt ends with."""
        try:
            await attempt
        except kind as error:
            return error
        self.fail(f"no {kind.__name__} came")

    def started(self, label: str, name: str = "guest", **options: Any) -> Guest:
        """Start a guest of the rig."""
        return self.guest(require(label), name, **options).start()


async def when(
    guest: QemuGuest, event: str, matches: Callable[[dict[str, Any]], bool] = lambda data: True
) -> dict[str, Any]:
    """Wait for an event that is still to come."""
    seen: Deferred[dict[str, Any]] = Deferred()

    def look(name: str, data: dict[str, Any]) -> None:
        if name == event and matches(data) and not seen.called:
            seen.callback(data)

    end = guest.watch(look)

    def late(result: Any, seconds: float) -> Failure:
        return Failure(Hang(f"no {event} came from {guest.name} within {seconds:g} s"))

    try:
        return await seen.addTimeout(DEADLINE, reactor, onTimeoutCancel=late)
    finally:
        end()


def status(*wanted: str) -> Callable[[dict[str, Any]], bool]:
    return lambda data: data.get("status") in wanted


class AttachTests(QemuCase):
    async def test_facts(self) -> None:
        """Version, machine type, capabilities and parameters are those of the QEMU."""
        for label in LABELS:
            guest = self.started(label)
            held = await self.held(guest)
            facts = (await held.examine()).facts
            self.assertEqual(".".join(map(str, facts.version)), guest.qemu.version)
            self.assertEqual(facts.machine, "pc-i440fx-7.2")
            self.assertIs(facts.capabilities["postcopy-ram"], False)
            self.assertEqual(facts.parameters["multifd-channels"], 2)

    async def test_somebody_else_is_connected(self) -> None:
        """A QMP socket that has a client is told apart from a dead one."""
        guest = self.started("7.2")
        await self.held(guest)
        other = QemuGuest(reactor, "other", f"unix:{guest.qmp_path}")
        error = await self.refused(other.attach(), GuestBusy)
        self.assertIn("one client at a time", str(error))

    async def test_attached_twice(self) -> None:
        """One object holds a guest for one migration."""
        held = await self.held(self.started("7.2"))
        await self.refused(held.attach(), GuestBusy)

    async def test_nobody_is_there(self) -> None:
        """A dead QEMU and one that never was are gone, with the socket's path in the text."""
        guest = self.started("7.2")
        guest.kill()
        for path in (guest.qmp_path, f"{guest.directory}/none"):
            held = QemuGuest(reactor, "guest", f"unix:{path}")
            error = await self.refused(held.attach(), GuestGone)
            self.assertIn(path, str(error))

    async def test_lost(self) -> None:
        """The watcher hears that the guest is gone, and commands fail then."""
        guest = self.started("7.2")
        held = await self.held(guest)
        gone = Deferred.fromCoroutine(when(held, GONE))
        guest.kill()
        self.assertIn("reason", await gone)
        await self.refused(held.query_status(), GuestGone)

    async def test_detach_and_attach_again(self) -> None:
        """Letting go is no loss of the guest, which goes on."""
        guest = self.started("7.2")
        held = await self.held(guest)
        seen: list[str] = []
        held.watch(lambda name, data: seen.append(name))
        held.detach()
        held.detach()
        await held.attach()
        self.assertEqual(await held.query_status(), "running")
        self.assertEqual(seen, [])

    async def test_quit(self) -> None:
        """The process ends."""
        guest = self.started("7.2")
        held = await self.held(guest)
        await held.quit()
        self.assertEqual(guest.process.wait(), 0)


class SettingsTests(QemuCase):
    async def test_apply_returns_what_was_before(self) -> None:
        """What comes back puts everything as it was, on every version."""
        for label in LABELS:
            held = await self.held(self.started(label))
            wanted = Settings(
                {"multifd": True, "events": True},
                {"multifd-channels": 4, "tls-creds": "tls0", "max-bandwidth": 5_000_000},
            )
            names = Settings(
                dict.fromkeys(wanted.capabilities, False), dict.fromkeys(wanted.parameters)
            )
            fresh = await held.readback(names)
            before, now = await held.apply(wanted)
            self.assertEqual(now, wanted)
            self.assertEqual(before, fresh)
            self.assertEqual(await held.readback(wanted), wanted)
            self.assertEqual(await held.apply(before), (wanted, before))
            self.assertEqual(await held.readback(names), fresh)

    async def test_what_is_known_to_be_so(self) -> None:
        """What is so already is not set again, and read back all the same."""
        held = await self.held(self.started("7.2"))
        wanted = Settings({"events": True, "multifd": True}, {"multifd-channels": 4})
        _, facts = await held.apply(wanted), (await held.examine()).facts
        self.assertEqual(await held.apply(wanted, facts), (wanted, wanted))
        await held.apply(Settings({"multifd": False}))
        error = await self.refused(held.apply(wanted, facts), GuestError)
        self.assertIn("multifd at True, and has it at False", str(error))

    async def test_unset(self) -> None:
        """None unsets what can be unset, and passes over what cannot."""
        held = await self.held(self.started("7.2"))
        await held.apply(Settings(parameters={"tls-hostname": "host", "max-bandwidth": 1000}))
        nothing = Settings(parameters={"tls-hostname": None, "block-bitmap-mapping": None})
        await held.apply(nothing)
        parameters = (await held.readback(nothing)).parameters
        self.assertEqual(parameters, {"tls-hostname": "", "block-bitmap-mapping": None})

    async def test_refused(self) -> None:
        """Where QEMU refuses one thing, all is as before, and the error has its words."""
        held = await self.held(self.started("7.2"))
        wanted = Settings({"postcopy-ram": True}, {"max-cpu-throttle": 1000})
        error = await self.refused(held.apply(wanted), GuestError)
        self.assertIn("max-cpu-throttle", str(error))
        self.assertIs((await held.readback(wanted)).capabilities["postcopy-ram"], False)

    async def test_objects(self) -> None:
        """Objects are there before a parameter names them, and go when none does any more."""
        for label in LABELS:
            guest = self.started(label)
            held = await self.held(guest)
            wanted = Settings(
                parameters={"tls-authz": "list"},
                objects={"list": {"qom-type": "authz-simple", "identity": "CN=somebody"}},
            )
            before, _ = await held.apply(wanted)
            made = guest.qmp("qom-get", path="/objects/list", property="identity")
            self.assertEqual(made, "CN=somebody")
            self.assertEqual(before.objects, {"list": None})
            await held.apply(before)
            left = {entry["name"] for entry in guest.qmp("qom-list", path="/objects")}
            self.assertNotIn("list", left)

    async def test_refused_object(self) -> None:
        """Where one object is refused, the other one goes again, and nothing stays set."""
        guest = self.started("7.2")
        held = await self.held(guest)
        wanted = Settings(
            parameters={"tls-authz": "list"},
            objects={
                "list": {"qom-type": "authz-simple", "identity": "CN=somebody"},
                "bad": {"qom-type": "tls-creds-x509", "dir": "/nowhere", "endpoint": "client"},
            },
        )
        error = await self.refused(held.apply(wanted), GuestError)
        self.assertIn("/nowhere", str(error))
        left = {entry["name"] for entry in guest.qmp("qom-list", path="/objects")}
        self.assertTrue(left.isdisjoint({"list", "bad"}), left)
        self.assertEqual((await held.readback(wanted)).parameters, {"tls-authz": ""})

    async def test_unknown_capability(self) -> None:
        """A capability that this QEMU lacks is named."""
        held = await self.held(self.started("7.2"))
        wanted = Settings({"mapped-ram": True})
        error = await self.refused(held.apply(wanted), GuestError)
        self.assertIn("no capability mapped-ram", str(error))

    async def test_checked(self) -> None:
        """A user's values come back in QEMU's types, and nonsense is refused by name."""
        held = await self.held(self.started("7.2"))
        checked = await held.checked({"max-bandwidth": "1G", "cpu-throttle-tailslow": "on"})
        self.assertEqual(checked, {"max-bandwidth": 1 << 30, "cpu-throttle-tailslow": True})
        self.assertEqual(await held.checked({}), {})
        error = await self.refused(held.checked({"max-bandwith": 1}), ArgumentError)
        self.assertIn("max-bandwidth", str(error))


class MoveTests(QemuCase):
    def disk(self) -> str:
        """Make an empty disk image of 1 MiB, and return its path."""
        path = Path(self.mktemp()).resolve()
        path.touch()
        os.truncate(path, 1 << 20)
        return str(path)

    async def pair(
        self, source: str, destination: str, *capabilities: str, extra: tuple[str, ...] = ()
    ) -> tuple[Guest, Guest, QemuGuest, QemuGuest]:
        """Start two guests and set both up for a slow precopy."""
        program = Program(pages=3072, pages_per_tick=16)
        one = self.started(source, "source", program=program, extra=extra)
        other = self.started(
            destination, "destination", program=program, incoming=True, extra=extra
        )
        out, into = await self.held(one), await self.held(other)
        switches = dict.fromkeys(("events", "return-path", *capabilities), True)
        await into.apply(Settings(switches))
        await out.apply(Settings(switches, {"max-bandwidth": SLOW}))
        return one, other, out, into

    async def begin(self, other: Guest, out: QemuGuest, into: QemuGuest) -> None:
        """Begin a move over a unix socket to a destination that waits for ``cont``."""
        await into.stop()
        uri = f"unix:{os.path.join(other.directory, 'stream')}"
        await into.incoming(uri)
        active = Deferred.fromCoroutine(when(out, "MIGRATION", status("active")))
        await out.migrate(uri)
        await active

    async def switch(self, out: QemuGuest) -> None:
        """Switch a guest that was stopped, while RAM is left that is still to be sent.

        At full speed QEMU may send the last of it before it switches, and QEMU 11 fails then
        (``POSTCOPY_WITHOUT_PAGES`` in :mod:`qmigd.guests.quirks`).
        """
        begins = Deferred.fromCoroutine(
            when(out, "MIGRATION", status("postcopy-device", "postcopy-active"))
        )
        await out.start_postcopy()
        await begins

    async def finish(self, out: QemuGuest, into: QemuGuest) -> None:
        """Let it go at full speed to its end."""
        ends = [
            Deferred.fromCoroutine(when(guest, "MIGRATION", status("completed")))
            for guest in (out, into)
        ]
        await out.apply(Settings(parameters={"max-bandwidth": 1 << 40}))
        for guest, end in zip((out, into), ends, strict=True):
            # It may have been over before anybody listened.
            if (await guest.query_migrate())["status"] == "completed":
                end.addErrback(lambda failure: None)
                end.cancel()
            await end
        self.assertEqual((await out.query_migrate())["status"], "completed")

    async def test_sockets(self) -> None:
        """Both take one end of a connection each, and what was given is closed here."""
        for source, destination in (("7.2", "7.2"), ("10.0", "11"), ("11", "7.2")):
            _, other, out, into = await self.pair(source, destination)
            ends = socket.socketpair()
            for end in ends:
                end.setblocking(False)
            await into.incoming(ends[0])
            await out.migrate(ends[1])
            await self.finish(out, into)
            self.assertEqual([end.fileno() for end in ends], [-1, -1])
            self.assertEqual(await out.query_status(), "postmigrate")
            other.wait_running()
            other.check_ram()

    async def test_socket_and_several_channels(self) -> None:
        """One connection is refused where several are needed, which 7.2 itself does not say."""
        for label in LABELS:
            for capabilities in (("multifd",), ("postcopy-ram", "postcopy-preempt")):
                held = await self.held(self.started(label, incoming=True))
                await held.apply(Settings(dict.fromkeys(capabilities, True)))
                here, there = socket.socketpair()
                self.addCleanup(there.close)
                error = await self.refused(held.incoming(here), GuestError)
                self.assertIn(capabilities[-1], str(error))
                self.assertEqual(here.fileno(), -1)

    async def test_refused_socket(self) -> None:
        """A socket that QEMU does not want after all is closed in QEMU as well."""
        held = await self.held(self.started("7.2"))  # it does not wait for anything
        here, there = socket.socketpair()
        await self.refused(held.incoming(here), GuestError)
        there.settimeout(DEADLINE)
        self.assertEqual(there.recv(1), b"")
        there.close()

    async def test_stopped_destination_stays_paused(self) -> None:
        """Told to stop while it waits, it is paused with all its RAM, until cont."""
        for source, destination in (("7.2", "7.2"), ("10.0", "10.0"), ("11", "11"), ("7.2", "11")):
            _, other, out, into = await self.pair(source, destination)
            await self.begin(other, out, into)
            await self.finish(out, into)
            self.assertEqual(await into.query_status(), "paused")
            self.assertEqual(await out.query_status(), "postmigrate")
            self.assertEqual(other.counter, -1)
            await into.cont()
            self.assertEqual(await into.query_status(), "running")
            other.wait_ticks(1)
            other.check_ram()

    async def test_cont_while_it_waits(self) -> None:
        """It runs as soon as it is loaded, in precopy as in postcopy, and not before."""
        for label in LABELS:
            for postcopy in (False, True):
                _, other, out, into = await self.pair(label, label, "postcopy-ram")
                await self.begin(other, out, into)
                await into.cont()
                self.assertEqual(await into.query_status(), "inmigrate")
                runs = Deferred.fromCoroutine(when(into, "RESUME"))
                if postcopy:
                    await out.stop()
                    await self.switch(out)
                    await runs
                await self.finish(out, into)
                await runs
                other.check_ram()

    async def test_stop_after_cont_while_it_waits(self) -> None:
        """The later word counts."""
        _, other, out, into = await self.pair("7.2", "7.2")
        await self.begin(other, out, into)
        await into.cont()
        await into.stop()
        await self.finish(out, into)
        await deferLater(reactor, 0)
        self.assertEqual(await into.query_status(), "paused")

    async def test_cont_while_the_source_completes(self) -> None:
        """It runs once its migration is through; QEMU's own cont is refused until then."""
        for label in LABELS:
            one, other, out, into = await self.pair(label, label, "pause-before-switchover")
            await self.begin(other, out, into)
            pauses = Deferred.fromCoroutine(when(out, "MIGRATION", status("pre-switchover")))
            await out.apply(Settings(parameters={"max-bandwidth": 1 << 40}))
            await pauses
            self.assertEqual(await out.query_status(), "finish-migrate")
            error = self.assertRaises(QmpError, one.qmp, "cont")
            self.assertIn("not finalized yet", error.text)
            self.patch(out, "_deadline", 0.05)
            late = await self.refused(out.cont(), DeadlineError)
            self.assertIn("completing its migration", str(late))
            self.patch(out, "_deadline", DEADLINE)
            runs = Deferred.fromCoroutine(out.cont())
            await deferLater(reactor, 0)
            one.qmp("migrate-continue", state="pre-switchover")
            await runs
            self.assertEqual((await out.query_migrate())["status"], "completed")
            self.assertEqual(await out.query_status(), "running")

    async def test_images_are_left_alone_while_it_waits(self) -> None:
        """A cont for later does not touch a disk that the source still writes to.

        QEMU's own cont would: 7.2 fails on the lock that the source holds.
        """
        for label in LABELS:
            for postcopy in (False, True):
                extra = ("-drive", f"if=virtio,format=raw,file={self.disk()}")
                _, other, out, into = await self.pair(label, label, "postcopy-ram", extra=extra)
                await self.begin(other, out, into)
                await into.cont()
                runs = Deferred.fromCoroutine(when(into, "RESUME"))
                if postcopy:
                    await out.stop()
                    await self.switch(out)
                await self.finish(out, into)
                await runs
                self.assertEqual(await into.query_status(), "running")

    async def test_fence(self) -> None:
        """A source that was stopped before postcopy stays stopped; the destination runs."""
        for label in LABELS:
            one, other, out, into = await self.pair(label, label, "postcopy-ram")
            await self.begin(other, out, into)
            await out.stop()
            runs = Deferred.fromCoroutine(when(into, "RESUME"))
            await into.cont()
            await self.switch(out)
            await runs
            await self.finish(out, into)
            self.assertEqual(await out.query_status(), "postmigrate")
            self.assertEqual(await into.query_status(), "running")
            other.check_ram()
            one.kill()

    async def test_cancel(self) -> None:
        """The source goes on.

        QEMU may call it failed: the destination closes the connection, and the migration
        thread may find that out before it takes note of the cancel (seen on 7.2 and 10.0).
        """
        for label in LABELS:
            _, other, out, into = await self.pair(label, label)
            await self.begin(other, out, into)
            over = Deferred.fromCoroutine(when(out, "MIGRATION", status("cancelled", "failed")))
            await out.cancel()
            ended = (await over)["status"]
            self.assertIn(ended, ("cancelled", "failed"))
            self.assertEqual(await out.query_status(), "running")

    async def test_why_a_load_failed(self) -> None:
        """From 9.1 on the destination stays to tell why; an older one is gone."""
        for label in LABELS:
            one = self.started(label, "source", memory=64)
            other = self.started(label, "destination", memory=80, incoming=True)
            out, into = await self.held(one), await self.held(other)
            await into.apply(Settings({"events": True, "return-path": True}))
            await out.apply(Settings({"return-path": True}))
            uri = f"unix:{os.path.join(other.directory, 'stream')}"
            await into.incoming(uri)
            if label == "7.2":
                over = Deferred.fromCoroutine(when(into, GONE))
            else:
                over = Deferred.fromCoroutine(when(into, "MIGRATION", status("failed")))
            await out.migrate(uri)
            await over
            if label != "7.2":
                progress = await into.query_migrate()
                self.assertIn("load of migration failed", progress["error-desc"])
                await into.quit()
            self.assertEqual(await out.query_status(), "running")

    async def test_query_migrate_before_any(self) -> None:
        """There is a status always."""
        held = await self.held(self.started("7.2"))
        self.assertEqual(await held.query_migrate(), {"status": "none"})
