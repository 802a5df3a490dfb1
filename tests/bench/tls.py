"""What TLS costs in a relay: qmigd's, in user space, beside its peers and beside no TLS.

The course is that of :mod:`tests.bench.course`, and the cipher AES-128-GCM for all:

- two haproxy with TLS 1.3 between them, both certificates demanded;
- an ssh tunnel, a connection for each channel (:mod:`tests.bench.ssh`);
- qmigd's relay without TLS: how much dearer TLS is.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.bench.course import channels_text, run_all, total_cpu
from tests.bench.ours import How, contestant
from tests.bench.relay import CHANNELS, HAPROXY, below, haproxy, missing
from tests.bench.ssh import SSH, ssh
from tests.bench.table import Row
from tests.rig.debian import Unavailable

__all__ = ["PART", "ROUNDS", "measure"]

PART = "tls"
ROUNDS = 5

#: What one run moves, in GiB.
_AMOUNT = 1.0

_OURS = "qmigd, TLS"
_PLAIN = "qmigd, plain"


def measure(rounds: int, tell: Callable[[str], None]) -> list[Row]:
    """Measure; ``tell`` hears of each round."""
    absent = [(name, "it is not installed") for name in missing(HAPROXY)]
    peers = [] if absent else [haproxy(tls=True)]
    try:
        peers.append(ssh())
    except Unavailable as error:
        absent.append((SSH, str(error)))
    ours, plain = contestant(_OURS, How(tls="relay")), contestant(_PLAIN, How())
    costs = run_all([ours, plain, *peers], rounds, _AMOUNT, CHANNELS, tell)
    return [
        *(below(PART, count, costs, _OURS, one.name) for one in peers for count in CHANNELS),
        *(
            total_cpu(PART, channels_text(count), costs[_OURS, count], _PLAIN, costs[_PLAIN, count])
            for count in CHANNELS
        ),
        *(Row(PART, "total CPU", "", peer=name, note=f"{name}: {why}") for name, why in absent),
    ]
