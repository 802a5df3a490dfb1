"""What has to be true of a guest that was moved, whoever moved it."""

from __future__ import annotations

from tests.rig.bootsector import PAGE, Inconsistent, check
from tests.rig.guest import Guest

__all__ = ["compare_ram", "counted_without_a_gap", "only_one_runs"]

_LOW_RAM = 0x10000, 0xA0000  # between the boot sector's own data and the video memory
_HIGH_RAM = 1 << 20


def compare_ram(one: Guest, other: Guest) -> None:
    """Check that two guests, neither of which runs, hold the same RAM, byte for byte.

    :raises Inconsistent: they do not; the text has the first address.
    """
    first, second = one.ram(), other.ram()
    for start, end in (_LOW_RAM, (_HIGH_RAM, one.memory)):
        if first[start:end] != second[start:end]:
            at = next(
                page
                for page in range(start, end, PAGE)
                if first[page : page + PAGE] != second[page : page + PAGE]
            )
            raise Inconsistent(f"{one.name} and {other.name} differ in the page at {at:#x}.")
    check(second[other.program.start : other.program.end], other.program)


def counted_without_a_gap(*guests: Guest) -> None:
    """Check that these, in the order in which the guest ran on them, show one count.

    A line may have been cut by the move; then its halves are on two ports, and
    the number between two hosts is missing, which is allowed for one tick.

    :raises AssertionError: a tick is missing, or came twice.
    """
    last = -1
    for guest in guests:
        for index, line in enumerate(guest.lines):
            steps = {1} if index else {1, 2}
            if last >= 0 and line.tick - last not in steps:
                raise AssertionError(f"{guest.name} reports tick {line.tick} after {last}.")
            last = line.tick


def only_one_runs(runs: Guest, other: Guest, ticks: int = 20) -> None:
    """Check that ``runs`` counts on, and that ``other`` has nothing more to say meanwhile.

    :raises AssertionError: the other runs too.
    """
    before = len(other.lines)
    runs.wait_ticks(ticks)
    if other.running() or len(other.lines) != before:
        raise AssertionError(
            f"{runs.name} runs (tick {runs.counter}), and so does {other.name}: "
            f"{other.status()}, tick {other.counter}."
        )
