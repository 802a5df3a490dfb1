"""How many handshakes a daemon does in a second, and what a waiting connection costs it.

A handshake here is everything that leads to a plain answer: connection, greeting,
Reply, the name of a guest that there is not, START; ERROR, and the close.  The clients
are bare sockets with ready-made bytes, four at a time, so that the daemon is never
without work.

A waiting connection has been accepted and has received the greeting, and says nothing.
"""

from __future__ import annotations

import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qmigd.wire.greeting import VERSION, Reply
from qmigd.wire.messages import Guest, Start
from tests.bench.course import cpu_seconds
from tests.bench.table import Row, single
from tests.rig.daemons import Daemon

__all__ = ["PART", "ROUNDS", "measure"]

PART = "handshakes"
ROUNDS = 3

#: Connections that wait, and MiB that the daemon may take for them.
_WAITING = 1000
_TARGET = 64.0

_CLIENTS = 4
_EACH = 250

#: Seconds: long enough that no deadline ends a connection that is to wait.
_PATIENCE = 600

_SPEECH = Reply(VERSION, ()).encode() + Guest({"name": "no such guest"}).encode() + Start().encode()


def measure(rounds: int, tell: Callable[[str], None]) -> list[Row]:
    """Measure; ``tell`` hears of each round."""
    rate, cpu, resident, proportional = [], [], [], []
    with _many_files():
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            with Daemon(handshake_deadline=_PATIENCE) as daemon:
                daemon.start()
                _handshakes(daemon, 20)  # everything that it needs has been loaded now
                idle = _memory(daemon)
                with ExitStack() as stack:
                    for _ in range(_WAITING):
                        _greeted(stack.enter_context(socket.create_connection(_address(daemon))))
                    waiting = _memory(daemon)
                resident.append(waiting["Rss"] - idle["Rss"])
                proportional.append(waiting["Pss"] - idle["Pss"])
                before = cpu_seconds(daemon.process.pid)
                begun = time.monotonic()
                with ThreadPoolExecutor(_CLIENTS) as pool:
                    list(pool.map(lambda _: _handshakes(daemon, _EACH), range(_CLIENTS)))
                rate.append(_CLIENTS * _EACH / (time.monotonic() - begun))
                spent = cpu_seconds(daemon.process.pid) - before
                cpu.append(spent / (_CLIENTS * _EACH) * 1000)
    return [
        single(PART, "handshakes in a second", "/s", rate),
        single(PART, "CPU for a handshake", "ms", cpu),
        single(
            PART,
            f"{_WAITING:,} waiting connections: RSS",
            "MiB",
            resident,
            target=f"under {_TARGET:.0f} MiB more",
            judge=lambda median, _: median < _TARGET,
            note="more than the same daemon when idle",
        ),
        single(
            PART,
            f"{_WAITING:,} waiting connections: PSS",
            "MiB",
            proportional,
            target=f"under {_TARGET:.0f} MiB more",
            judge=lambda median, _: median < _TARGET,
        ),
    ]


def _address(daemon: Daemon) -> tuple[str, int]:
    _, host, port = daemon.uri.split(":")
    return host, int(port)


def _greeted(connection: socket.socket) -> None:
    """Wait for the greeting: it comes in one piece, and nothing follows it."""
    if not connection.recv(4096):
        raise RuntimeError("the daemon closes the connection instead of greeting")


def _handshakes(daemon: Daemon, count: int) -> None:
    address = _address(daemon)
    for _ in range(count):
        with socket.create_connection(address) as connection:
            _greeted(connection)
            connection.sendall(_SPEECH)
            answer = b""
            while data := connection.recv(4096):
                answer += data
        if b"guest-not-found" not in answer:
            raise RuntimeError(f"the daemon answers {answer!r}")


def _memory(daemon: Daemon) -> dict[str, float]:
    """Return RSS and PSS of the daemon in MiB."""
    told = Path(f"/proc/{daemon.process.pid}/smaps_rollup").read_text()
    return {name: int(kib) / 1024 for name, kib in re.findall(r"^(Rss|Pss): +(\d+) kB", told, re.M)}


@contextmanager
def _many_files() -> Iterator[None]:
    """Let this process, and the daemons that it starts, have a descriptor for each connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, min(hard, 2 * _WAITING))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
