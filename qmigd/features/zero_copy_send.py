"""``zero-copy-send``: RAM is sent from where it is, without a copy in the kernel (QEMU 7.1).

It is the source's affair alone: QEMU sends the pages of its multifd channels with
MSG_ZEROCOPY, over TCP, and the kernel sends them from the guest's RAM itself.  Until the
other side has acknowledged them, they count as locked memory of the QEMU's user, and a
send beyond RLIMIT_MEMLOCK fails (``mm_account_pinned_pages``), with it the migration.  So
the limit is looked at before, and has to be enough for the worst case.

How much that is: a multifd packet of *n* pages is a header and one sendmsg() of the
pages, for which the kernel counts *n* + 2 pages until the last byte is acknowledged.  What
is not acknowledged fills a socket's send buffer at the most, which grows to the third
number of ``net.ipv4.tcp_wmem``.  Most is counted for the least packets, those of a single
page: three pages for a page and a header.  To that come one whole packet that is half
acknowledged, and one that is just being sent.

Measured with send buffers of 1 MiB and a receiver that stalls, for each channel: QEMU 7.2 and
10.0 need between 1450 and 1600 KiB and 11.1 between 1600 and 2000 KiB for whole packets; a
program that sends packets of one page needs 2406 KiB.  The bound here is 3353 KiB.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from typing import Any

from ..interfaces import (
    CONFLICT,
    DIRECT,
    KERNEL,
    TCP,
    Answer,
    Feature,
    GuestFacts,
    Host,
    Role,
    Settings,
    Withdraw,
    Yes,
)
from .capabilities import known, none_on
from .multifd import COMPRESSION, COUNT, most_channels

__all__ = ["ZeroCopySend", "feature", "locked_memory"]

#: Bytes of the pages in a whole packet (MULTIFD_PACKET_SIZE in migration/multifd.h), and of
#: the least page that a guest has.
_PACKET = 512 << 10
_LEAST_PAGE = 4096
#: Bytes of a packet's header: the fixed part, and 8 for each page that it could have
#: (MultiFDPacket_t).
_HEADER = 320 + 8 * (_PACKET // _LEAST_PAGE)

#: Pages that the kernel adds for each send (``mm_account_pinned_pages`` in net/core/skbuff.c).
_EXTRA = 2


def locked_memory(send_buffer: int, page: int = mmap.PAGESIZE) -> int:
    """Return how many bytes of locked memory one channel may need.

    :param send_buffer: bytes that are not acknowledged at the most.
    :param page: bytes of a page of the host's.
    """

    def counted(size: int) -> int:
        return (size // page + _EXTRA) * page

    sparse = -(-send_buffer * counted(_LEAST_PAGE) // (_LEAST_PAGE + _HEADER))
    return sparse + 2 * counted(_PACKET)


class ZeroCopySend(Feature):
    """An addition to ``multifd``, on the source."""

    name = "zero-copy-send"
    summary = "RAM is sent from where it is, without a copy"
    transports = frozenset({TCP})
    requires = frozenset({"multifd"})
    excludes = frozenset({"tls"})
    paths = frozenset({DIRECT})
    tunables = frozenset({COUNT, COMPRESSION})

    def probe_guest(self, guest: GuestFacts, role: Role) -> Answer:
        if role == "destination":
            return Yes()
        return known(guest, self.name) and none_on(guest, "xbzrle", "compress")

    def propose(self, guest: GuestFacts, host: Host, tunables: Mapping[str, Any]) -> dict[str, Any]:
        if not host.zero_copy_sockets:
            raise Withdraw(f"Linux {host.kernel} has no SO_ZEROCOPY", KERNEL)
        compression = tunables.get(COMPRESSION, guest.parameters.get(COMPRESSION))
        if compression not in (None, "none"):
            raise Withdraw(f"not together with {COMPRESSION} {compression}", CONFLICT)
        process = guest.process
        if process is not None and process.memlock is not None and host.tcp_send_buffer:
            channels = tunables.get(COUNT, most_channels(host.cpus))
            needed = channels * locked_memory(host.tcp_send_buffer)
            if process.memlock < needed:
                raise Withdraw(
                    f"its locked-memory limit is {_mib(process.memlock)} MiB, and"
                    f" {channels} channels may need {_mib(needed)} MiB: raise it with"
                    " 'ulimit -l', or LimitMEMLOCK= in a systemd unit, before the guest is started"
                )
        return {}

    def settings(self, agreement: Mapping[str, Any], role: Role) -> Settings:
        return Settings({self.name: True}) if role == "source" else Settings()


def _mib(size: int) -> str:
    """Return a size in MiB, rounded up to a tenth."""
    return f"{-(-size * 10 // (1 << 20)) / 10:g}"


feature = ZeroCopySend()
