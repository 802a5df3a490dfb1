"""What a QEMU gets wrong, as data.

Each row says which features cannot be combined between which QEMUs, what happens
if they are, and which test shows it with QEMU alone.  What a QEMU refuses by
itself has a row as well: negotiation has to know before anything is set.

All rows were seen on Debian's QEMU 7.2.22, 10.0.2 and 11.1.3.  Where a range ends
at a version that was not tried, the end is out of QEMU's history: multifd with
postcopy was refused from 8.1 on (``migrate_caps_check``) and works from 10.1 on;
``x-preempt-pre-7-2`` came with 8.0 and is set by the machine types up to 7.2
(``hw/core/machine.c``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qmigd.interfaces import DIRECT, GuestFacts

__all__ = [
    "ANY",
    "POSTCOPY_WITHOUT_PAGES",
    "QUIRKS",
    "SEVERAL_CHANNELS",
    "SILENT",
    "Quirk",
    "Versions",
    "conflicts",
    "unawaited",
]

#: URI schemes with which QEMU does nothing else for a while, and answers nothing, and the
#: seconds that this may take.  For RDMA it answers ``migrate`` only once it is connected: the
#: kernel looks for the address and the route for 10 s each (RDMA_RESOLVE_TIMEOUT_MS in
#: migration/rdma.c), and then tries 16 times to connect, 4.3 s each (CMA_MAX_CM_RETRIES,
#: CMA_CM_RESPONSE_TIMEOUT in its cma.c).  Later it is silent while it registers RAM, and during
#: the last pass: a QEMU 11 for 9 s as it pinned 400 MiB on an emulated CPU, a 10.0 that sent for
#: 14 s, when packets got lost, which are waited for 4.3 s each.
SILENT = {"rdma": 90.0}

#: Capabilities with which QEMU opens more channels than ``main``.
SEVERAL_CHANNELS = ("multifd", "postcopy-preempt")


@dataclass(frozen=True)
class Versions:
    """QEMU's versions from ``first`` on, up to and without ``end``."""

    first: tuple[int, int] = (0, 0)
    end: tuple[int, int] | None = None

    def __contains__(self, version: tuple[int, ...]) -> bool:
        return self.first <= version and (self.end is None or version < self.end)


ANY = Versions()

#: Sources that switch to postcopy where nothing is left to be sent, which a destination's
#: QEMU cannot load.  Out of 11.1.3, with a guest that was stopped and a stream let loose when
#: the switch was asked for, 88 of 200 moves into 11.1.3 failed and 48 of 100 into 10.0.2; out
#: of 10.0.2 and 7.2.22 none of 100 each.  Those look first whether they are done; the range
#: begins behind the last version that was seen to (migration_iteration_run in
#: migration/migration.c).
POSTCOPY_WITHOUT_PAGES = Versions((10, 1))


#: How the machine types begin that QEMU has in versions.
_VERSIONED = ("pc-i440fx-", "pc-q35-", "pseries-", "s390-ccw-virtio-", "virt-")


@dataclass(frozen=True)
class Quirk:
    """One thing that goes wrong.

    :ivar id: its name, for the documentation.
    :ivar features: what must not be combined; a path may be among them.
    :ivar source: the versions of the source's QEMU that it concerns.
    :ivar destination: the same of the destination's.
    :ivar machine: it concerns machine types up to this version only.
    :ivar reason: what happens, half a sentence for people.
    :ivar test: the dotted name of the test that shows it.
    """

    id: str
    features: frozenset[str]
    reason: str
    test: str
    source: Versions = ANY
    destination: Versions = ANY
    machine: tuple[int, int] | None = None

    def concerns(self, source: GuestFacts, destination: GuestFacts) -> bool:
        """Return whether it would go wrong between these two."""
        if self.machine is not None and not _older(source.machine, self.machine):
            return False
        return source.version in self.source and destination.version in self.destination


_MULTIFD_POSTCOPY = frozenset({"multifd", "postcopy-ram"})
_PREEMPT_DIRECT = frozenset({"postcopy-preempt", DIRECT})
_TESTS = "tests.test_guests_quirks.QuirkTests"

_PREEMPT_LATE = (
    "{} does not wait for the preempt channel, and ends, guest and all, if the migration fails"
    " before that has come about"
)

QUIRKS = (
    Quirk(
        id="multifd-postcopy-lost",
        features=_MULTIFD_POSTCOPY,
        destination=Versions(end=(8, 1)),
        reason=(
            "a destination with a QEMU older than 8.1 aborts or hangs when postcopy begins"
            " with multifd on, and the guest is lost"
        ),
        test=f"{_TESTS}.test_multifd_with_postcopy_into_old_qemu_loses_the_guest",
    ),
    Quirk(
        id="multifd-postcopy-refused-by-destination",
        features=_MULTIFD_POSTCOPY,
        destination=Versions((8, 1), (10, 1)),
        reason="the destination's QEMU refuses the two together, as all from 8.1 to 10.0 do",
        test=f"{_TESTS}.test_multifd_with_postcopy_is_refused",
    ),
    Quirk(
        id="multifd-postcopy-refused-by-source",
        features=_MULTIFD_POSTCOPY,
        source=Versions((8, 1), (10, 1)),
        reason="the source's QEMU refuses the two together, as all from 8.1 to 10.0 do",
        test=f"{_TESTS}.test_multifd_with_postcopy_is_refused",
    ),
    Quirk(
        id="multifd-preempt-old-machine",
        features=frozenset({"multifd", "postcopy-preempt"}),
        machine=(7, 2),
        reason=(
            "with machine types up to 7.2 the preempt channel is connected before multifd's"
            " channels, and the destination's QEMU hangs on it"
        ),
        test=f"{_TESTS}.test_multifd_with_preempt_hangs_on_old_machine_types",
    ),
    Quirk(
        id="preempt-direct-old-source",
        features=_PREEMPT_DIRECT,
        source=Versions(end=(8, 0)),
        reason=_PREEMPT_LATE.format("a QEMU older than 8.0"),
        test=f"{_TESTS}.test_preempt_that_is_connected_too_late_loses_the_guest",
    ),
    Quirk(
        id="preempt-direct-old-machine",
        features=_PREEMPT_DIRECT,
        source=Versions((8, 0)),
        machine=(7, 2),
        reason=_PREEMPT_LATE.format("with machine types up to 7.2 the source's QEMU"),
        test=f"{_TESTS}.test_preempt_that_is_connected_too_late_loses_the_guest",
    ),
)


def conflicts(source: GuestFacts, destination: GuestFacts) -> list[tuple[frozenset[str], str]]:
    """Return which features cannot be combined between these two, each with the reason."""
    return [
        (quirk.features, quirk.reason) for quirk in QUIRKS if quirk.concerns(source, destination)
    ]


def unawaited(source: GuestFacts) -> frozenset[str]:
    """Return the channels that a source's QEMU connects as it begins, and does not wait for.

    Nothing must fail its migration before they are there.  On ``direct`` nobody could see to
    that; in a relay they are a matter of a moment, which :mod:`qmigd.migration.source_path` waits.
    """
    rows = [quirk for quirk in QUIRKS if quirk.features == _PREEMPT_DIRECT]
    return frozenset({"preempt"} if any(quirk.concerns(source, source) for quirk in rows) else ())


def _older(machine: str, limit: tuple[int, int]) -> bool:
    """Whether a machine type is not newer than ``limit``, or not known to be.

    One without a version (``microvm``) is QEMU's newest.  What a distributor calls its own
    (``pc-q35-rhel9.2.0``, ``pc-i440fx-jammy``) may be as old as any.
    """
    match = re.search(r"-(\d+)\.(\d+)$", machine)
    if match is None:
        return machine.startswith(_VERSIONED)
    return (int(match[1]), int(match[2])) <= limit
