"""``make demo GUEST=memory``: the same with qmigd's own guest, where there is no QEMU.

Nothing of it takes a system package or another user than the one who runs it.  The guest is
a process that each daemon starts by itself.  It is shown to have counted on without a gap, over
all three processes, and each page of its RAM to hold what it wrote there last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qmigd.guests.memory.workload import TICKS
from tests.rig.memory import MemoryGuest
from tests.rig.news import ask_until
from tests.rig.stage import Demo, Host, Problem, facts

__all__ = ["MemoryDemo"]

_SIZE = 256  # MiB
_RATE = 6  # MiB a second
_GUEST: Mapping[str, Any] = {"size": f"{_SIZE}M", "dirty-rate": f"{_RATE}M/s", "fill": "random"}


class MemoryDemo(Demo):
    """The demo with a memory guest."""

    def run(self) -> None:
        self.hosts()
        # A runs it from the start; B starts one when the guest comes.
        here = self.host("host-a", {"memory": _GUEST})
        there = self.host("host-b", {"memory": {**_GUEST, "incoming": True}})
        home = self._guest(here)
        ask_until(lambda: home.status() == "running", "the guest to run")
        home.adopt()
        self.title("A running guest")
        self._introduce(here, there)

        self.title("There ...")
        first = self.migrate(here, there)
        away = self._guest(there).adopt()
        self._check([here, there], away)

        self.title("... and back")
        second = self.migrate(there, here)
        again = self._guest(here).adopt()
        self._check([here, there, here], again)

        self.title("What was negotiated, and why")
        self.show_plan(here, first["plan"], second["plan"])
        again.wait_ticks(20)
        self._check_count([here, there, here], again)
        self.console.print(
            f"\nThe guest counted to {again.clock()['ticks']} in three processes, and not one "
            f"number is missing or came twice."
        )

    def _guest(self, host: Host) -> MemoryGuest:
        guest = MemoryGuest.of(host.daemon, "demo")
        self.guests.append(guest)
        return guest

    def _introduce(self, here: Host, there: Host) -> None:
        table = facts(3)
        table.add_row(
            here.name,
            here.daemon.uri,
            f"runs the guest: qmigd's own, {_SIZE} MiB, full of noise; it writes {_RATE} MiB of "
            f"its RAM and counts {TICKS} ticks each second",
        )
        table.add_row(there.name, there.daemon.uri, "has no guest yet; its qmigd will start one")
        self.console.print(table)

    def _check_count(self, hosts: list[Host], now: MemoryGuest) -> list[dict[str, Any]]:
        """Check that it has counted on from place to place; returns where from where to.

        :raises Problem: it has not.
        """
        places: list[dict[str, Any]] = now.clock()["places"]
        ends = [place["to"] for place in places[:-1]]
        begins = [place["from"] for place in places[1:]]
        if len(places) != len(hosts) or ends != begins:
            raise Problem(f"The guest has not counted on without a gap: {places}.")
        return places

    def _check(self, hosts: list[Host], now: MemoryGuest) -> None:
        """Check the guest's RAM and its count where it runs now, and say so."""
        if now.status() != "running":
            raise Problem(f"The guest does not run on {hosts[-1].name}: it is {now.status()}.")
        now.wait_ticks(1)
        places = self._check_count(hosts, now)
        now.check()
        written = now.clock()["written"]
        table = facts(2)
        table.add_row(
            "  RAM  ",
            f"[green]right[/]: all {_SIZE << 8:,} pages ({_SIZE} MiB) hold what the guest wrote "
            f"there last, in {written:,} writes",
        )
        table.add_row(
            "  count",
            "; ".join(
                f"on {host.name} from tick {place['from']}"
                for host, place in zip(hosts, places, strict=True)
            ),
        )
        self.console.print(table)
