"""How fast RAM moves by each path, against QEMU alone on the same kind of path.

Speed is that of the stream, from the source's first ``MIGRATION`` event to its
``completed``; what comes before is the affair of :mod:`tests.bench.negotiation`.  CPU
is that of both QEMUs and both daemons.  A relay's bytes pass through more hands, so
that its peer is QEMU alone over tcp: what the relay costs a whole move.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from tests.bench.moves import Chain, Moved, Way
from tests.bench.table import Row, compare
from tests.rig.daemons import Daemon

__all__ = ["PART", "ROUNDS", "measure"]

PART = "streams"
ROUNDS = 7

#: MiB of non-zero RAM.
_RAM = 1024

_GIB = 1 << 30

_NATIVE = (
    Way("handover, 1 channel", "handover"),
    Way("direct, 1 channel", "direct"),
    Way("direct, multifd 4", "direct", 4),
)
_RELAYS = (
    Way("relay, 1 channel", "relay"),
    Way("relay, multifd 4", "relay", 4),
)

#: Where noise hides the truth, a ratio this close to 1 is as good as 1.
_NEAR = 0.98


def _as_fast(median: float, quartiles: tuple[float, float]) -> bool:
    """Whether a ratio of speeds is 1.00 within the noise of the rounds."""
    return median >= _NEAR or quartiles[1] >= 1.0


def measure(rounds: int, tell: Callable[[str], None]) -> list[Row]:
    """Measure; ``tell`` hears of each round."""
    moved: dict[Way, list[tuple[Moved, Moved]]] = {}
    with ExitStack() as stack:
        here, there = (stack.enter_context(Daemon(name)) for name in ("source", "destination"))
        here.start()
        there.start()
        tell(f"filling {_RAM} MiB of RAM")
        chain = stack.enter_context(Chain(here, there, _RAM))
        chain.by_qmigd(_NATIVE[0])
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            for way in (*_NATIVE, *_RELAYS):
                pair = chain.pair(way, alone_first=number % 2 == 1)
                moved.setdefault(way, []).append(pair)
    gib = chain.ram / _GIB
    rows = [_speed(way, pairs, gib, way in _NATIVE) for way, pairs in moved.items()]
    return [*rows, *(_cpu(way, pairs, gib) for way, pairs in moved.items())]


def _peer(way: Way) -> str:
    kind = "fd:" if way.one_socket else "tcp:"
    return f"QEMU alone, {kind}" + (f", multifd {way.channels}" if way.channels > 1 else "")


def _speed(way: Way, pairs: list[tuple[Moved, Moved]], gib: float, native: bool) -> Row:
    return compare(
        PART,
        f"{way.name}: speed",
        "GiB/s",
        _peer(way),
        [gib / ours.stream for ours, _ in pairs],
        [gib / alone.stream for _, alone in pairs],
        target="1.00 within noise" if native else "",
        judge=_as_fast if native else None,
    )


def _cpu(way: Way, pairs: list[tuple[Moved, Moved]], gib: float) -> Row:
    return compare(
        PART,
        f"{way.name}: CPU",
        "s/GiB",
        _peer(way),
        [(ours.cpu + ours.daemons_cpu) / gib for ours, _ in pairs],
        [alone.cpu / gib for _, alone in pairs],
    )
