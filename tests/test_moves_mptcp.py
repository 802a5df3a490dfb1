"""Multipath TCP: where both hosts have it switched on, payload goes by it on every path."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path
from unittest import SkipTest

from qmigd.transports.mptcp import is_available
from tests.rig.netns import Link, Namespace
from tests.rig.news import ask_until
from tests.rig.pair import SLOW
from tests.test_moves_journeys import JourneyCase


def accepted(what: str = "MPCapableACKRX", namespace: Namespace | None = None) -> int:
    """Return how many connections this kernel has accepted that began as Multipath TCP.

    :param what: ``MPJoinAckRx``: how many further ways of such ones.
    """
    path = "/proc/net/netstat"
    if namespace is not None:
        command = [*namespace.prefix, "cat", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        text = Path(path).read_text()
    names, numbers = (line.split() for line in text.splitlines() if line.startswith("MPTcpExt:"))
    return int(dict(zip(names, numbers, strict=True))[what])


def require_mptcp() -> None:
    """Skip the test that asks where this host's kernel has none.

    :raises SkipTest: with the reason.
    """
    if reason := is_available():
        raise SkipTest(f"This host: {reason}.")


class MptcpCase(JourneyCase):
    """Two daemons that have it switched on."""

    def move(self, *labels: str, path: str, mode: str, least: int) -> None:
        """Move a guest, and see that at least so many connections were Multipath TCP."""
        before = accepted()
        on = {"mptcp": True}
        pair = self.pair(*labels, here=on, there=on).start()
        plan = pair.move(path, mode)["plan"]
        pair.prove_moved()
        self.assertIn("mptcp", plan["features"])
        self.assertGreaterEqual(accepted() - before, least)
        self.assertNotIn("ordinary TCP connection", pair.here.log)


class MptcpTests(MptcpCase):
    """On this host's kernel."""

    def setUp(self) -> None:
        require_mptcp()

    def test_handover(self) -> None:
        """QEMU is given such a socket."""
        self.move("7.2", "11", path="handover", mode="postcopy", least=2)

    def test_direct(self) -> None:
        """QEMU makes such connections itself, for every channel."""
        self.move("10.0", "11", path="direct", mode="multifd", least=4)

    def test_relay(self) -> None:
        """Every channel of a relay is one."""
        self.move("11", "10.0", path="relay", mode="multifd", least=4)

    def test_one_side(self) -> None:
        """Where one side does without it, TCP is what there is, and the reason is said."""
        pair = self.pair("7.2", here={"mptcp": True}).start()
        plan = pair.move("relay")["plan"]
        pair.prove_moved()
        left = {one["name"]: one for one in plan["left-out"]}["mptcp"]
        self.assertIn("it is switched off ('mptcp' in [daemon])", left["reason"])
        self.assertEqual(left["side"], "destination")


class TwoNetworksTests(JourneyCase):
    """Two hosts with two networks between them, one of which fails."""

    def setUp(self) -> None:
        require_mptcp()

    def test_one_is_lost(self) -> None:
        """A move goes on over the other network, though the first one takes every byte away."""
        link = self.link()
        _second_network(link)
        on = {"mptcp": True}
        # A further way to another address has to find somebody who listens there.
        there = {**on, "listen": ["tcp::16516"]}
        pair = self.pair("7.2", link=link, here=on, there=there).start()
        uri = f"tcp:{link.right.address}:16516"
        pair.begin("relay", "multifd", uri=uri, bandwidth=SLOW)
        pair.wait_pass(1)
        plan = pair.entry(pair.here)["plan"]
        self.assertIn("mptcp", plan["features"])
        connections = 1 + len(plan["channels"])
        for what in ("MPCapableACKRX", "MPJoinAckRx"):
            ask_until(partial(_accepted, what, link, connections), what)
        link.cut()
        pair.set(max_bandwidth=1 << 30)
        pair.completed()
        pair.prove_moved()

    def test_kernel_without(self) -> None:
        """A daemon on a kernel that has it switched off does without, and says why."""
        link = self.link()
        off = ("sh", "-c", "echo 0 >/proc/sys/net/mptcp/enabled")
        subprocess.run([*link.right.prefix, *off], check=True)
        pair = self.pair("7.2", link=link, here={"mptcp": True}, there={"mptcp": True}).start()
        plan = pair.move("direct")["plan"]
        pair.prove_moved()
        left = {one["name"]: one for one in plan["left-out"]}["mptcp"]
        self.assertIn(
            "its kernel does not do Multipath TCP (Protocol not available)", left["reason"]
        )
        self.assertEqual((left["side"], left["where"]), ("destination", "kernel"))


def _accepted(what: str, link: Link, least: int) -> bool:
    return accepted(what, link.right) >= least


def _second_network(link: Link) -> None:
    """Join the two namespaces once more, and let Multipath TCP use that, too."""
    left, right = link.left.name, link.right.name
    for words in (
        ("link", "add", "spare", "netns", left, "type", "veth", "peer", "spare", "netns", right),
        ("-n", left, "address", "add", "10.214.0.1/24", "dev", "spare"),
        ("-n", right, "address", "add", "10.214.0.2/24", "dev", "spare"),
        ("-n", left, "link", "set", "spare", "up"),
        ("-n", right, "link", "set", "spare", "up"),
        ("-n", left, "mptcp", "limits", "set", "subflow", "4", "add_addr_accepted", "4"),
        ("-n", right, "mptcp", "limits", "set", "subflow", "4", "add_addr_accepted", "4"),
        ("-n", right, "mptcp", "endpoint", "add", "10.214.0.2", "dev", "spare", "signal"),
    ):
        subprocess.run(["ip", *words], check=True, capture_output=True)
