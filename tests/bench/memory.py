"""The memory guest beside QEMU: how fast its RAM moves, and what postcopy costs it.

*Speed* is the bytes of RAM over the time from ``migrate`` to ``completed``, over ``tcp:`` on
loopback, one guest at a time, of RAM that cannot be compressed and that nobody writes: here
what the memory guest is filled with, and in QEMU the same amount out of ``/dev/urandom``.
*CPU* is that of both guests meanwhile.  The QEMU is 10.0, whatever the host has.

The RAM of both is the same kind of memory, a memfd, with pages of the same size.  It was
allocated before at both ends (``prealloc``), or it is allocated as it comes in.

*Downtime* is what the source says of a guest that writes, asked for a limit.

*Latency* is how long the guest waits for a page in postcopy, as it measures itself
(``query-faults``), over a link of 1 Gbit/s between two namespaces, which the other pages
saturate.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any, NamedTuple

from tests.bench.course import cpu_seconds
from tests.bench.table import Row, compare, single
from tests.rig.daemons import free_ports
from tests.rig.guest import Guest
from tests.rig.memory import MemoryGuest
from tests.rig.netns import Link
from tests.rig.process import temporary_directory
from tests.rig.qemus import require

__all__ = ["PART", "ROUNDS", "measure"]

PART = "memory"
ROUNDS = 5

#: MiB of RAM, and of QEMU's own beside it.
_RAM = 1024
_BESIDE = 64
_NOISE_AT = 32 << 20

_UNLIMITED = 100 << 30

#: MiB that follow the guest in postcopy, and what makes the link one of 1 Gbit/s.
_BEHIND = 256
_SLOWER = (
    *("tc", "qdisc", "add", "dev", "veth", "root", "tbf", "rate", "1gbit"),
    *("burst", "256k", "latency", "5ms"),
)

_OVERTAKES = 4.0

#: Milliseconds that the guest may stand still, and what it writes meanwhile in a second.
_DOWNTIME = 100
_WRITES = "64M"


class _Way(NamedTuple):
    """How a guest is moved."""

    channels: int
    allocated: bool

    def __str__(self) -> str:
        several = f"{self.channels} channel{'s' if self.channels > 1 else ''}"
        return f"{several}, {'allocated before' if self.allocated else 'allocated as it comes'}"


class _Moved(NamedTuple):
    """What that took."""

    speed: float  # GiB/s
    cpu: float  # s/GiB


def measure(rounds: int, tell: Callable[[str], None]) -> list[Row]:
    """Measure; ``tell`` hears of each round."""
    directory = temporary_directory()
    noise = os.path.join(directory, "noise")
    with open(noise, "wb") as file:
        for _ in range(_RAM):
            file.write(os.urandom(1 << 20))
    ways = [_Way(*way) for way in product((1, 4), (True, False))]
    moves: dict[_Way, tuple[list[_Moved], list[_Moved]]] = {way: ([], []) for way in ways}
    downtimes: dict[int, list[float]] = {1: [], 4: []}
    latencies: dict[bool, list[Mapping[str, Any]]] = {False: [], True: []}
    try:
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            for way, (ours, theirs) in moves.items():
                # By turns, so that neither is always the first.
                if number % 2:
                    ours.append(_memory(way))
                theirs.append(_qemu(way, noise))
                if not number % 2:
                    ours.append(_memory(way))
            for channels, found in downtimes.items():
                found.append(_downtime(channels))
            for preempt, waits in latencies.items():
                waits.append(_faults(preempt))
    finally:
        shutil.rmtree(directory)
    rows = [
        compare(
            PART,
            f"precopy, {way}: speed",
            "GiB/s",
            "QEMU 10.0 alone, tcp:",
            *([each.speed for each in side] for side in found),
            target="at least 1.00",
            judge=lambda median, quartiles: median >= 1.0 or quartiles[1] >= 1.0,
        )
        for way, found in moves.items()
    ]
    rows += [
        compare(
            PART,
            f"precopy, {way}: CPU",
            "s/GiB",
            "QEMU 10.0 alone, tcp:",
            *([each.cpu for each in side] for side in found),
        )
        for way, found in moves.items()
    ]
    rows += [
        single(
            PART,
            f"precopy, {channels} channel{'s' if channels > 1 else ''}, writing: downtime",
            "ms",
            found,
            target=f"at most {_DOWNTIME}",
            judge=lambda median, _: median <= _DOWNTIME,
        )
        for channels, found in downtimes.items()
    ]
    for name in ("p50", "p99"):
        rows.append(
            compare(
                PART,
                f"postcopy, a page that is waited for: {name}, without preempt",
                "ms",
                "the same with preempt",
                [each[name] / 1000 for each in latencies[False]],
                [each[name] / 1000 for each in latencies[True]],
                target=f"at least {_OVERTAKES:g}" if name == "p99" else "",
                judge=(lambda median, _: median >= _OVERTAKES) if name == "p99" else None,
            )
        )
    return rows


def _set(guest: Any, capabilities: Sequence[str], **parameters: Any) -> None:
    switches = [
        {"capability": name, "state": True} for name in ("events", "return-path", *capabilities)
    ]
    guest.qmp("migrate-set-capabilities", capabilities=switches)
    guest.qmp("migrate-set-parameters", **parameters)


def _move(source: Any, destination: Any, channels: int, **parameters: Any) -> _Moved:
    """Move a guest."""
    parameters |= {"max_bandwidth": _UNLIMITED, "multifd_channels": channels}
    uri = f"tcp:127.0.0.1:{free_ports()[0]}"
    for guest in (source, destination):
        capabilities = ["multifd"] if channels > 1 else []
        _set(guest, capabilities, **parameters)
    destination.qmp("migrate-incoming", uri=uri)
    pids = (source.process.pid, destination.process.pid)
    before = sum(map(cpu_seconds, pids))
    source.qmp("migrate", uri=uri)
    done = _until(source, "completed")
    _until(destination, "completed")
    size = _RAM / 1024
    return _Moved(size / (done["total-time"] / 1000), (sum(map(cpu_seconds, pids)) - before) / size)


def _until(source: Any, status: str) -> dict[str, Any]:
    """Wait for an event, so that nobody is kept busy with questions; returns what is known then."""
    wanted = (status, "failed", "cancelled", "postcopy-paused")
    source.monitor.wait_event("MIGRATION", where=lambda data: data["status"] in wanted)
    done: dict[str, Any] = source.qmp("query-migrate")
    if done["status"] in wanted[1:]:
        raise RuntimeError(f"the migration {done['status']}: {done.get('error-desc')}")
    return done


def _pair(
    stack: ExitStack, *argv: str, link: Link | None = None
) -> tuple[MemoryGuest, MemoryGuest]:
    here, there = (link.left, link.right) if link else (None, None)
    source = MemoryGuest("source", argv, namespace=here)
    destination = MemoryGuest("destination", (*argv, "-incoming", "defer"), namespace=there)
    for one in (source, destination):
        stack.enter_context(one).launch()
    return source.wait(), destination.wait()


def _memory(way: _Way) -> _Moved:
    with ExitStack() as stack:
        argv = ["-m", f"{_RAM}M", "-dirty-rate", "0", "-fill", "random"]
        if way.allocated:
            argv.append("-mem-prealloc")
        return _move(*_pair(stack, *argv), way.channels)


def _qemu(way: _Way, noise: str) -> _Moved:
    qemu = require("10.0")
    backend = f"memory-backend-memfd,id=ram,size={_RAM + _BESIDE}M,share=on"
    if way.allocated:
        backend += ",prealloc=on"
    loader = f"loader,file={noise},addr={_NOISE_AT:#x},force-raw=on"
    with ExitStack() as stack:
        source, destination = (
            stack.enter_context(
                Guest(
                    *(qemu, name),
                    memory=_RAM + _BESIDE,
                    incoming=incoming,
                    paused=True,
                    extra=(
                        *("-device", loader),
                        *("-object", backend, "-machine", "memory-backend=ram"),
                    ),
                )
            )
            for name, incoming in (("source", False), ("destination", True))
        )
        return _move(source.start(), destination.start(), way.channels)


def _downtime(channels: int) -> float:
    """Move a guest that writes; returns the milliseconds that it has stood still."""
    with ExitStack() as stack:
        argv = ("-m", f"{_BEHIND}M", "-dirty-rate", _WRITES, "-fill", "random")
        source, destination = _pair(stack, *argv, "-pattern", "random")
        _move(source, destination, channels, downtime_limit=_DOWNTIME)
        return float(source.qmp("query-migrate")["downtime"])


def _faults(preempt: bool) -> Mapping[str, Any]:
    """Move a guest by postcopy over a link; returns how long it waited for pages."""
    with ExitStack() as stack:
        link = stack.enter_context(Link())
        subprocess.run([*link.left.prefix, *_SLOWER], check=True)
        argv = ("-m", f"{_BEHIND}M", "-dirty-rate", "8M", "-fill", "random", "-pattern", "random")
        source, destination = _pair(stack, *argv, link=link)
        capabilities = ["postcopy-ram", *(["postcopy-preempt"] if preempt else [])]
        for guest in (source, destination):
            _set(guest, capabilities, max_bandwidth=8 << 20, max_postcopy_bandwidth=0)
        uri = f"tcp:{link.right.address}:4444"
        destination.qmp("migrate-incoming", uri=uri)
        source.qmp("migrate", uri=uri)
        _until(source, "active")
        source.qmp("migrate-start-postcopy")
        _until(source, "completed")
        found: Mapping[str, Any] = destination.qmp("query-faults")
        return found
