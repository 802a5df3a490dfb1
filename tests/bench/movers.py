"""What a relay's movers cost: splicing and not copying, beside copying.

The course is that of :mod:`tests.bench.course`, without TLS.  All contestants are qmigd's
relays; they differ in what moves the stream at the source and at the destination.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.bench.course import channels_text, run_all, total_cpu
from tests.bench.ours import How, contestant
from tests.bench.relay import CHANNELS
from tests.bench.table import Row

__all__ = ["PART", "ROUNDS", "measure"]

PART = "movers"
ROUNDS = 5

#: What one run moves, in GiB.
_AMOUNT = 1.0

_COPY = "copy at both ends"

#: What moves the stream at the source and at the destination.
_OTHERS = {
    "splice sends": How(sends="splice"),
    "splice receives": How(receives="splice"),
    "zerocopy at both ends": How(sends="zerocopy", receives="zerocopy"),
}


def measure(rounds: int, tell: Callable[[str], None]) -> list[Row]:
    """Measure; ``tell`` hears of each round."""
    contestants = [contestant(name, how) for name, how in {_COPY: How(), **_OTHERS}.items()]
    costs = run_all(contestants, rounds, _AMOUNT, CHANNELS, tell)
    return [
        total_cpu(
            *(PART, f"{channels_text(count)}, {name}", costs[name, count]),
            *(_COPY, costs[_COPY, count]),
        )
        for count in CHANNELS
        for name in _OTHERS
    ]
