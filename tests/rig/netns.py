"""Two network namespaces and a link between them that can be cut.

Daemons and QEMUs are put into one with ``namespace=link.left``; their unix sockets
are reached from outside as ever.  Only namespaces made here are touched.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from dataclasses import dataclass
from unittest import SkipTest

from tests.rig.keeper import keep_command

__all__ = ["Isolated", "Link", "Namespace", "require"]

_numbers = itertools.count()


@dataclass(frozen=True)
class Namespace:
    """One end of the link.

    :ivar address: its IPv4 address there; empty: it has none.
    """

    name: str
    address: str
    mac: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command line begins with to run in here."""
        return ("ip", "netns", "exec", self.name)


def require() -> None:
    """Skip the test that asks if there can be no namespaces; under ``CI`` go on and fail.

    :raises SkipTest: with the reason.
    """
    if os.environ.get("CI"):
        return
    if os.geteuid() != 0:
        raise SkipTest("Network namespaces need root.")
    if shutil.which("ip") is None:
        raise SkipTest("Network namespaces need the program ip (package iproute2).")


class Link:
    """Two namespaces joined by a pair of veth devices; a context manager that removes them."""

    def __init__(self) -> None:
        """Make the namespaces and the link.

        :raises RuntimeError: the host does not allow it; the text has ip's words.
        """
        stem = f"qmigd-{os.getpid()}-{next(_numbers)}"
        self.left = Namespace(f"{stem}-left", "10.213.0.1", "02:00:00:00:00:01")
        self.right = Namespace(f"{stem}-right", "10.213.0.2", "02:00:00:00:00:02")
        try:
            for end in (self.left, self.right):
                _ip("netns", "add", end.name)
                keep_command(["ip", "netns", "delete", end.name])
                _ip("-n", end.name, "link", "set", "lo", "up")
            _ip(
                *("link", "add", "veth", "netns", self.left.name, "address", self.left.mac),
                *("type", "veth"),
                *("peer", "veth", "netns", self.right.name, "address", self.right.mac),
            )
            for end in (self.left, self.right):
                _ip("-n", end.name, "address", "add", f"{end.address}/24", "dev", "veth")
                _ip("-n", end.name, "link", "set", "veth", "up")
            self.restore()
        except BaseException:
            self.close()
            raise

    def cut(self) -> None:
        """Cut the link: nothing arrives any more, and nobody is told.

        Both ends send to an Ethernet address that nobody has, as if a switch
        between them had died; their own devices stay up.
        """
        self._aim("02:00:00:00:00:ff", "02:00:00:00:00:ff")

    def restore(self) -> None:
        """Make the link whole again."""
        self._aim(self.right.mac, self.left.mac)

    def drop_answers(self, ports: str) -> None:
        """Lose whatever the right end sends from these TCP ports, as a firewall would.

        The left end's kernel then calls again each second (from Linux 6.5 on; an older one
        after 1, 3, 7 and 15), and not only after 1, 2, 3, 4 and then 6, 10 and so on.

        :param ports: ``FIRST-LAST``.
        """
        self._blackhole("add", ports)
        directory = "/proc/sys/net/ipv4"
        _ip(
            *("netns", "exec", self.left.name, "sh", "-c"),
            f"cd {directory}; test -e tcp_syn_linear_timeouts || exec echo 3 >tcp_syn_retries;"
            "echo 60 >tcp_syn_linear_timeouts; echo 60 >tcp_syn_retries",
        )

    def let_answers_in(self, ports: str) -> None:
        """Lose them no more; whoever calls hears of it with the next call."""
        self._blackhole("delete", ports)

    def _blackhole(self, action: str, ports: str) -> None:
        rule = ("ipproto", "tcp", "sport", ports, "blackhole")
        _ip("-n", self.right.name, "rule", action, *rule)

    def _aim(self, left: str, right: str) -> None:
        for here, there, mac in ((self.left, self.right, left), (self.right, self.left, right)):
            _ip(
                *("-n", here.name, "neighbour", "replace", there.address),
                *("lladdr", mac, "dev", "veth", "nud", "permanent"),
            )

    def close(self) -> None:
        """Remove the namespaces and what is in them; harmless when that has happened."""
        for end in (self.left, self.right):
            subprocess.run(["ip", "netns", "delete", end.name], check=False, capture_output=True)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Isolated:
    """Two namespaces from which nothing can be reached; a context manager that removes them.

    There is no interface in either but the kernel's own loopback, which is down.
    """

    def __init__(self) -> None:
        """Make the namespaces.

        :raises RuntimeError: the host does not allow it; the text has ip's words.
        """
        stem = f"qmigd-{os.getpid()}-{next(_numbers)}"
        self.left = Namespace(f"{stem}-left", "", "")
        self.right = Namespace(f"{stem}-right", "", "")
        try:
            for end in (self.left, self.right):
                _ip("netns", "add", end.name)
                keep_command(["ip", "netns", "delete", end.name])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove the namespaces; harmless when that has happened."""
        for end in (self.left, self.right):
            subprocess.run(["ip", "netns", "delete", end.name], check=False, capture_output=True)

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
