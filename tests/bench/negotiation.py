"""What the negotiation adds to a move, on loopback, on top of QEMU's own start.

With qmigd: from the command ``migrate`` on the management socket to the source's
QEMU's first ``MIGRATION`` event.  Without: from the first command of a QMP script
that sets both QEMUs up in the same way to the same event.  The difference is what
the target is about; it holds greeting, features, preflight, plan, settings on both
sides and their readback, and the connection for the stream.

The pause of the guest is there because the hand-over at the end is qmigd's as well.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from tests.bench.moves import Chain, Moved, Way
from tests.bench.table import Row, compare, single
from tests.rig.daemons import Daemon

__all__ = ["PART", "ROUNDS", "measure"]

PART = "negotiation"
ROUNDS = 21

_PEER = "QEMU alone"

#: ms that the negotiation may add.
_TARGET = 10.0

#: MiB of RAM that the guest has filled: enough for a stream, little enough to be quick.
_RAM = 32

_WAYS = (
    Way("nothing chosen", None),
    Way("baseline", "baseline"),
    Way("handover", "handover"),
    Way("relay, multifd 2", "relay", 2),
)


def measure(rounds: int, tell: Callable[[str], None]) -> list[Row]:
    """Measure; ``tell`` hears of each round."""
    with ExitStack() as stack:
        here, there = (stack.enter_context(Daemon(name)) for name in ("source", "destination"))
        here.start()
        there.start()
        chain = stack.enter_context(Chain(here, there, _RAM))
        tell("first move")
        first = chain.by_qmigd(_WAYS[0])
        for way in _WAYS:  # each has been gone once: nobody has anything to load any more
            chain.pair(way, alone_first=False)
        moved: dict[Way, list[tuple[Moved, Moved]]] = {way: [] for way in _WAYS}
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            for way in _WAYS:
                moved[way].append(chain.pair(way, alone_first=number % 2 == 1))
        chain.check()
    starts = [_start(way, pairs) for way, pairs in moved.items()]
    pauses = [_pause(way, pairs) for way, pairs in moved.items()]
    return [
        *starts,
        single(
            PART,
            "by qmigd's own clock",
            "ms",
            [ours.told for ours, _ in moved[_WAYS[0]]],
            note="negotiation-time of query-migrate, with nothing chosen",
        ),
        single(
            PART,
            "a daemon's first move: to the start",
            "ms",
            [first.begin],
            note="nothing has been loaded then, and nothing is known of this build of QEMU",
        ),
        *pauses,
    ]


def _start(way: Way, pairs: list[tuple[Moved, Moved]]) -> Row:
    return compare(
        PART,
        f"{way.name}: to the start",
        "ms",
        _PEER,
        [ours.begin for ours, _ in pairs],
        [alone.begin for _, alone in pairs],
        relation="difference",
        target=f"under +{_TARGET:.0f} ms",
        judge=lambda median, _: median < _TARGET,
    )


def _pause(way: Way, pairs: list[tuple[Moved, Moved]]) -> Row:
    return compare(
        PART,
        f"{way.name}: pause of the guest",
        "ms",
        _PEER,
        [ours.downtime for ours, _ in pairs],
        [alone.downtime for _, alone in pairs],
        relation="difference",
    )
