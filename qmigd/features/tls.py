"""``tls``: everything between the two hosts is encrypted, and each proves who it is.

The handshake itself goes over to TLS behind the Reply that selects this feature, and every
payload channel behind its greeting (docs/protocol); what is here is its place among the
other features.  A relay can carry it always.  Where the kernel takes TLS over, the socket
can be handed to QEMU, and a relay has plain bytes to move (``ktls``).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..interfaces import HANDOVER, RELAY, Answer, Feature, Host, Rank

__all__ = ["Tls", "feature"]


class Tls(Feature):
    """Both daemons have certificates of CAs that the other one trusts."""

    name = "tls"
    summary = "everything is encrypted, and both hosts prove who they are"
    paths = frozenset({RELAY})
    paths_with: Mapping[str, frozenset[str]] = {"ktls": frozenset({HANDOVER})}
    rank = Rank.SECURITY

    def probe_host(self, host: Host) -> Answer:
        return host.tls


feature = Tls()
