"""What TLS costs where the kernel does it, beside a relay's threads, and beside none.

On a kernel that has it, booted under emulation (:mod:`tests.rig.lane`); the course is that
of :mod:`tests.bench.course`, all of it in there.  A *handover* has no relays: the source
and the sink get the connection itself, as QEMU does.

On an emulated CPU seconds mean nothing by themselves; what counts is which way is cheaper,
and roughly by how much.  And that only if AES does not hide all the rest: QEMU from 8.2 on
emulates it with the host's own, and under 7.2 a handover in kernel TLS took four times as long.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from tests.bench.course import Cost, run, total_cpu
from tests.bench.ours import How, contestant
from tests.bench.table import Row
from tests.rig import kernel, qemus
from tests.rig.lane import Lane

__all__ = ["PART", "ROUNDS", "inside", "measure", "note"]

PART = "ktls"
ROUNDS = 2

#: The QEMU that emulates.
_MACHINE = "10.0"

#: What the table calls it.
_TITLE = "ktls, emulated"

#: What one run moves, in GiB.
_AMOUNT = 96 / 1024

_PLAIN_HANDOVER, _HANDOVER = "handover, plain", "handover, kernel TLS"
_PLAIN_RELAY, _RELAY, _THREADS = "relay, plain", "relay, kernel TLS", "relay, user-space TLS"

_WAYS = {
    _PLAIN_HANDOVER: How("handover"),
    _HANDOVER: How("handover", "kernel"),
    _PLAIN_RELAY: How("relay"),
    _RELAY: How("relay", "kernel"),
    _THREADS: How("relay", "relay"),
}

#: What is compared with what.
_PAIRS = (
    (_HANDOVER, _PLAIN_HANDOVER),
    (_RELAY, _PLAIN_RELAY),
    (_THREADS, _PLAIN_RELAY),
    (_RELAY, _THREADS),
    (_HANDOVER, _THREADS),
)


def measure(rounds: int, tell: Callable[[str], None]) -> list[Row]:
    """Measure; ``tell`` hears of each round."""
    costs: dict[str, list[Cost]] = {name: [] for name in _WAYS}
    tell("booting")
    with closing(Lane(kernel.find(), qemus.find(_MACHINE), cpus=1)) as lane:
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            for name in (list(_WAYS), list(reversed(_WAYS)))[number % 2]:
                costs[name].append(Cost(**lane.call(inside, name)))
        version = lane.kernel
    rows = [total_cpu(_TITLE, one, costs[one], other, costs[other]) for one, other in _PAIRS]
    return [replace(rows[0], note=note(version, costs)), *rows[1:]]


def inside(name: str) -> dict[str, Any]:
    """Measure one of them once; this runs in the lane."""
    # By itself the kernel takes its portable code; a host's udev loads this for the CPU.
    subprocess.run(["modprobe", "aesni_intel"], check=True)
    return asdict(run(contestant(name, _WAYS[name]), 1, _AMOUNT))


def note(version: str, costs: Mapping[str, Sequence[Cost]]) -> str:
    """Say what the numbers are worth, and which way is the cheapest.

    :param version: of the kernel.
    """
    order = sorted(costs, key=lambda name: median(cost.cpu for cost in costs[name]))
    return (
        f"Linux {version} on one emulated CPU: only the order and the ratios count. "
        f"From the cheapest to the dearest: {'; '.join(order)}"
    )
