"""``rdma`` and ``rdma-pin-all``: what they say, and a host that has no RDMA."""

from __future__ import annotations

import dataclasses
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from qmigd.features.rdma import feature, locked_memory, pin_all
from qmigd.interfaces import GuestFacts, Host, No, Process, RamBlock, RdmaDevice, Role, Yes
from tests.rig.pair import NAME, PairCase

ROLES: tuple[Role, ...] = ("source", "destination")

_GUEST = GuestFacts(
    "vm", "qemu", (10, 0, 2), "pc", {"rdma-pin-all": False, "xbzrle": False}, {},
    ram=(RamBlock("pc.ram", 64 << 20, 4096), RamBlock("pc.rom", 1 << 20, 4096)),
    types={"qio-channel-rdma": Yes()},
    process=Process(1, 1000, None, userfaultfd=False, userfaultfd_device=False),
)  # fmt: skip


def host(*addresses: str, reached: str = "") -> Host:
    """Return a host with an RDMA device that serves these addresses."""
    return Host(2, rdma=(RdmaDevice("mlx5_0", addresses),), address=reached)


class RuleTests(SynchronousTestCase):
    def agreed(
        self,
        there: Host,
        here: Host,
        source: tuple[int, int, int] = (10, 0, 2),
        destination: tuple[int, int, int] = (10, 0, 2),
    ) -> Any:
        """Return what the two sides come to."""
        proposal = feature.propose(dataclasses.replace(_GUEST, version=source), here, {})
        guest = dataclasses.replace(_GUEST, version=destination)
        agreement = feature.answer(guest, there, proposal)
        feature.accept(proposal, agreement)
        return agreement

    def test_host(self) -> None:
        """It takes a device, and an address."""
        self.assertIn("no RDMA device", feature.probe_host(Host(2)).reason)  # type: ignore[union-attr]
        answer = feature.probe_host(host())
        self.assertIn("(mlx5_0) serve no IP address", answer.reason)  # type: ignore[union-attr]
        self.assertTrue(feature.probe_host(host("192.0.2.1/24")))

    def test_qemu(self) -> None:
        """A QEMU without RDMA says why; where it is not known, it is tried."""
        without = dataclasses.replace(_GUEST, types={"qio-channel-rdma": No("why")})
        unknown = dataclasses.replace(_GUEST, types={})
        for role in ROLES:
            self.assertEqual(feature.probe_guest(without, role), No("why"))
            self.assertTrue(feature.probe_guest(unknown, role))
            self.assertTrue(feature.probe_guest(_GUEST, role))

    def test_xbzrle(self) -> None:
        """With xbzrle on it cannot be had."""
        on = dataclasses.replace(_GUEST, capabilities={"xbzrle": True})
        self.assertFalse(feature.probe_guest(on, "source"))

    def test_locked_memory(self) -> None:
        """Both sides have to be able to lock all RAM; what is not known is no obstacle."""
        needed = locked_memory(_GUEST)
        assert needed is not None and _GUEST.process is not None
        self.assertGreater(needed, 65 << 20)
        for memlock, enough in ((needed, True), (needed - 1, False), (None, True)):
            process = dataclasses.replace(_GUEST.process, memlock=memlock)
            guest = dataclasses.replace(_GUEST, process=process)
            for role in ROLES:
                self.assertEqual(bool(feature.probe_guest(guest, role)), enough)
        self.assertTrue(feature.probe_guest(dataclasses.replace(_GUEST, process=None), "source"))
        self.assertIsNone(locked_memory(dataclasses.replace(_GUEST, ram=())))

    def test_address(self) -> None:
        """The one that was reached, else one in a common subnet, else the first."""
        ours = ("192.0.2.1/24", "198.51.100.1/24", "203.0.113.1/24", "2001:db8::1/64")
        source = host("10.0.0.2/8", "203.0.113.2/24")
        for reached, wanted in (
            ("198.51.100.1", "198.51.100.1"), ("10.0.0.1", "203.0.113.1"), ("", "203.0.113.1"),
            ("2001:db8::1", "2001:db8::1"),
        ):  # fmt: skip
            self.assertEqual(self.agreed(host(*ours, reached=reached), source)["address"], wanted)
        self.assertEqual(self.agreed(host(*ours), host("10.0.0.2/8"))["address"], "192.0.2.1")

    def test_uri(self) -> None:
        """QEMU's own, with brackets around an IPv6 address."""
        self.assertEqual(feature.uri({"address": "192.0.2.1"}, "x", 49152), "rdma:192.0.2.1:49152")
        self.assertEqual(feature.uri({"address": "2001:db8::1"}, "x", 1), "rdma:[2001:db8::1]:1")

    def test_return_path(self) -> None:
        """It is off on both sides where either QEMU is older than 8.0."""
        both = host("192.0.2.1/24"), host("192.0.2.2/24")
        old = (7, 2, 22)
        cases: tuple[tuple[dict[str, Any], bool], ...] = (
            ({}, True), ({"source": old}, False), ({"destination": old}, False),
            ({"source": (8, 0, 0), "destination": (8, 0, 0)}, True),
        )  # fmt: skip
        for versions, wanted in cases:
            agreement = self.agreed(*both, **versions)
            for role in ROLES:
                settings = feature.settings(agreement, role)
                self.assertEqual(settings.capabilities, {"return-path": wanted})

    def test_senseless_messages(self) -> None:
        """What no rdma would say ends the migration."""
        proposals: tuple[dict[str, Any], ...] = (
            {}, {"addresses": "x"}, {"addresses": [1]}, {"addresses": ["x"]},
        )  # fmt: skip
        for proposal in proposals:
            self.assertRaises(ValueError, feature.answer, _GUEST, host("192.0.2.1/24"), proposal)
        proposal = {"addresses": [], "return-path": False}
        for agreement in (
            {}, {"address": "x", "return-path": False}, {"address": "192.0.2.1"},
            {"address": 3232235521, "return-path": False},
            {"address": "192.0.2.1", "return-path": True},
        ):  # fmt: skip
            self.assertRaises(ValueError, feature.accept, proposal, agreement)

    def test_pin_all(self) -> None:
        """QEMU's capability, on both sides, and nothing without rdma."""
        self.assertEqual(pin_all.requires, {"rdma"})
        self.assertEqual(pin_all.probe_host(Host(2)), feature.probe_host(Host(2)))
        for role in ROLES:
            self.assertEqual(pin_all.settings({}, role).capabilities, {"rdma-pin-all": True})
        self.assertFalse(
            pin_all.probe_guest(dataclasses.replace(_GUEST, capabilities={}), "source")
        )


class WithoutTests(PairCase):
    """Hosts without RDMA: the lane's tests are those with it."""

    def test_reason(self) -> None:
        """The host is named, and whoever requires it is refused."""
        pair = self.pair("7.2", here={"guest_deadline": 5}).start()
        answer = pair.here.execute("query-features", guest=NAME, uri=pair.there.uri)
        features = {one["name"]: one for one in answer["features"]}
        for name in ("rdma", "rdma-pin-all"):
            found = features[name]
            self.assertEqual((found["offered"], found["selected"]), (False, False))
            self.assertEqual((found["side"], found["where"]), ("source", "host"))
            self.assertIn("no RDMA device", found["reason"])
        pair.begin("", require=["rdma"], exclude=[])
        self.assertIn("rdma is required but cannot be had: source host", pair.failed(pair.here))
        pair.prove_stayed()
