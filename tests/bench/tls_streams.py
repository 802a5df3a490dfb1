"""Whole moves in TLS: through qmigd's relay, and from QEMU to QEMU with QEMU's own TLS.

The same guest, daemons and certificates; which of the two ways a plan takes by itself rests
on these numbers.  Either is compared with the same path without TLS as well.  CPU is that of
both QEMUs and both daemons.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack

from tests.bench.course import GIB, channels_text
from tests.bench.moves import Chain, Moved, Way
from tests.bench.table import Judge, Row, compare
from tests.rig.certificates import Authority
from tests.rig.daemons import Daemon

__all__ = ["PART", "ROUNDS", "measure"]

PART = "tls-streams"
ROUNDS = 5

#: MiB of non-zero RAM.
_RAM = 1024

_CHANNELS = (1, 4)

#: The ways by their names in the table.
_WAYS = {
    "relay, TLS": ("relay", True),
    "QEMU's own TLS": ("direct", True),
    "relay, plain": ("relay", False),
    "direct, plain": ("direct", False),
}
_RELAY, _DIRECT, _PLAIN_RELAY, _PLAIN_DIRECT = _WAYS

_Moves = dict[tuple[str, int], list[Moved]]


def measure(rounds: int, tell: Callable[[str], None]) -> list[Row]:
    """Measure; ``tell`` hears of each round."""
    moves: _Moves = {(name, count): [] for count in _CHANNELS for name in _WAYS}
    with ExitStack() as stack:
        authority = Authority(stack.enter_context(tempfile.TemporaryDirectory()))
        here, there = (
            # Where the kernel could do it: what is compared is done by QEMU and by qmigd.
            stack.enter_context(Daemon(name, tls=files.table(), policy={"exclude": ["ktls"]}))
            for name in ("source", "destination")
            for files in [authority.host("host.example", "127.0.0.1")]
        )
        here.start()
        there.start()
        tell(f"filling {_RAM} MiB of RAM")
        chain = stack.enter_context(Chain(here, there, _RAM))
        chain.by_qmigd(Way("first", "handover"))
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            for name, count in list(moves)[:: -1 if number % 2 else 1]:
                path, tls = _WAYS[name]
                moves[name, count].append(chain.by_qmigd(Way(name, path, count, tls)))
        chain.check()
    gib = chain.ram / GIB
    pairs = ((_RELAY, _DIRECT), (_RELAY, _PLAIN_RELAY), (_DIRECT, _PLAIN_DIRECT))
    return [
        row
        for make in (_cpu, _speed)
        for one, other in pairs
        for count in _CHANNELS
        for row in [make(moves, gib, one, other, count)]
    ]


def _cpu(moves: _Moves, gib: float, one: str, other: str, count: int) -> Row:
    aimed = (one, other) == (_RELAY, _DIRECT)
    judge: Judge | None = (lambda median, quartiles: median < 1) if aimed else None
    return compare(
        *(PART, f"{one}, {_text(count)}: CPU", "s/GiB", other),
        *(
            [(move.cpu + move.daemons_cpu) / gib for move in moves[name, count]]
            for name in (one, other)
        ),
        target="below 1.00" if aimed else "",
        judge=judge,
    )


def _speed(moves: _Moves, gib: float, one: str, other: str, count: int) -> Row:
    return compare(
        *(PART, f"{one}, {_text(count)}: speed", "GiB/s", other),
        *([gib / move.stream for move in moves[name, count]] for name in (one, other)),
    )


def _text(count: int) -> str:
    return f"multifd {count}" if count > 1 else channels_text(count)
