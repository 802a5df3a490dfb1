"""What a relay costs: qmigd's, socat and haproxy in the same place, in one run.

They run on the course of :mod:`tests.bench.course`.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from tests.bench.course import (
    Contestant,
    Cost,
    Place,
    Relays,
    channels_text,
    run_all,
    total_cpu,
    wait_for_listener,
)
from tests.bench.ours import How, contestant
from tests.bench.table import Row, compare
from tests.rig.certificates import Authority, write

__all__ = ["CHANNELS", "HAPROXY", "PART", "ROUNDS", "below", "haproxy", "measure", "missing"]

PART = "relay"
ROUNDS = 5

CHANNELS = (1, 4)

#: What one run moves, in GiB.
_AMOUNT = 2.0

_OURS = "qmigd"
_SOCAT = "socat"
HAPROXY = "haproxy"

#: Whom haproxy's certificate is for.
_HOST = "host.example"

_HAPROXY_CONFIG = """\
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

#: Behind the addresses: TLS as qmigd has it, both certificates demanded and checked.
_HAPROXY_TLS = (
    " ssl crt {pem} ca-file {ca} verify required ssl-min-ver TLSv1.3 "
    "ciphersuites TLS_AES_128_GCM_SHA256"
)


def measure(rounds: int, tell: Callable[[str], None]) -> list[Row]:
    """Measure; ``tell`` hears of each round."""
    absent = missing(_SOCAT, HAPROXY)
    peers = [one for one in (Contestant(_SOCAT, _socat), haproxy()) if one.name not in absent]
    ours = contestant(_OURS, How())
    costs = run_all([ours, *peers], rounds, _AMOUNT, CHANNELS, tell)
    pairs = [(count, one.name) for one in peers for count in CHANNELS]
    return [
        *(below(PART, count, costs, _OURS, name) for count, name in pairs),
        *(_speed(count, costs[_OURS, count], name, costs[name, count]) for count, name in pairs),
        *(Row(PART, "total CPU", "", peer=f"{name}: not installed") for name in absent),
    ]


def below(
    part: str, count: int, costs: Mapping[tuple[str, int], Sequence[Cost]], ours: str, peer: str
) -> Row:
    """Make the row that says whether qmigd's relay takes less CPU time than a peer."""
    return total_cpu(
        *(part, channels_text(count), costs[ours, count], peer, costs[peer, count]),
        target="below 1.00",
        judge=lambda median, quartiles: median < 1,
    )


def _speed(count: int, ours: Sequence[Cost], peer: str, theirs: Sequence[Cost]) -> Row:
    return compare(
        *(PART, f"{channels_text(count)}: speed", "GiB/s", peer),
        [1 / cost.seconds for cost in ours],
        [1 / cost.seconds for cost in theirs],
    )


def missing(*programs: str) -> list[str]:
    """Return those that are not installed here."""
    return [name for name in programs if shutil.which(name) is None]


# Others in the relays' places.


def _start(place: Place, command: Callable[[str, str, int], list[str]]) -> Relays:
    """Start one program on either side, and the sink.

    :param command: gets ``near`` or ``far``, the path of the unix socket on that side, and
        the port of the far one.
    """
    source_path, sink_path = str(place.directory / "source"), str(place.directory / "sink")
    sink = place.sink(sink_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    far = place.popen(command("far", sink_path, port))
    wait_for_listener(far, socket.AF_INET, ("127.0.0.1", port))
    near = place.popen(command("near", source_path, port))
    wait_for_listener(near, socket.AF_UNIX, source_path)
    return Relays([source_path], (near, far), sink)


def _socat(place: Place) -> Relays:
    def command(side: str, path: str, port: int) -> list[str]:
        ends = [f"UNIX-LISTEN:{path},fork,backlog=16", f"TCP:127.0.0.1:{port},nodelay"]
        if side == "far":
            ends = [
                f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,nodelay,fork,backlog=16",
                f"UNIX-CONNECT:{path}",
            ]
        return ["socat", "-b", "1048576", *ends]

    return _start(place, command)


def haproxy(*, tls: bool = False) -> Contestant:
    """Return haproxy as a contestant, with TLS between the two if so wanted."""
    return Contestant(HAPROXY, partial(_haproxy, tls))


def _haproxy(tls: bool, place: Place) -> Relays:
    accepts = connects = ""
    if tls:
        files = Authority(place.directory).host(_HOST)
        pem = place.directory / "haproxy.pem"
        write(pem, files.certificate.read_bytes() + files.key.read_bytes())
        accepts = _HAPROXY_TLS.format(pem=pem, ca=files.authority)
        connects = f"{accepts} verifyhost {_HOST}"

    def command(side: str, path: str, port: int) -> list[str]:
        listen, connect = f"unix@{path}", f"127.0.0.1:{port}{connects}"
        if side == "far":
            listen, connect = f"127.0.0.1:{port}{accepts}", f"unix@{path}"
        config = place.directory / f"{side}.cfg"
        config.write_text(_HAPROXY_CONFIG.format(listen=listen, connect=connect))
        return ["haproxy", "-q", "-db", "-f", str(config)]

    return _start(place, command)
