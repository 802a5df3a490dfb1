"""``zero-copy-send``: where it is taken, and how much locked memory it needs."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qmigd.features.zero_copy_send import feature, locked_memory
from qmigd.interfaces import GuestFacts, Host, Process, Withdraw
from tests.rig.case import RigCase
from tests.rig.guest import Guest
from tests.rig.netns import Link, Namespace
from tests.rig.news import wait_until
from tests.rig.pair import NAME, Pair, PairCase
from tests.rig.qemus import LABELS, require
from tests.rig.users import for_everybody, ordinary

_HOST = Host(4, kernel="6.1.0", zero_copy_sockets=True, tcp_send_buffer=4 << 20)
_PROCESS = Process(1, 1000, None, userfaultfd=False, userfaultfd_device=False)
_GUEST = GuestFacts(
    "vm", "qemu", (10, 0, 2), "pc", {"zero-copy-send": False, "xbzrle": False},
    {"multifd-compression": "none"}, process=_PROCESS,
)  # fmt: skip

#: Bytes of a TCP send buffer in the tests: so few that what is needed for one channel is below
#: the limit that processes have by default (8 MiB).
_BUFFER = 1 << 20
_NEEDED = locked_memory(_BUFFER)
#: What has to be sent: RAM that is not zero, from an address on.
_FULL = (16 << 20, bytes(range(1, 256)) * (24 << 20 >> 8))


class RuleTests(SynchronousTestCase):
    def refused(self, guest: GuestFacts = _GUEST, host: Host = _HOST, **tunables: Any) -> Withdraw:
        named = {name.replace("_", "-"): value for name, value in tunables.items()}
        return self.assertRaises(Withdraw, feature.propose, guest, host, named)

    def limited(self, memlock: int) -> GuestFacts:
        return dataclasses.replace(_GUEST, process=dataclasses.replace(_PROCESS, memlock=memlock))

    def test_source_only(self) -> None:
        """The destination's QEMU need not know it, and is told nothing."""
        ignorant = dataclasses.replace(_GUEST, capabilities={})
        self.assertTrue(feature.probe_guest(ignorant, "destination"))
        self.assertFalse(feature.probe_guest(ignorant, "source"))
        self.assertFalse(feature.settings({}, "destination"))
        self.assertEqual(feature.settings({}, "source").capabilities, {"zero-copy-send": True})

    def test_excluded_by_settings(self) -> None:
        """What QEMU refuses it with: xbzrle, and compression, set or wished for."""
        on = dataclasses.replace(_GUEST, capabilities={"zero-copy-send": False, "xbzrle": True})
        self.assertFalse(feature.probe_guest(on, "source"))
        self.assertIn("zstd", self.refused(multifd_compression="zstd").reason)
        compresses = dataclasses.replace(_GUEST, parameters={"multifd-compression": "zlib"})
        self.assertIn("zlib", self.refused(compresses).reason)
        feature.propose(compresses, _HOST, {"multifd-compression": "none"})

    def test_kernel(self) -> None:
        """A kernel without SO_ZEROCOPY is named."""
        refused = self.refused(host=dataclasses.replace(_HOST, zero_copy_sockets=False))
        self.assertEqual(refused.where, "kernel")
        self.assertIn("6.1.0", refused.reason)

    def test_limit(self) -> None:
        """The limit has to be enough for all channels that there may be."""
        one = locked_memory(4 << 20)
        feature.propose(self.limited(4 * one), _HOST, {})
        reason = self.refused(self.limited(4 * one - 1)).reason
        self.assertIn("limit is 40.3 MiB, and 4 channels may need 40.3 MiB", reason)
        self.assertIn("LimitMEMLOCK=", reason)
        feature.propose(self.limited(one), _HOST, {"multifd-channels": 1})
        self.refused(self.limited(4 * one), multifd_channels=5)

    def test_unknown_limit(self) -> None:
        """What cannot be found out is no obstacle."""
        for guest in (_GUEST, dataclasses.replace(_GUEST, process=None)):
            self.assertEqual(feature.propose(guest, _HOST, {}), {})
        unknown = dataclasses.replace(_HOST, tcp_send_buffer=None)
        self.assertEqual(feature.propose(self.limited(1), unknown, {}), {})

    def test_locked_memory(self) -> None:
        """More for larger buffers and larger pages; never less than a whole packet's."""
        self.assertEqual(locked_memory(1 << 20), 3433509)
        self.assertGreater(locked_memory(4 << 20), 3 * locked_memory(1 << 20))
        self.assertGreater(locked_memory(1 << 20, 65536), locked_memory(1 << 20))
        self.assertGreaterEqual(locked_memory(1), 2 * 130 * 4096)


class _Small:
    """A network namespace in which send buffers stay small."""

    def __init__(self, link: Link) -> None:
        self.namespace = dataclasses.replace(link.left, address="127.0.0.1")
        script = f"echo 4096 16384 {_BUFFER} >/proc/sys/net/ipv4/tcp_wmem"
        subprocess.run([*self.namespace.prefix, "sh", "-c", script], check=True)


class LimitTests(RigCase):
    """The kernel's limit, by QEMU alone: an ordinary user's, whose receiver stalls."""

    def moved(self, label: str, namespace: Namespace, limit: int) -> tuple[str, str]:
        """Move a guest by one channel; returns the status and what QEMU says of a failure."""
        source = self.guest(
            ordinary(require(label), memlock=limit), "source", namespace=namespace, memory=48,
            loaded=_FULL,
        )  # fmt: skip
        destination = self.guest(
            require(label), "destination", namespace=namespace, memory=48, incoming=True,
            loaded=_FULL,
        )  # fmt: skip
        for_everybody(source).start()
        destination.start()
        for guest in (destination, source):
            guest.set_capabilities("events", "return-path", "multifd")
            guest.qmp("migrate-set-parameters", {"multifd-channels": 1, "max-bandwidth": 1 << 30})
        source.set_capabilities("zero-copy-send")
        destination.qmp("migrate-incoming", uri="tcp:127.0.0.1:16514")
        # It takes nothing while the source fills the buffer.
        destination.process.signal(signal.SIGSTOP)
        source.qmp("migrate", uri="tcp:127.0.0.1:16514")
        self.filled(source)
        destination.process.signal(signal.SIGCONT)
        status = source.wait_migration("completed", "failed")
        if status == "completed":
            destination.wait_ticks(3)
            destination.check_ram()
        else:
            self.assertTrue(source.running())
        said = str(source.qmp("query-migrate").get("error-desc", ""))
        for guest in (source, destination):
            guest.close()
        return status, said

    def filled(self, source: Guest) -> None:
        """Wait until the source sends no more."""
        seen: list[Any] = []

        def look() -> bool:
            progress = source.qmp("query-migrate")
            seen.append((progress["status"], progress.get("ram", {}).get("multifd-bytes")))
            return seen[-1][0] == "failed" or (
                len(seen) > 20 and bool(seen[-1][1]) and seen[-20:].count(seen[-1]) == 20
            )

        wait_until(look, "the source to stall")

    def setUp(self) -> None:
        link = self.link()
        self.namespace = _Small(link).namespace

    def test_just_enough(self) -> None:
        """With the limit that is asked for the guest is moved, whatever the receiver does."""
        for label in LABELS:
            self.assertEqual(self.moved(label, self.namespace, _NEEDED), ("completed", ""))

    def test_too_little(self) -> None:
        """With a limit of what is in flight and no more, QEMU fails: the check is needed."""
        for label in LABELS:
            status, said = self.moved(label, self.namespace, _BUFFER)
            self.assertEqual(status, "failed")
            self.assertIn("lock enough memory", said)


class ChoiceTests(PairCase):
    """What two daemons make of it."""

    def limited(self, memlock: int) -> Pair:
        """Prepare a pair whose source is an ordinary user's QEMU with that limit."""
        namespace = _Small(self.link()).namespace
        source = self.noisy_guest("10.0", "source", namespace=namespace)
        source.qemu = ordinary(require("10.0"), memlock=memlock)
        for_everybody(source)
        destination = self.waiting_guest("10.0", namespace=namespace)
        daemons = [
            self.daemon(name, guests={NAME: {"qmp": f"unix:{guest.qmp_path}"}}, namespace=namespace,
                        listen=[f"tcp:127.0.0.1:{port}"], direct_ports=ports)
            for name, guest, port, ports in (
                ("here", source, 16516, "49152-49159"), ("there", destination, 16517, "49160-49167")
            )
        ]  # fmt: skip
        return Pair(daemons[0], daemons[1], source, destination).start()

    def wishes(self, **more: Any) -> dict[str, Any]:
        return {"prefer": ["multifd"], "require": [], "exclude": [], **more}

    def test_enough(self) -> None:
        """With just enough it is taken, and the guest is moved."""
        pair = self.limited(_NEEDED)
        pair.begin("", tunables={"multifd-channels": 1}, **self.wishes())
        plan = pair.completed()["plan"]
        self.assertEqual(plan["features"], ["multifd", "zero-copy-send"])
        self.assertEqual(plan["path"], "direct")
        pair.prove_moved()

    def test_too_little(self) -> None:
        """With a page less it is not, the reason names both numbers, and the move goes on."""
        pair = self.limited(_NEEDED - 4096)
        pair.begin("", tunables={"multifd-channels": 1}, **self.wishes())
        plan = pair.completed()["plan"]
        self.assertEqual(plan["features"], ["multifd"])
        (left,) = [one for one in plan["left-out"] if one["name"] == "zero-copy-send"]
        self.assertEqual((left["side"], left["where"]), ("source", "process"))
        mib = -(-_NEEDED * 10 // (1 << 20)) / 10
        self.assertRegex(left["reason"], rf"limit is 3\.\d MiB, and 1 channels may need {mib} MiB")
        self.assertIn("ulimit -l", left["reason"])
        pair.prove_moved()

    def test_required_with_too_little(self) -> None:
        """Where it is required, the guest stays."""
        pair = self.limited(_NEEDED - 4096)
        pair.begin("", tunables={"multifd-channels": 1}, **self.wishes(require=["zero-copy-send"]))
        self.assertIn("zero-copy-send is required but cannot be had", pair.failed(pair.here))
        pair.prove_stayed()

    def test_every_qemu(self) -> None:
        """With each QEMU the guest arrives whole, and QEMU itself says how it was sent."""
        for label in LABELS:
            pair = self.pair(label).start()
            pair.begin("", **self.wishes(require=["zero-copy-send"]))
            entry = pair.completed()
            # On loopback the kernel copies after all, and QEMU counts that.
            self.assertGreater(entry["ram"]["dirty-sync-missed-zero-copy"], 0)
            self.assertEqual(entry["plan"]["path"], "direct")
            pair.prove_moved()

    def test_old_destination(self) -> None:
        """The destination's QEMU has no part in it: 11 sends into 7.2 as well."""
        pair = self.pair("11", "7.2").start()
        pair.begin("", **self.wishes(require=["zero-copy-send"]))
        pair.completed()
        pair.prove_moved()

    def test_relay(self) -> None:
        """A relay's unix sockets cannot, and the reason says so."""
        pair = self.pair("7.2").start()
        pair.begin("", **self.wishes(require=["relay"]))
        plan = pair.completed()["plan"]
        self.assertEqual((plan["path"], plan["features"]), ("relay", ["multifd"]))
        (left,) = [one for one in plan["left-out"] if one["name"] == "zero-copy-send"]
        self.assertEqual(
            left["reason"], "path: it needs another path (direct) than is open or preferred (relay)"
        )
        pair.prove_moved()
