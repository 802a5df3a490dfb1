"""``mptcp``: the payload's connections are Multipath TCP, and go over several networks at once.

What two hosts have in common, the kernels find out for each connection by themselves; the
feature says beforehand, and in the plan, that both are to have it.  Which networks are used,
and whether for more speed or as a reserve, is set with ``ip mptcp`` on both hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..interfaces import TCP, Answer, Feature, Host

__all__ = ["Mptcp", "feature"]


class Mptcp(Feature):
    """On every path: on ``direct`` QEMU makes such connections itself."""

    name = "mptcp"
    summary = "connections use several networks at once (Multipath TCP)"
    # On such a connection Linux does neither TLS (TCP_ULP) nor zero copy (SO_ZEROCOPY), and
    # RDMA goes its own way.
    excludes = frozenset({"ktls", "rdma", "zero-copy-receive", "zero-copy-send"})
    transports = frozenset({TCP})
    abilities = frozenset({"multipath"})

    def probe_host(self, host: Host) -> Answer:
        return host.mptcp

    def uri(self, agreement: Mapping[str, Any], host: str, port: int) -> str:
        return f"tcp:[{host}]:{port},mptcp=on" if ":" in host else f"tcp:{host}:{port},mptcp=on"


feature = Mptcp()
