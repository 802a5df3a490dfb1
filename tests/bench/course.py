"""The course that relays are measured on: what goes through them, and what that costs.

::

    source --unix--> relay --TCP--> relay --unix--> sink

The same as on the path ``relay``, with a source and a sink in the places of the QEMUs: the
source writes 512 KiB at a time, as multifd does.  Everything is a process of its own.  With
all CPUs busy, speed says little but how many CPUs there are; what is compared is the CPU
time of all the processes together.  Contestants take turns within each round, and are
compared round by round, so that a change of the host's own load hits all of them; a run in
which others took much of the CPUs is done again.

A contestant may also *hand over*: what the source and the sink connect to then sends them
a connected socket (SCM_RIGHTS), as qmigd does with QEMU, and is out of the way.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.table import Judge, Row, compare

__all__ = [
    "GIB",
    "Contestant",
    "Cost",
    "Place",
    "Relays",
    "channels_text",
    "cpu_seconds",
    "line",
    "run",
    "run_all",
    "total_cpu",
    "wait_for_listener",
]

GIB = 1 << 30

_HERE = Path(__file__).parent

#: Source and sink.
_ENDS = "ends.py"

#: A run is done again if others had more than this share of the CPUs; of so many the
#: quietest counts.
_FOREIGN = 0.08
_TRIES = 2


@dataclass(frozen=True)
class Cost:
    """What one run took, for each GiB.

    :ivar cpu: CPU seconds, user and system, of source, relays and sink.
    :ivar seconds: from the first byte until the sink had the last one.
    :ivar foreign: what others took of the CPUs meanwhile, between 0 and 1.
    """

    cpu: float
    seconds: float
    foreign: float


@dataclass(frozen=True)
class Relays:
    """A contestant, started.

    :ivar paths: of the unix sockets that the source is to connect to, by turns.
    :ivar processes: of the contestant, in the order in which they are to be ended.
    :ivar handed: there and at the sink, connected sockets are handed over.
    """

    paths: Sequence[str]
    processes: Sequence[subprocess.Popen[bytes]]
    sink: subprocess.Popen[bytes]
    handed: bool = False


@dataclass(frozen=True)
class Contestant:
    """Somebody who takes the relays' places.

    :ivar start: starts it, ready for the source; processes belong to the place's stack.
    """

    name: str
    start: Callable[[Place], Relays]


@dataclass(frozen=True)
class Place:
    """Where one run takes place.

    :ivar directory: for sockets and whatever else a contestant needs.
    :ivar channels: how many there will be.
    :ivar stack: ends what was started there.
    """

    directory: Path
    channels: int
    stack: contextlib.ExitStack

    def spawn(self, script: str, *words: str) -> subprocess.Popen[bytes]:
        """Start one of the benchmark's scripts as a process of its own."""
        return self.popen([sys.executable, str(_HERE / script), *words])

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a program, which ends with the place."""
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
        )
        self.stack.callback(_end, process)
        return process

    def sink(self, path: str, *, handed: bool = False) -> subprocess.Popen[bytes]:
        """Start the sink, which listens on a unix socket."""
        sink = self.spawn(_ENDS, "sink", _word(handed), path)
        line(sink)
        return sink


def _word(handed: bool) -> str:
    return "handed" if handed else "relayed"


def run_all(
    contestants: Sequence[Contestant],
    rounds: int,
    gib: float,
    channels: Sequence[int],
    tell: Callable[[str], None],
) -> dict[tuple[str, int], list[Cost]]:
    """Measure all of them, with each number of channels.

    :param gib: how much one run moves, in GiB.
    :param tell: hears of each round.
    :return: the costs by name and number of channels, one for each round.
    """
    costs: dict[tuple[str, int], list[Cost]] = {}
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        # Nobody is always the first.
        turn = number % len(contestants)
        for count in channels:
            for one in (*contestants[turn:], *contestants[:turn]):
                costs.setdefault((one.name, count), []).append(_quietest(one, count, gib))
    return costs


def _quietest(contestant: Contestant, channels: int, gib: float) -> Cost:
    costs: list[Cost] = []
    for _ in range(_TRIES):
        costs.append(run(contestant, channels, gib))
        if costs[-1].foreign < _FOREIGN:
            break
    return min(costs, key=lambda cost: cost.foreign)


def total_cpu(
    part: str,
    what: str,
    ours: Sequence[Cost],
    peer: str,
    theirs: Sequence[Cost],
    *,
    target: str = "",
    judge: Judge | None = None,
    note: str = "",
) -> Row:
    """Make the row that compares the CPU time of two contestants."""
    return compare(
        *(part, f"{what}: total CPU", "s/GiB", peer),
        [cost.cpu for cost in ours],
        [cost.cpu for cost in theirs],
        target=target,
        judge=judge,
        note=note,
    )


def channels_text(count: int) -> str:
    """Return how many channels, in words."""
    return f"{count} channel" + "s" * (count > 1)


# One run.


def run(contestant: Contestant, channels: int, gib: float) -> Cost:
    """Have one contestant move so many GiB, and return what it took."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        place = Place(Path(name), channels, stack)
        relays = contestant.start(place)
        size = str(int(gib * GIB) // channels)
        source = place.spawn(
            *(_ENDS, "source", _word(relays.handed), str(channels), size), *relays.paths
        )
        # It has sent a byte through everything and got the answer: all are warm.
        line(source)
        processes = (*relays.processes, relays.sink)
        cpu = -sum(map(_clock, processes))
        others = -_busy()
        assert source.stdin is not None
        source.stdin.write(b"go\n")
        source.stdin.flush()
        seconds, spent = map(float, line(source).split())
        others += _busy()
        cpu += spent
        for process in processes:
            # Ending one lets the children of the next one end.
            if process is not relays.sink:
                _wait_for_children(process)
            cpu += _all_of(process)
    cpus = len(os.sched_getaffinity(0))
    return Cost(cpu / gib, seconds / gib, max(0.0, others - cpu) / (seconds * cpus))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def line(process: subprocess.Popen[bytes]) -> str:
    """Return the next line that it writes.

    :raises RuntimeError: it has ended.
    """
    assert process.stdout is not None
    text = process.stdout.readline().decode().strip()
    if not text:
        raise RuntimeError(f"{process.args!r} ended")
    return text


def wait_for_listener(process: subprocess.Popen[bytes], family: int, address: Any) -> None:
    """Wait until a process listens there.

    :raises RuntimeError: it has ended.
    """
    while process.poll() is None:
        with socket.socket(family) as probe:
            if probe.connect_ex(address) == 0:
                return
        # Nothing tells when another program has come so far.
        select.select([], [], [], 0.01)
    raise RuntimeError(f"{process.args!r} ended")


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of any process, all its threads included."""
    # Linux: clock_getcpuclockid(3).
    return time.clock_gettime(~pid << 3 | 2)


def _clock(process: subprocess.Popen[bytes]) -> float:
    """CPU seconds of a process, and of the children that it has now."""
    seconds = cpu_seconds(process.pid)
    for child in _children(process):
        # It may be gone: the one that had the first byte.
        with contextlib.suppress(OSError):
            seconds += cpu_seconds(child)
    return seconds


def _busy() -> float:
    """CPU seconds that the whole host has spent on anything since it was started."""
    with open("/proc/stat") as stat:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, stat.readline().split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _children(process: subprocess.Popen[bytes]) -> list[int]:
    """What it has forked and not yet counted in."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in children.read_text().split()]


def _wait_for_children(process: subprocess.Popen[bytes]) -> None:
    """Wait until a relay that forks has counted the last of its children in."""
    while children := _children(process):
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(child)
                select.select([handle], [], [])
                os.close(handle)


def _all_of(process: subprocess.Popen[bytes]) -> float:
    """End a process; its CPU seconds, children included."""
    # Not given the time to tidy up, which would count as well.
    process.kill()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime
