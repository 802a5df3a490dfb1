"""``postcopy-ram``: the guest can be switched over before all of its RAM is there.

It makes sure that a migration ends: however fast the guest dirties its RAM, each
page travels at most once more after the switch, which ``migrate-start-postcopy``
asks for (QEMU 2.6 and newer).

The destination's QEMU fetches a page when the guest touches it, by userfaultfd.  So its
process has to be allowed one that handles faults of the kernel too, and its RAM has to be
of a kind that userfaultfd knows: anonymous, or in a file on tmpfs or hugetlbfs.  Any other
file QEMU refuses from 8.1 on; an older one finds out only when postcopy begins, ends, and
the guest is lost.  And since a page is placed whole, both sides' RAM must have pages of the
same sizes, which QEMU itself compares only when the stream has begun (POSTCOPY_ADVISE).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..interfaces import (
    GUEST,
    KERNEL,
    Answer,
    Feature,
    GuestFacts,
    Host,
    No,
    Rank,
    Role,
    Settings,
    Withdraw,
    Yes,
)
from .capabilities import known, none_on

__all__ = ["Postcopy", "feature"]

#: The first QEMU that opens /dev/userfaultfd (util/userfaultfd.c, uffd_open).
_OPENS_DEVICE = (8, 0, 0)
#: What userfaultfd can fill in beside anonymous memory (postcopy-ram.c, ram_block_check).
_FILESYSTEMS = ("tmpfs", "hugetlbfs")

_PAGES = "page-sizes"


class Postcopy(Feature):
    """The capability has to be on at both ends, or the stream is refused."""

    name = "postcopy-ram"
    summary = "can be switched over at any time, so the move surely ends"
    rank = Rank.CERTAINTY
    abilities = frozenset({"postcopy"})

    def probe_guest(self, guest: GuestFacts, role: Role) -> Answer:
        answer = known(guest, "postcopy-ram") and none_on(
            guest, "x-ignore-shared", "mapped-ram", "background-snapshot"
        )
        return _probe_destination(guest) if answer and role == "destination" else answer

    def propose(self, guest: GuestFacts, host: Host, tunables: Mapping[str, Any]) -> dict[str, Any]:
        return {_PAGES: _page_sizes(guest)} if guest.ram else {}

    def answer(self, guest: GuestFacts, host: Host, proposal: Mapping[str, Any]) -> dict[str, Any]:
        theirs = proposal.get(_PAGES)
        if theirs is None or not guest.ram:
            return {}
        if not isinstance(theirs, list) or not all(isinstance(size, int) for size in theirs):
            raise ValueError(f"its {_PAGES!r} is not a list of numbers")
        if theirs != _page_sizes(guest):
            raise Withdraw(
                f"its RAM has pages of {_kib(_page_sizes(guest))}, and at the source of"
                f" {_kib(theirs)}: give both the same",
                GUEST,
            )
        return {}

    def settings(self, agreement: Mapping[str, Any], role: Role) -> Settings:
        return Settings({"postcopy-ram": True})


def _probe_destination(guest: GuestFacts) -> Answer:
    process = guest.process
    if process is not None and not (
        process.userfaultfd or (process.userfaultfd_device and guest.version >= _OPENS_DEVICE)
    ):
        device = " or let it open /dev/userfaultfd" if guest.version >= _OPENS_DEVICE else ""
        return No(
            f"it gives user {process.uid}, as whom the guest's process runs, no userfaultfd: allow"
            f" it with 'sysctl vm.unprivileged_userfaultfd=1'{device}",
            KERNEL,
        )
    for block in guest.ram:
        if block.filesystem is not None and block.filesystem not in _FILESYSTEMS:
            return No(
                f"its RAM ({block.name}) is in a file on {block.filesystem}, which userfaultfd"
                f" cannot fill in: only {' and '.join(_FILESYSTEMS)} will do",
                GUEST,
            )
    return Yes()


def _page_sizes(guest: GuestFacts) -> list[int]:
    return sorted({block.page_size for block in guest.ram})


def _kib(sizes: list[int]) -> str:
    return " and ".join(f"{size >> 10} KiB" for size in sizes)


feature = Postcopy()
