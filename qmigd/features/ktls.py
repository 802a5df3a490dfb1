"""``ktls``: once the handshake of a channel is through, the kernel does its TLS.

On the wire nothing is different, so that a side whose kernel can do it does it, whatever
the other side can; the feature stands for both doing it, which is what lets the socket be
handed to QEMU as if there were no TLS on it.
"""

from __future__ import annotations

from ..interfaces import TCP, Answer, Feature, Host, Rank

__all__ = ["KernelTls", "feature"]


class KernelTls(Feature):
    """An addition to ``tls``."""

    name = "ktls"
    summary = "TLS is done by the kernel of both hosts, not by qmigd"
    requires = frozenset({"tls"})
    transports = frozenset({TCP})
    rank = Rank.SECURITY
    abilities = frozenset({"kernel-tls"})

    def probe_host(self, host: Host) -> Answer:
        return host.kernel_tls


feature = KernelTls()
