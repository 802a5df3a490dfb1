"""``python -m tests.bench``: everything measured in one run, and written as one table.

The table goes to standard output, what is going on to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from tests.bench import (
    handshakes,
    inspecting,
    ktls,
    memory,
    movers,
    moves,
    negotiation,
    relay,
    streams,
    tls,
    tls_streams,
)
from tests.bench.table import Row, to_json, write

#: What measures a part: it gets the number of rounds, and somebody to tell of each.
Measure = Callable[[int, Callable[[str], None]], list[Row]]

#: Load per CPU from which on a machine counts as busy with something else.
_BUSY = 0.5


_PARTS: dict[str, tuple[Measure, int]] = {
    negotiation.PART: (negotiation.measure, negotiation.ROUNDS),
    streams.PART: (streams.measure, streams.ROUNDS),
    relay.PART: (relay.measure, relay.ROUNDS),
    movers.PART: (movers.measure, movers.ROUNDS),
    tls.PART: (tls.measure, tls.ROUNDS),
    tls_streams.PART: (tls_streams.measure, tls_streams.ROUNDS),
    ktls.PART: (ktls.measure, ktls.ROUNDS),
    handshakes.PART: (handshakes.measure, handshakes.ROUNDS),
    memory.PART: (memory.measure, memory.ROUNDS),
    inspecting.PART: (inspecting.measure, inspecting.ROUNDS),
}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure qmigd against its peers, and write one table.",
        epilog="docs/benchmarks.md says how to read it.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only these: {', '.join(_PARTS)}")
    parser.add_argument("--rounds", type=int, help="how often, instead of each part's own number")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there as well")
    arguments = parser.parse_args()
    for part in arguments.parts:
        if part not in _PARTS:
            parser.error(f"there is no part {part}; there are {', '.join(_PARTS)}")
    if arguments.rounds is not None and arguments.rounds < 1:
        parser.error("--rounds has to be at least 1")
    return arguments


def main() -> int:
    """Measure what was asked for; returns 1 where something could not be measured."""
    arguments = _arguments()
    begun = time.monotonic()
    load, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    rows: list[Row] = []
    failed = False
    for part, (measure, rounds) in _PARTS.items():
        if arguments.parts and part not in arguments.parts:
            continue
        try:
            rows += measure(arguments.rounds or rounds, partial(_tell, part))
        except Exception as error:  # the other parts are worth having all the same
            failed = True
            rows.append(Row(part, "not measured", "", note=str(error)))
        finally:
            _tell("", "")
    heading = (
        f"qmigd and its peers, {datetime.now(UTC):%Y-%m-%d}: {cpus} CPUs, "
        f"QEMU {moves.system_qemu().version}, Python {platform.python_version()}, "
        f"load at the start {load:.1f}, took {time.monotonic() - begun:.0f} s"
    )
    write(rows, heading, sys.stdout)
    if load > _BUSY * cpus:
        print("The machine was busy before this began: do not trust these numbers.")
    if arguments.json:
        result = {"heading": heading, "cpus": cpus, "load": load, "rows": to_json(rows)}
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


def _tell(part: str, text: str) -> None:
    """Say on standard error what is going on, on one line where it is a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{part}: {text}" if part else "\r\x1b[K", end="", file=sys.stderr)
        sys.stderr.flush()
    elif part:
        print(f"{part}: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
