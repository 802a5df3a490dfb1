"""Peers by name: with several addresses, IPv6 among them, or none, in network namespaces."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.rig.keeper import keep_directory
from tests.rig.netns import Link
from tests.rig.pair import PairCase

#: What nobody answers at, in either family.
_DEAD = ("fd00:213::99", "10.213.0.99")
_IPV6 = "fd00:213::2"


class NameTests(PairCase):
    def two_hosts(self, *addresses: str) -> Link:
        """Make two hosts, with IPv6 as well; the left one takes these for ``far.example``'s."""
        link = self.link()
        for end, address in ((link.left, "fd00:213::1"), (link.right, _IPV6)):
            subprocess.run(
                ["ip", "-n", end.name, "address", "add", f"{address}/64", "dev", "veth", "nodad"],
                check=True,
            )
        for address in _DEAD:  # it is sent somewhere, and nobody ever says that it got nowhere
            subprocess.run(
                ["ip", "-n", link.left.name, "neighbour", "replace", address]
                + ["lladdr", "02:00:00:00:00:ff", "dev", "veth", "nud", "permanent"],
                check=True,
            )
        # What ip-netns(8) shows its processes as /etc/hosts.
        directory = Path("/etc/netns", link.left.name)
        made = directory.parent if not directory.parent.exists() else directory
        directory.mkdir(parents=True)
        keep_directory(str(made))
        self.addCleanup(shutil.rmtree, made)
        lines = [f"{address} far.example" for address in addresses]
        (directory / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        return link

    def check(self, path: str, mode: str, *addresses: str, form: str = "") -> None:
        """Move a guest to ``far.example``.

        :param form: of the handshake, ``in-band:`` or nothing.
        """
        there = {"listen": [f"{form}tcp::16516"]}
        pair = self.pair("7.2", link=self.two_hosts(*addresses), there=there).start()
        pair.move(path, mode, uri=f"{form}tcp:far.example:16516")
        pair.prove_moved()

    def test_first_is_dead(self) -> None:
        """The next address is tried while the first is silent; QEMU connects to the good one."""
        self.check("direct", "multifd", _DEAD[0], "10.213.0.2")

    def test_ipv6(self) -> None:
        """IPv6 is used where it answers, and IPv4 does not; here with the handshake in-band."""
        self.check("direct", "precopy", _DEAD[1], _IPV6, form="in-band:")

    def test_all_dead(self) -> None:
        """Where no address answers, or there is none, that is said, and the guest goes on."""
        link = self.two_hosts(*_DEAD)
        pair = self.pair("7.2", link=link, here={"handshake_deadline": 1}).start()
        for uri, why in (
            ("tcp:far.example", "did not come within 1 seconds"),
            ("tcp:nowhere.example", "the name cannot be looked up: no results"),
            ("tcp:a..b", "invalid hostname: a..b"),
            ("vsock:1:6000", "no qmigd can be reached at vsock:1:6000: "),
        ):
            pair.begin("relay", uri=uri)
            self.assertIn(why, pair.failed(pair.here))
        pair.prove_stayed()
