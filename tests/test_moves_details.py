"""What a move has to get right beside bringing a running guest over."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from tests.rig.bootsector import Program
from tests.rig.guest import Guest
from tests.rig.news import ask_until
from tests.rig.pair import (
    FEATURES,
    KNOWN,
    NAME,
    SLOW,
    Pair,
    PairCase,
    same_ram,
    settings_of,
    start,
)
from tests.rig.proofs import counted_without_a_gap, only_one_runs
from tests.rig.qmp import QmpError

#: The machine type from which on QEMU connects its preempt channel late.
_NEW_MACHINE = "pc-i440fx-10.0"


class PausedTests(PairCase):
    """A guest that was paused stays paused, and nothing of it changes."""

    def check(self, path: str, label: str, other: str) -> None:
        pair = self.pair(label, other).start()
        pair.source.qmp("stop")
        pair.move(path)
        self.assertEqual(pair.destination.status(), "paused")
        self.assertEqual(pair.source.status(), "postmigrate")
        self.assertEqual(pair.destination.lines, [])
        same_ram(pair.source, pair.destination, everything=True)
        pair.prove_settings()
        pair.destination.qmp("cont")
        only_one_runs(pair.destination, pair.source)
        counted_without_a_gap(pair.source, pair.destination)

    def test_baseline(self) -> None:
        """With no feature it is paused at the destination too, every byte as it was."""
        self.check("baseline", "7.2", "10.0")

    def test_handover(self) -> None:
        """The same over one socket."""
        self.check("handover", "10.0", "7.2")

    def test_direct(self) -> None:
        """The same from QEMU to QEMU."""
        self.check("direct", "11", "11")

    def test_relay(self) -> None:
        """The same through the relays."""
        self.check("relay", "7.2", "7.2")

    def test_postcopy(self) -> None:
        """The same by postcopy, which begins for a paused guest as for any other."""
        pair = self.pair("10.0", machine=_NEW_MACHINE).start()
        pair.source.qmp("stop")
        # Slower than before: a paused guest writes nothing that would hold precopy up.
        pair.begin("direct", "preempt", bandwidth=1 << 20)
        pair.postcopy()
        pair.completed()
        self.assertEqual(pair.destination.status(), "paused")
        self.assertEqual(pair.destination.lines, [])
        same_ram(pair.source, pair.destination, everything=True)
        pair.prove_settings()


class SwitchTests(PairCase):
    """Postcopy out of a QEMU that would switch with nothing left to be sent, and fail.

    That it does is shown in :mod:`tests.test_guests_quirks`, with the same settings.
    """

    def check(self, path: str, other: str) -> None:
        pair = self.pair("11", other, program=Program(pages=64)).start()
        pair.source.qmp("stop")
        pair.begin(path, "postcopy", bandwidth=300_000, tunables={"downtime-limit": 1})
        pair.wait(pair.here, "active")
        ask_until(
            lambda: pair.source.qmp("query-migrate").get("ram", {}).get("remaining") == 0,
            "everything to be sent",
        )
        with contextlib.suppress(QmpError):  # on a busy machine it is over by now
            pair.here.execute("migrate-start-postcopy", guest=NAME)
        pair.completed()
        self.assertEqual(pair.destination.status(), "paused")
        same_ram(pair.source, pair.destination, everything=True)
        pair.prove_settings()

    def test_handover(self) -> None:
        """It completes by precopy, over one socket."""
        self.check("handover", "10.0")

    def test_direct(self) -> None:
        """It completes by precopy, from QEMU to QEMU."""
        self.check("direct", "11")

    def test_relay(self) -> None:
        """It completes by precopy, through the relays."""
        self.check("relay", "11")

    def test_bandwidth(self) -> None:
        """The stream is held for the switch only: then it is set as the user had it."""
        pair = self.pair("11").start()
        tunables = {"max-postcopy-bandwidth": 1 << 16}
        pair.begin("relay", "postcopy", bandwidth=SLOW, tunables=tunables)
        pair.postcopy()
        pair.source.wait_migration("postcopy-active")
        self.assertEqual(settings_of(pair.source)["max-bandwidth"], SLOW)
        pair.source.qmp("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        pair.completed()
        pair.prove_moved()


class SettingsTests(PairCase):
    """What is set on the QEMUs, while they move a guest and afterwards."""

    def test_tunables(self) -> None:
        """Tunables hold while the guest moves, can be changed meanwhile, and are put back."""
        pair = self.pair("10.0").start()
        tunables = {"downtime-limit": 123, "cpu-throttle-initial": "21"}
        pair.begin("direct", "precopy", bandwidth=SLOW, tunables=tunables)
        pair.wait(pair.here, "active")
        during = settings_of(pair.source)
        self.assertEqual(during["max-bandwidth"], SLOW)
        self.assertEqual(during["downtime-limit"], 123)
        self.assertEqual(during["cpu-throttle-initial"], 21)
        self.assertTrue(during["return-path"] and during["events"] and during["postcopy-ram"])
        self.assertTrue(settings_of(pair.destination)["postcopy-ram"])
        pair.set(max_bandwidth=1 << 30, downtime_limit="1000")
        during = settings_of(pair.source)
        self.assertEqual((during["max-bandwidth"], during["downtime-limit"]), (1 << 30, 1000))
        entry = pair.completed()
        self.assertEqual(entry["tunables"]["max-bandwidth"], 1 << 30)
        self.assertEqual(entry["tunables"]["cpu-throttle-initial"], 21)
        pair.prove_moved()

    def test_negotiated_tunable(self) -> None:
        """The user's channel count goes through the negotiation to both QEMUs."""
        pair = self.pair("7.2", "10.0").start()
        pair.begin("relay", "multifd", bandwidth=SLOW, tunables={"multifd-channels": 5})
        pair.wait(pair.here, "active")
        for guest in (pair.source, pair.destination):
            self.assertEqual(settings_of(guest)["multifd-channels"], 5)
        pair.set(max_bandwidth=1 << 30)
        plan = pair.completed()["plan"]
        self.assertEqual(plan["agreements"]["multifd"]["channels"], 5)
        self.assertEqual(len(plan["channels"]), 6)
        pair.prove_moved()

    def test_left_on(self) -> None:
        """What somebody left switched on is off for the move if not wanted, and on again."""
        pair = self.pair("7.2").start()
        pair.source.set_capabilities("multifd", "auto-converge")
        pair.source.qmp("migrate-set-parameters", multifd_channels=7, max_bandwidth=SLOW)
        pair.remember()
        pair.move("handover")
        pair.prove_moved()
        self.assertTrue(settings_of(pair.source)["multifd"])
        self.assertEqual(settings_of(pair.source)["multifd-channels"], 7)


class PlanTests(PairCase):
    """What is chosen by itself, and what a wish changes."""

    def check(
        self,
        pair: Pair,
        features: set[str],
        path: str,
        **wishes: list[str],
    ) -> dict[str, str]:
        """Move the guest, check the plan, and return why the rest was left out."""
        pair.start()
        promised = {}
        if not wishes:
            promised = pair.here.execute("query-features", guest=NAME, uri=pair.there.uri)
        every: dict[str, Any] = {"require": [], "exclude": [], **wishes}
        pair.begin("", **every)
        plan = pair.completed()["plan"]
        self.assertEqual({*plan["features"]}, features)
        self.assertEqual(plan["path"], path)
        self.assertTrue(plan["path-reason"])
        left_out = {entry["name"]: entry["reason"] for entry in plan["left-out"]}
        self.assertEqual({*left_out, *features}, KNOWN)
        if promised:
            self.assertEqual(promised["path"], path)
            self.assertEqual(promised["path-reason"], plan["path-reason"])
            for feature in promised["features"]:
                self.assertEqual(feature["selected"], feature["name"] in features)
                self.assertEqual(feature.get("reason"), left_out.get(feature["name"]))
        pair.prove_moved()
        return left_out

    def test_7_2(self) -> None:
        """Between 7.2s the certainty of postcopy comes before the speed of multifd."""
        left_out = self.check(self.pair("7.2"), {"postcopy-ram"}, "handover")
        self.assertIn("8.1", left_out["multifd"])
        self.assertIn("postcopy", left_out["multifd"])
        self.assertIn("not together with direct", left_out["postcopy-preempt"])

    def test_7_2_prefer_preempt(self) -> None:
        """Whoever wants 7.2's preempt channel gets it, in a relay."""
        features = {"postcopy-ram", "postcopy-preempt"}
        self.check(self.pair("7.2"), features, "relay", prefer=["postcopy-preempt"])

    def test_7_2_prefer_multifd(self) -> None:
        """A wish for multifd turns that round."""
        left_out = self.check(
            self.pair("7.2"), {"multifd", "zero-copy-send"}, "direct", prefer=["multifd"]
        )
        self.assertIn("multifd", left_out["postcopy-ram"])
        self.assertIn("postcopy-ram", left_out["postcopy-preempt"])

    def test_operator_prefers_multifd(self) -> None:
        """The same wish in the configuration of either side does, too."""
        pair = self.pair("7.2", policy={"prefer": ["multifd"]})
        self.check(pair, {"multifd", "zero-copy-send"}, "direct")

    def test_10_0(self) -> None:
        """Out of and into QEMU 10.0 multifd is left out, since it refuses the two together."""
        left_out = self.check(
            self.pair("11", "10.0", machine=_NEW_MACHINE),
            {"postcopy-ram", "postcopy-preempt"},
            "direct",
        )
        self.assertIn("10.0", left_out["multifd"])

    def test_11_old_machine(self) -> None:
        """Between 11s with an old machine type, preempt or multifd has to go, and is told why."""
        pair = self.pair("11")
        left_out = self.check(pair, {"postcopy-ram", "multifd", "zero-copy-send"}, "direct")
        self.assertIn("machine types up to 7.2", left_out["postcopy-preempt"])

    def test_11_new_machine(self) -> None:
        """With a machine type that is new enough all that needs no certificates is used."""
        pair = self.pair("11", machine=_NEW_MACHINE)
        left_out = self.check(pair, {*FEATURES}, "direct")
        self.assertEqual(left_out.keys(), KNOWN - {*FEATURES})
        self.assertIn("no certificates", left_out["tls"])

    def test_11_everything_postcopy(self) -> None:
        """All features together carry a guest over by postcopy, through the relays too."""
        pair = self.pair("11", machine=_NEW_MACHINE).start()
        wanted = [name for name in FEATURES if name != "zero-copy-send"]
        pair.begin("relay", bandwidth=SLOW, require=["relay", *wanted], exclude=[])
        pair.postcopy()
        self.assertGreater(pair.completed()["ram"]["postcopy-bytes"], 0)
        pair.prove_moved()

    def test_no_direct_ports(self) -> None:
        """Where the destination offers no ports, several channels take the relay."""
        pair = self.pair("10.0", machine=_NEW_MACHINE, there={"direct_ports": ""})
        left_out = self.check(pair, {"postcopy-ram", "postcopy-preempt"}, "relay")
        self.assertEqual({*left_out}, KNOWN - {"postcopy-ram", "postcopy-preempt"})

    def test_one_channel(self) -> None:
        """Where nothing needs several channels, the socket is handed over."""
        pair = self.pair("7.2")
        wishes = {"exclude": ["multifd", "postcopy-preempt"]}
        self.check(pair, {"postcopy-ram"}, "handover", **wishes)

    def test_required_in_vain(self) -> None:
        """What is required and cannot be had refuses the move, with the reason."""
        pair = self.pair("7.2").start()
        pair.begin("", require=["multifd", "postcopy-ram"], exclude=[])
        reason = pair.failed(pair.here)
        self.assertIn("required", reason)
        self.assertIn("8.1", reason)
        pair.prove_stayed()


class SourceAfterTests(PairCase):
    """What becomes of the source's QEMU."""

    def test_quit(self) -> None:
        """With ``source-after = "quit"`` it is ended once the guest runs elsewhere."""
        pair = self.pair("7.2", policy={"source-after": "quit"}).start()
        entry = pair.move("direct")
        self.assertIn("ended", entry["step"])
        pair.source.process.wait()
        pair.prove_moved(ended=True)

    def test_quit_after_postcopy(self) -> None:
        """The same after postcopy: not before all RAM has gone over."""
        pair = self.pair("11", policy={"source-after": "quit"}).start()
        pair.move("relay", "preempt")
        pair.source.process.wait()
        pair.prove_moved(ended=True)

    def test_no_quit(self) -> None:
        """A source whose guest did not go over is never ended."""
        pair = self.pair("7.2", policy={"source-after": "quit"}).start()
        pair.begin("direct", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        pair.destination.kill()
        pair.failed(pair.here)
        pair.prove_stayed()


class LaunchTests(PairCase):
    """A destination whose QEMU its daemon starts by itself."""

    def test_there_and_back(self) -> None:
        """The guest comes into a QEMU that qmigd started, outlives qmigd, goes and comes again."""
        home = self.noisy_guest("7.2", "home")
        away = self.waiting_guest("7.2", "away")
        here = self.daemon("home's qmigd")
        there = self.daemon("away's qmigd", guests={NAME: {"launch": away.launch}})
        start(here, there, home)
        here.execute("guest-add", name=NAME, qmp=f"unix:{home.qmp_path}")
        self.assertEqual(self.state(there.execute("query-guests")), "not-started")

        pair = Pair(here, there, home, away)
        pair.remember()
        pair.move("direct")
        first = away.process.pid
        pair.prove_moved()
        self.assertEqual(self.state(there.execute("query-guests")), "running")
        log = os.path.join(there.config["daemon"]["state-dir"], f"{NAME}.log")
        self.assertTrue(os.path.exists(log))
        home.close()

        there.restart()
        away.wait_ticks(5)
        self.assertEqual(self.state(there.execute("query-guests")), "running")

        back = self.returned(here, there, away, away)
        self.assertEqual(away.process.pid, first)
        self.assertEqual(self.state(there.execute("query-guests")), "postmigrate")

        # Now its old QEMU has to make room for a new one.
        pair = Pair(here, there, back, away)
        pair.remember()
        seen = len(away.lines)
        pair.move("relay")
        self.assertNotEqual(away.process.pid, first)
        away.wait_ticks(5)
        self.assertEqual(away.lines[seen].tick - back.lines[-1].tick in (1, 2), True)
        away.check_ram()

    def returned(self, here: object, there: object, away: Guest, source: Guest) -> Guest:
        """Bring the guest back into a fresh QEMU at home."""
        home = self.waiting_guest("7.2", "home again").start()
        pair = Pair(there, here, source, home)  # type: ignore[arg-type]
        pair.there.execute("guest-remove", name=NAME)
        pair.there.execute("guest-add", name=NAME, qmp=f"unix:{home.qmp_path}")
        pair.remember()
        pair.move("direct")
        pair.prove_moved()
        return home

    def state(self, guests: list[dict[str, str]]) -> str:
        return guests[0]["state"]

    def test_failed(self) -> None:
        """When the move fails, the QEMU that was started for it is ended; another try works."""
        pair = self.pair("7.2", launch=True).start(launched=True)
        pair.begin("direct", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        pair.destination.wait_for_monitor()
        first = pair.destination.process
        pair.cancel()
        pair.failed(pair.here)
        pair.failed(pair.there)
        first.wait()
        pair.prove_stayed()
        pair.move("direct")
        pair.prove_moved()

    def test_does_not_start(self) -> None:
        """A QEMU that does not start fails the move with what it printed."""
        pair = self.pair("7.2", launch=True)
        pair.there.config["guest"][NAME]["launch"] += ["-no-such-option"]
        pair.start(launched=True)
        pair.begin("direct")
        self.assertIn("-no-such-option", pair.failed(pair.here))
        pair.prove_stayed()


class CancelTests(PairCase):
    def test_too_late(self) -> None:
        """Once the guest belongs to the destination a cancel is refused, and the move goes on."""
        pair = self.pair("10.0").start()
        # So slow that the rest is still on its way when the cancel comes.
        slow = {"max-postcopy-bandwidth": 1 << 20}
        pair.begin("direct", "postcopy", bandwidth=SLOW, tunables=slow)
        pair.postcopy()
        pair.wait(pair.here, "postcopy-active")
        error = self.assertRaises(QmpError, pair.cancel)
        self.assertIn("too late", error.text)
        pair.set(max_postcopy_bandwidth=0)
        pair.completed()
        pair.prove_moved()
        self.assertRaises(QmpError, pair.cancel)
