"""Guests moved by qmigd on a kernel that has kernel TLS: every way, in every kind of TLS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.rig.certificates import Authority
from tests.rig.daemons import Daemon
from tests.rig.guest import Guest
from tests.rig.lane import KernelCase
from tests.rig.pair import Pair
from tests.test_moves_journeys import JourneyCase
from tests.test_moves_tls import RecordedCase, TamperedCase

_WAYS = ("precopy", "postcopy", "multifd", "preempt")

#: The path of each way where a connection in TLS cannot be handed over, and where it can.
_RELAYED = dict.fromkeys(_WAYS, "relay")
_HANDED_OVER = {**_RELAYED, "precopy": "handover", "postcopy": "handover"}

#: What the kernel counts (linux/Documentation/networking/tls.rst).
_COUNTS = ("TlsTxSw", "TlsRxSw", "TlsDecryptError")


def _kernel_counts() -> dict[str, int]:
    path = Path("/proc/net/tls_stat")
    # It is there once the kernel has loaded its TLS, for the first who asks for that.
    lines = path.read_text().splitlines() if path.exists() else ()
    found = dict(line.split() for line in lines)
    return {name: int(found[name]) if found else 0 for name in _COUNTS}


class TamperedTests(KernelCase, TamperedCase):
    """A record that was changed on its way to a kernel."""

    def test_handover(self) -> None:
        """The guest goes on at the source, whose QEMU has the other end."""
        before = _kernel_counts()["TlsDecryptError"]
        self.check("handover")
        self.assertGreater(_kernel_counts()["TlsDecryptError"], before)


class RecordedTests(KernelCase, RecordedCase):
    """What is on the wire where a QEMU owns the socket and the kernel encrypts."""

    def test_handover(self) -> None:
        """Nothing that could be read."""
        self.check("7.2", "7.2", "postcopy", channels=1, path="handover")


class MatrixCase(KernelCase, JourneyCase):
    """A journey that counts what the kernel does."""

    def setUp(self) -> None:
        self.features: set[str] = set()
        self.sides = 0

    def daemons(self, *policies: Mapping[str, Any] | None, tls: bool) -> tuple[Daemon, Daemon]:
        """Return two daemons, with certificates or without."""
        authority = Authority(self.mktemp())
        made = []
        for name, policy in zip(("one qmigd", "other qmigd"), policies, strict=True):
            daemon = self.daemon(name, policy=policy)
            if tls:
                daemon.config["tls"] = authority.host("host.example", "127.0.0.1").table()
            made.append(daemon)
        return made[0], made[1]

    def leg(self, pair: Pair, path: str, way: str, passed: list[Guest]) -> None:
        before = _kernel_counts()
        super().leg(pair, path, way, passed)
        after = _kernel_counts()
        plan = pair.entry(pair.here)["plan"]
        self.assertEqual(self.features, {"tls", "ktls"} & {*plan["features"]})
        done = {name: after[name] - before[name] for name in _COUNTS}
        # The preempt channel of a precopy may never have been opened.
        channels = len(plan["channels"])
        for direction in ("TlsTxSw", "TlsRxSw"):
            low, high = self.sides * (channels - 1), self.sides * channels
            self.assertTrue(low <= done[direction] <= high and (done[direction] or not high), done)
        self.assertEqual(done["TlsDecryptError"], 0)


class MatrixTests(MatrixCase):
    """The same guest by every way, with kernel TLS at both ends, at one, at none, or in clear."""

    def test_plain(self) -> None:
        """In clear."""
        self.journey(
            _HANDED_OVER,
            *_WAYS,
            by=("7.2", "7.2"),
            daemons=self.daemons(None, None, tls=False),
        )

    def test_tls(self) -> None:
        """TLS in user space at both ends."""
        self.features = {"tls"}
        without = {"exclude": ["ktls"]}
        self.journey(
            _RELAYED, *_WAYS, by=("7.2", "7.2"), daemons=self.daemons(without, without, tls=True)
        )

    def test_ktls(self) -> None:
        """Kernel TLS at both ends; where one channel does, QEMU has the socket."""
        self.features = {"tls", "ktls"}
        self.sides = 2
        self.journey(
            _HANDED_OVER, *_WAYS, by=("7.2", "7.2"), daemons=self.daemons(None, None, tls=True)
        )

    def test_ktls_on_one_side(self) -> None:
        """Kernel TLS at one end, which is by turns the source and the destination."""
        self.features = {"tls"}
        self.sides = 1
        self.journey(
            _RELAYED,
            *_WAYS,
            by=("7.2", "7.2"),
            daemons=self.daemons(None, {"exclude": ["ktls"]}, tls=True),
        )


class InBandTests(MatrixCase):
    """The in-band form of the handshake, which the kernel then takes over from."""

    in_band = True

    def test_ktls(self) -> None:
        """Kernel TLS at both ends, on a socket that QEMU has and in a relay."""
        self.features = {"tls", "ktls"}
        self.sides = 2
        self.journey(
            _HANDED_OVER,
            *("precopy", "preempt"),
            by=("7.2", "7.2"),
            daemons=self.daemons(None, None, tls=True),
        )
