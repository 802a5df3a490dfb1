"""Two daemons, two QEMUs, and one guest that moves from the one to the other.

The guest's RAM is worth looking at: beside the window that its program keeps
dirtying, a good part of it is random bytes that exist on no other side, since
QEMU loads them at a reset and never into a guest that waits for a migration.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from tests.rig.bootsector import PAGE, Inconsistent, check
from tests.rig.case import RigCase
from tests.rig.daemons import Daemon
from tests.rig.guest import Guest
from tests.rig.netns import Isolated, Link
from tests.rig.news import ask_until, wait_until
from tests.rig.proofs import counted_without_a_gap, only_one_runs
from tests.rig.qemus import require
from tests.rig.qmp import Event

__all__ = [
    "ENDED",
    "FEATURES",
    "KNOWN",
    "SLOW",
    "Pair",
    "PairCase",
    "choice",
    "same_ram",
    "settings_of",
    "start",
]

#: The name under which both daemons know the guest.
NAME = "vm"

#: What two daemons without certificates can have between any two QEMUs.
FEATURES = ("multifd", "postcopy-ram", "postcopy-preempt", "zero-copy-send")

#: Every feature that there is: each is used, or there is a reason why not.
KNOWN = frozenset(entry_points(group="qmigd.features").names)

#: Statuses of a migration that is over.
ENDED = ("completed", "failed", "cancelled")

#: Bytes a second for ``max-bandwidth``: less than the guest dirties, so that precopy
#: goes on until somebody ends it.
SLOW = 4 << 20

#: MiB of RAM: less than a guest has elsewhere, so that there is less to look through.
_MEMORY = 32

_RANDOM_AT = 16 << 20
_RANDOM_SIZE = 4 << 20
_LOW_RAM = 0x10000, 0xA0000  # between the boot sector's own data and the video memory
_HIGH_RAM = 1 << 20

_MODES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # what is required, what is excluded
    "precopy": ((), ("multifd",)),
    "multifd": (("multifd",), ("postcopy-preempt",)),
    "postcopy": (("postcopy-ram",), ("multifd", "postcopy-preempt")),
    "preempt": (("postcopy-preempt",), ("multifd",)),
    "multifd-postcopy": (("multifd", "postcopy-ram"), ("postcopy-preempt",)),
    "rdma": (("rdma",), ("rdma-pin-all",)),
    "rdma-pin-all": (("rdma", "rdma-pin-all"), ()),
}


def choice(path: str, mode: str = "precopy") -> dict[str, Any]:
    """Return the arguments of ``migrate`` that lead to a path and a way to move.

    :param path: one of the three, or ``baseline``: no feature at all.
    :param mode: ``precopy``, ``multifd``, ``postcopy``, ``preempt``, ``multifd-postcopy``,
        ``rdma``, ``rdma-pin-all``.
    """
    if path == "baseline":
        return {"exclude": list(FEATURES)}
    require, exclude = _MODES[mode]
    return {"require": [path, *require], "exclude": list(exclude)}


def start(*parts: Guest | Daemon) -> None:
    """Start guests and daemons, all at the same time."""
    with ThreadPoolExecutor(len(parts)) as pool:
        for done in [pool.submit(part.start) for part in parts]:
            done.result()


def settings_of(guest: Guest) -> dict[str, Any]:
    """Return all migration capabilities and parameters of a guest's QEMU."""
    capabilities = guest.qmp("query-migrate-capabilities")
    return {
        **{entry["capability"]: entry["state"] for entry in capabilities},
        **guest.qmp("query-migrate-parameters"),
    }


def same_ram(source: Guest, destination: Guest, *, everything: bool = False) -> None:
    """Check that a guest's RAM has arrived byte for byte; neither of them runs now.

    :param everything: the guest has not run since the move.  Otherwise it has, and what
        its program writes is checked for being consistent instead.
    :raises Inconsistent: it has not; the text has the first address.
    """
    program = source.program
    ranges = [(0, source.memory)]
    if not everything:
        ranges = [_LOW_RAM, (_HIGH_RAM, program.start), (program.end, source.memory)]
    there, here = source.ram(), destination.ram()
    for begin, end in ranges:
        if there[begin:end] != here[begin:end]:
            at = next(
                page
                for page in range(begin, end, PAGE)
                if there[page : page + PAGE] != here[page : page + PAGE]
            )
            raise Inconsistent(f"Source and destination differ in the page at {at:#x}.")
    blob = there[_RANDOM_AT : _RANDOM_AT + _RANDOM_SIZE]
    if blob != source_noise():
        raise Inconsistent("The source's RAM is not what was put into it.")
    for ram in (there, here):
        check(ram[program.start : program.end], program)


@cache
def source_noise() -> bytes:
    """Return the random bytes in the guest's RAM."""
    return random.Random(7).randbytes(_RANDOM_SIZE)


class Pair:
    """A guest, the QEMU that it is in, the QEMU that it goes to, and their daemons.

    :ivar here: the source's daemon.
    :ivar there: the destination's.
    :ivar id: the migration's that was begun last.
    """

    def __init__(self, here: Daemon, there: Daemon, source: Guest, destination: Guest) -> None:
        self.here = here
        self.there = there
        self.source = source
        self.destination = destination
        self.id = ""
        self._settings: dict[Guest, dict[str, Any]] = {}
        self._heard: dict[Daemon, int] = {}

    # -- what is done ---------------------------------------------------------------

    def start(self, *, launched: bool = False) -> Pair:
        """Start all four, and remember how the QEMUs' migrations are set.

        :param launched: the destination's QEMU is for its daemon to start.
        """
        parts: list[Guest | Daemon] = [self.here, self.there, self.source]
        if not launched:
            parts.append(self.destination)
        start(*parts)
        self.remember()
        return self

    def remember(self) -> None:
        """Take the settings of both QEMUs, as they are now, for those to come back to."""
        for guest in (self.source, self.destination):
            if guest.alive:
                self._settings[guest] = settings_of(guest)

    def add(self, name: str = NAME) -> None:
        """Register both guests at daemons that run."""
        self.here.execute("guest-add", name=name, qmp=f"unix:{self.source.qmp_path}")
        self.there.execute("guest-add", name=name, qmp=f"unix:{self.destination.qmp_path}")

    def start_registering(self) -> Pair:
        """The same, but the guests are registered at run time, so that others can follow."""
        for daemon in (self.here, self.there):
            del daemon.config["guest"]
        self.start()
        self.add()
        return self

    def begin(
        self,
        path: str,
        mode: str = "precopy",
        *,
        guest: str = NAME,
        uri: str = "",
        bandwidth: int = 1 << 30,
        tunables: Mapping[str, Any] | None = None,
        **arguments: Any,
    ) -> str:
        """Ask the source's daemon for the migration, and return its id."""
        self.listen(self.here, self.there)
        done = self.here.execute(
            "migrate",
            guest=guest,
            uri=uri or self.there.uri,
            tunables={"max-bandwidth": bandwidth, **(tunables or {})},
            **{**choice(path, mode), **arguments},
        )
        self.id = done["id"]
        return self.id

    def listen(self, *daemons: Daemon) -> None:
        """From now on wait for what these daemons say from now on."""
        self._heard = {daemon: len(daemon.monitor.events) for daemon in daemons}

    def set(self, guest: str = NAME, **tunables: Any) -> None:
        """Change tunables of the migration under way."""
        values = {name.replace("_", "-"): value for name, value in tunables.items()}
        self.here.execute("migrate-set-parameters", guest=guest, tunables=values)

    def postcopy(self, guest: str = NAME) -> None:
        """Switch to postcopy once RAM is being moved."""
        self.wait(self.here, "active")
        self.here.execute("migrate-start-postcopy", guest=guest)

    def cancel(self, guest: str = NAME) -> None:
        self.here.execute("migrate-cancel", guest=guest)

    def move(self, path: str, mode: str = "precopy", **options: Any) -> dict[str, Any]:
        """Move the guest, and return what ``query-migrate`` at the source says then."""
        postcopy = "postcopy" in mode or mode == "preempt"
        if not postcopy:
            # On a busy host, or an emulated CPU, a guest that dirties its RAM is not always
            # outrun within QEMU's own 300 ms, and goes on for dozens of passes.
            options.setdefault("tunables", {"downtime-limit": 2000})
        self.begin(path, mode, bandwidth=SLOW if postcopy else 1 << 30, **options)
        if postcopy:
            self.postcopy(options.get("guest", NAME))
        return self.completed()

    # -- what is waited for ----------------------------------------------------------

    def wait(self, daemon: Daemon, *statuses: str) -> Event:
        """Wait until the migration's status at a daemon is one of these, or over."""
        wanted = {*statuses, *ENDED}

        def ours(data: dict[str, Any]) -> bool:
            return data["id"] == self.id and data["status"] in wanted

        event = daemon.monitor.wait_event("MIGRATION", where=ours, since=self._heard.get(daemon, 0))
        if event.data["status"] not in statuses:
            raise AssertionError(f"{statuses} wanted at {daemon.name}, but {event.data}")
        return event

    def wait_pass(self, number: int) -> None:
        """Wait until the source's QEMU has begun that pass over the RAM."""
        self.here.monitor.wait_event(
            "MIGRATION_PASS",
            where=lambda data: data["id"] == self.id and data["pass"] >= number,
            since=self._heard.get(self.here, 0),
        )

    def ended(self, daemon: Daemon) -> dict[str, Any]:
        """Wait until the migration is over at a daemon, and return what is known of it."""
        self.wait(daemon, *ENDED)
        return self.entry(daemon)

    def entry(self, daemon: Daemon) -> dict[str, Any]:
        """Return the migration as a daemon knows it."""
        found: dict[str, Any] = daemon.execute("query-migrate", id=self.id)[0]
        return found

    def completed(self) -> dict[str, Any]:
        """Wait until both sides say that the guest was moved."""
        for daemon in (self.here, self.there):
            entry = self.ended(daemon)
            if entry["status"] != "completed":
                raise AssertionError(f"{daemon.name}: {entry}")
        return self.entry(self.here)

    def failed(self, daemon: Daemon) -> str:
        """Wait until the migration has failed at a daemon, and return the reason."""
        entry = self.ended(daemon)
        if entry["status"] == "completed":
            raise AssertionError(f"{daemon.name}: {entry}")
        return str(entry["error"]["desc"])

    # -- what has to be true ---------------------------------------------------------

    def prove_moved(self, *passed: Guest, ended: bool = False, ticks: int = 20) -> None:
        """Check that the guest has gone over whole, and runs there alone.

        :param passed: all QEMUs that it has run in before, if not only the source's.
        :param ended: the source's QEMU was ended after the move.
        :param ticks: so many the guest counts while the source is watched.
        """
        if not ended:
            if (status := self.source.status()) != "postmigrate":
                raise AssertionError(f"After the move the source is {status}.")
            if not self.destination.running():
                raise AssertionError(f"After the move the guest is {self.destination.status()}.")
            with self.destination.stopped():
                same_ram(self.source, self.destination)
        only_one_runs(self.destination, self.source, ticks)
        counted_without_a_gap(*(passed or [self.source]), self.destination)
        self.destination.check_ram()
        self.prove_settings()

    def prove_stayed(self) -> None:
        """Check that the guest goes on at the source, alone, as if nothing had been."""
        self.source.wait_running()
        only_one_runs(self.source, self.destination)
        counted_without_a_gap(self.source)
        self.source.check_ram()
        if self.destination.lines:
            raise AssertionError(f"It has run at the destination: {self.destination.lines}")
        self.prove_settings()

    def prove_settings(self) -> None:
        """Check that every QEMU that lives is set as it was before."""
        for guest in (self.source, self.destination):
            if guest in self._settings and guest.alive:
                with contextlib.suppress(ConnectionError):
                    now, before = settings_of(guest), self._settings[guest]
                    changed = {name: now[name] for name in now if now[name] != before.get(name)}
                    if changed or now.keys() != before.keys():
                        raise AssertionError(f"{guest.name} was left with {changed}.")

    def wait_settings(self, guest: Guest) -> None:
        """Wait until a guest's QEMU is set as it was before."""

        def look() -> bool:
            return settings_of(guest) == self._settings[guest]

        wait_until(look, lambda: f"{guest.name}'s settings to come back: {settings_of(guest)}")


class PairCase(RigCase):
    """A test with two daemons and a guest that moves."""

    def two_guests(
        self,
        source: str,
        destination: str | None = None,
        *,
        link: Link | Isolated | None = None,
        **options: Any,
    ) -> tuple[Guest, Guest]:
        """Prepare the QEMU that has the guest and the one that waits for it."""
        return (
            self.noisy_guest(source, "source", namespace=link.left if link else None, **options),
            self.waiting_guest(
                destination or source, namespace=link.right if link else None, **options
            ),
        )

    def waiting_guest(
        self, label: str, name: str = "destination", *, paused: bool = False, **options: Any
    ) -> Guest:
        """Prepare a QEMU that waits for the guest; ``paused`` is the source's affair."""
        return self.noisy_guest(label, name, incoming=True, **options)

    def noisy_guest(self, label: str, name: str, **options: Any) -> Guest:
        """Prepare a guest with random bytes in its RAM."""
        options.setdefault("memory", _MEMORY)
        return self.guest(require(label), name, loaded=(_RANDOM_AT, source_noise()), **options)

    def pair(
        self,
        source: str = "7.2",
        destination: str | None = None,
        *,
        launch: bool = False,
        link: Link | Isolated | None = None,
        here: Mapping[str, Any] | None = None,
        there: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Pair:
        """Prepare two daemons and two QEMUs.

        :param launch: the destination's daemon starts its QEMU itself.
        :param link: what is between them, if not loopback.
        :param here: further settings in ``[daemon]`` of the source's.
        :param there: the same of the destination's.
        :param policy: ``[policy]`` of the source's.
        """
        one, other = self.two_guests(source, destination, link=link, **options)
        there_guest: dict[str, Any] = {"qmp": f"unix:{other.qmp_path}"}
        if launch:
            there_guest = {"launch": other.launch}
        return Pair(
            self.daemon(
                "source's qmigd",
                guests={NAME: {"qmp": f"unix:{one.qmp_path}"}},
                policy=policy,
                namespace=link.left if link else None,
                **(here or {}),
            ),
            self.daemon(
                "destination's qmigd",
                guests={NAME: there_guest},
                namespace=link.right if link else None,
                **(there or {}),
            ),
            one,
            other,
        )

    def register(self, daemon: Daemon, guest: Guest) -> None:
        """Have a daemon know a guest, whatever it knew before and has still to bring to an end."""
        ask_until(
            lambda: all("migration" not in known for known in daemon.execute("query-guests")),
            lambda: f"the guest to be free: {daemon.execute('query-guests')}",
        )
        if any(known["name"] == NAME for known in daemon.execute("query-guests")):
            daemon.execute("guest-remove", name=NAME)
        daemon.execute("guest-add", name=NAME, qmp=f"unix:{guest.qmp_path}")

    def try_again(
        self, pair: Pair, path: str, mode: str = "precopy", *, link: Link | None = None
    ) -> None:
        """Move a guest at last, after a first try that failed, to a fresh QEMU.

        :param link: what is between the two daemons, if not loopback.
        """
        old = pair.destination
        old.close()
        pair.destination = self.waiting_guest(
            old.qemu.label, "second destination", namespace=link.right if link else None
        ).start()
        self.register(pair.here, pair.source)
        self.register(pair.there, pair.destination)
        pair.remember()
        pair.move(path, mode)
        pair.prove_moved()
