"""What a relay costs: qmigd's, socat and haproxy in the same place, in one run.

::

    source --unix--> relay --TCP--> relay --unix--> sink

The same as on the path ``relay``, with a source and a sink in the places of the QEMUs: the
source writes 512 KiB at a time, as multifd does.  Everything is a process of its own; for
qmigd the two relays are real ones, handshake of each channel included.  With all CPUs
busy, speed says little but how many CPUs there are; what is compared is the CPU time of
all four processes together.  The relays take turns within each round, and are compared
round by round, so that a change of the host's own load hits all of them; a run in which
others took much of the CPUs is done again.

``python -m tests.bench.relay`` writes the table by itself.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["OURS", "RelayCost", "measure", "missing"]

GIB = 1 << 30

#: Bytes that the source writes at a time, and what one run moves by default.
WRITE = 512 << 10
AMOUNT = 2.0

#: The name of qmigd's own relay in the results.
OURS = "qmigd"

_HAPROXY = """\
global
    tune.bufsize 262144
defaults
    mode tcp
    timeout connect 10s
    timeout client 60s
    timeout server 60s
listen relay
    bind {listen}
    server peer {connect}
"""

#: A run is done again if others had more than this share of the CPUs, so many times.
_FOREIGN = 0.08
_TRIES = 4

_ID = uuid.UUID(int=1)
_SECRET = bytes(32)


@dataclass(frozen=True)
class RelayCost:
    """The medians of one relay with so many channels.

    :ivar cpu: CPU seconds for each GiB, user and system, of source, relays and sink.
    :ivar relays_cpu: the two relays' part of it.
    :ivar speed: in GiB/s.
    :ivar ratio: ``cpu`` in relation to that of qmigd's relay in the same round; above 1
        it is dearer.
    """

    relay: str
    channels: int
    cpu: float
    relays_cpu: float
    speed: float
    ratio: float


@dataclass(frozen=True)
class _Run:
    cpu: float
    relays_cpu: float
    seconds: float
    #: What others took of the CPUs meanwhile, between 0 and 1.
    foreign: float


def missing() -> list[str]:
    """The programs to compare with that are not installed here."""
    return [name for name in ("socat", "haproxy") if shutil.which(name) is None]


def measure(
    rounds: int = 3, gib: float = AMOUNT, channels: tuple[int, ...] = (1, 4)
) -> list[RelayCost]:
    """Measure all relays that there are; takes a second or two for each GiB.

    :param rounds: how often; medians are taken.
    :param gib: how much one run moves, in GiB.
    """
    names = [OURS, *(name for name in ("socat", "haproxy") if name not in missing())]
    runs: dict[tuple[str, int], list[_Run]] = {}
    for number in range(rounds):
        for count in channels:
            # Nobody is always the first.
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                tries = (_run(name, count, gib) for _ in range(_TRIES))
                quiet = next((run for run in tries if run.foreign < _FOREIGN), None)
                runs.setdefault((name, count), []).append(quiet or _run(name, count, gib))
    return [
        _summary(name, count, gib, runs[name, count], runs[OURS, count])
        for count in channels
        for name in names
    ]


def _summary(name: str, count: int, gib: float, runs: list[_Run], ours: list[_Run]) -> RelayCost:
    return RelayCost(
        name,
        count,
        statistics.median(run.cpu for run in runs) / gib,
        statistics.median(run.relays_cpu for run in runs) / gib,
        gib / statistics.median(run.seconds for run in runs),
        statistics.median(run.cpu / our.cpu for run, our in zip(runs, ours, strict=True)),
    )


# One run.


def _run(name: str, count: int, gib: float) -> _Run:
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        start = _STARTS.get(name, _start_ours)
        near, far, sink = start(Path(directory), count, stack)
        source = _spawn(stack, "source", near.path, str(count), str(int(gib * GIB) // count))
        # It has sent a byte through everything and got the answer: all are warm.
        _line(source)
        processes = (near.process, far.process, sink)
        before = [_clock(process) for process in processes]
        assert source.stdin is not None
        others = -_busy()
        source.stdin.write(b"go\n")
        source.stdin.flush()
        seconds, cpu = map(float, _line(source).split())
        others += _busy()
        for process in (near.process, far.process):
            _wait_for_children(process)
        spent = [_all_of(process) - start for process, start in zip(processes, before, strict=True)]
    cpu += sum(spent)
    cpus = len(os.sched_getaffinity(0))
    return _Run(cpu, sum(spent[:2]), seconds, max(0.0, others - cpu) / (seconds * cpus))


@dataclass(frozen=True)
class _Relay:
    process: subprocess.Popen[bytes]
    #: What to connect to.
    path: str = ""


def _start_ours(
    directory: Path, count: int, stack: contextlib.ExitStack
) -> tuple[_Relay, _Relay, subprocess.Popen[bytes]]:
    far = _spawn(stack, "destination", str(directory), str(count))
    port, path = _line(far).split()
    sink = _spawn(stack, "sink", path)
    _line(sink)
    near = _spawn(stack, "origin", str(directory), str(count), port)
    return _Relay(near, _line(near)), _Relay(far), sink


def _start_others(
    directory: Path,
    stack: contextlib.ExitStack,
    command: Callable[[str, str, int], list[str]],
) -> tuple[_Relay, _Relay, subprocess.Popen[bytes]]:
    source_path, sink_path = str(directory / "source"), str(directory / "sink")
    sink = _spawn(stack, "sink", sink_path)
    _line(sink)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    far = _popen(stack, command("far", sink_path, port))
    _wait_for_listener(far, socket.AF_INET, ("127.0.0.1", port))
    near = _popen(stack, command("near", source_path, port))
    _wait_for_listener(near, socket.AF_UNIX, source_path)
    return _Relay(near, source_path), _Relay(far), sink


def _start_socat(
    directory: Path, count: int, stack: contextlib.ExitStack
) -> tuple[_Relay, _Relay, subprocess.Popen[bytes]]:
    def command(side: str, path: str, port: int) -> list[str]:
        ends = [f"UNIX-LISTEN:{path},fork,backlog=16", f"TCP:127.0.0.1:{port},nodelay"]
        if side == "far":
            ends = [
                f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,nodelay,fork,backlog=16",
                f"UNIX-CONNECT:{path}",
            ]
        return ["socat", "-b", "1048576", *ends]

    return _start_others(directory, stack, command)


def _start_haproxy(
    directory: Path, count: int, stack: contextlib.ExitStack
) -> tuple[_Relay, _Relay, subprocess.Popen[bytes]]:
    def command(side: str, path: str, port: int) -> list[str]:
        listen, connect = f"unix@{path}", f"127.0.0.1:{port}"
        if side == "far":
            listen, connect = connect, listen
        config = directory / f"{side}.cfg"
        config.write_text(_HAPROXY.format(listen=listen, connect=connect))
        return ["haproxy", "-q", "-db", "-f", str(config)]

    return _start_others(directory, stack, command)


_STARTS = {"socat": _start_socat, "haproxy": _start_haproxy}


# Processes.


def _spawn(stack: contextlib.ExitStack, *words: str) -> subprocess.Popen[bytes]:
    """Start one of the parts below as a process of its own."""
    return _popen(stack, [sys.executable, "-m", "tests.bench.relay", *words])


def _popen(stack: contextlib.ExitStack, command: list[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _line(process: subprocess.Popen[bytes]) -> str:
    """The next line that it writes."""
    assert process.stdout is not None
    line = process.stdout.readline().decode().strip()
    if not line:
        raise RuntimeError(f"{process.args!r} ended")
    return line


def _wait_for_listener(process: subprocess.Popen[bytes], family: int, address: Any) -> None:
    while process.poll() is None:
        with socket.socket(family) as probe:
            if probe.connect_ex(address) == 0:
                return
        # Nothing tells when another program has come so far.
        select.select([], [], [], 0.01)
    raise RuntimeError(f"{process.args!r} ended")


def _clock(process: subprocess.Popen[bytes]) -> float:
    """CPU seconds of a process, its children not included."""
    # Linux: the CPU clock of any process (clock_getcpuclockid).
    return time.clock_gettime(~process.pid << 3 | 2)


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


# The parts.


def _source(path: str, count: int, size: int) -> None:
    """Send a byte, then ``size`` bytes on each of ``count`` connections when told to."""
    data = memoryview(mmap.mmap(-1, WRITE))
    data[:] = os.urandom(WRITE)

    def connect() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        return sock

    def send(sock: socket.socket, size: int) -> None:
        while size > 0:
            sock.sendall(data[:size])
            size -= WRITE
        sock.shutdown(socket.SHUT_WR)
        if sock.recv(1) != b"x":
            raise RuntimeError("not everything came through")
        sock.close()

    send(connect(), 1)
    _say("ready")
    sys.stdin.readline()
    begun, cpu = time.perf_counter(), time.process_time()
    threads = [threading.Thread(target=send, args=(connect(), size)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _say(f"{time.perf_counter() - begun} {time.process_time() - cpu}")
    sys.stdin.readline()


def _sink(path: str) -> None:
    """Read every connection to its end, and say so on it."""

    def take(sock: socket.socket) -> None:
        buffer = bytearray(1 << 20)
        some = False
        while sock.recv_into(buffer):
            some = True
        # One that brought nothing only looked whether the relay was there.
        if some:
            sock.sendall(b"x")
        sock.close()

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(16)
        _say("ready")
        while True:
            threading.Thread(target=take, args=(server.accept()[0],), daemon=True).start()


def _plan(count: int) -> list[tuple[str, int]]:
    """The channels, and one before them for the first byte."""
    return [("main", 0), *(("multifd", index) for index in range(count))]


def _origin(directory: str, count: int, port: int) -> None:
    """The source's qmigd."""
    from twisted.internet import reactor
    from twisted.internet.endpoints import TCP4ClientEndpoint

    from qmigd.channels.attach import open_channel
    from qmigd.channels.relay import SourceRelay
    from qmigd.channels.secured import Secured
    from qmigd.handshake.channel import ChannelHandshake
    from qmigd.wire.role import RoleHeader

    run: Any = reactor
    endpoint = TCP4ClientEndpoint(run, "127.0.0.1", port)

    async def open_it(name: str, index: int) -> socket.socket:
        machine = Secured(ChannelHandshake(RoleHeader(_ID, name, index), _SECRET), None)
        return (await open_channel(run, endpoint, machine, 10)).sock

    relay = SourceRelay(run, directory, _plan(count), open_it, _heard)
    _say(relay.listen().path)
    run.run()


def _destination(directory: str, count: int) -> None:
    """The destination's qmigd."""
    from twisted.internet import reactor
    from twisted.internet.protocol import Factory

    from qmigd.channels.attach import Attachments
    from qmigd.channels.relay import DestinationRelay

    run: Any = reactor
    attachments = Attachments()
    relay = DestinationRelay(run, directory, _heard)
    attachments.expect(
        *(_ID, _SECRET, _plan(count)),
        lambda name, index, line: relay.take(name, index, line.sock),
    )
    factory = Factory.forProtocol(lambda: _port(attachments))
    port = run.listenTCP(0, factory, interface="127.0.0.1")
    _say(f"{port.getHost().port} {relay.address.path}")
    run.run()


def _port(attachments: Any) -> Any:
    """A connection to the destination's port, for payload channels only."""
    from twisted.internet.protocol import Protocol

    from qmigd.handshake.destination import DestinationHandshake
    from qmigd.handshake.events import ChannelOpened
    from qmigd.transports.sockets import limit_reads

    class Port(Protocol):
        transport: Any

        def connectionMade(self) -> None:
            self.machine = DestinationHandshake([])
            self.transport.write(self.machine.data_to_send())
            limit_reads(self.transport, self.machine.wanted)

        def dataReceived(self, data: bytes) -> None:
            for event in self.machine.receive(data):
                if isinstance(event, ChannelOpened):
                    claim = attachments.claim(event.role)
                    self.machine.attached()
                    claim.hand_over(self.transport, self.machine.data_to_send())
                    return
            limit_reads(self.transport, self.machine.wanted)

    return Port()


def _heard(event: Any) -> None:
    from qmigd.channels.relay import ChannelEnded

    if not isinstance(event, ChannelEnded):
        print(event, file=sys.stderr)


def _say(line: str) -> None:
    print(line, flush=True)


def _table(costs: list[RelayCost]) -> Iterator[str]:
    yield f"{'relay':10}{'channels':>9}{'CPU s/GiB':>11}{'relays':>9}{'GiB/s':>8}{'to qmigd':>10}"
    for cost in costs:
        yield (
            f"{cost.relay:10}{cost.channels:9}{cost.cpu:11.3f}{cost.relays_cpu:9.3f}"
            f"{cost.speed:8.2f}{cost.ratio:10.2f}"
        )


def main(words: list[str]) -> None:
    """Run a part, or everything."""
    match words:
        case ["source", path, count, size]:
            _source(path, int(count), int(size))
        case ["sink", path]:
            _sink(path)
        case ["origin", directory, count, port]:
            _origin(directory, int(count), int(port))
        case ["destination", directory, count]:
            _destination(directory, int(count))
        case _:
            for name in missing():
                _say(f"{name} is not installed; left out")
            rounds, *_ = (*map(int, words), 3)
            for line in _table(measure(rounds)):
                _say(line)


if __name__ == "__main__":
    main(sys.argv[1:])
