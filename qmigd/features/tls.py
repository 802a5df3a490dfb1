"""``tls``: everything between the two hosts is encrypted, and each proves who it is.

The handshake itself goes over to TLS behind the Reply that selects this feature, and every
payload channel behind its greeting (docs/protocol); what is here is its place among the
other features.  A relay can carry it always.  Where the kernel takes TLS over, the socket
can be handed to QEMU, and a relay has plain bytes to move (``ktls``).

Where the QEMUs are to connect to each other, they do TLS themselves, with the same
certificates.  That costs more than a relay's (docs/benchmarks), so it is the last resort.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..interfaces import (
    DIRECT,
    HANDOVER,
    RELAY,
    Answer,
    Feature,
    GuestFacts,
    Host,
    PeerIdentity,
    Rank,
    Role,
    Settings,
)

__all__ = ["CREDENTIALS", "Tls", "feature"]

#: QEMU's type for certificates, which it has if it was built with GnuTLS.
CREDENTIALS = "tls-creds-x509"
#: QEMU's type for a list with one name on it.
_ALLOWED = "authz-simple"

#: The ids of the two objects while a migration lasts.
_OUR_CREDENTIALS = "qmigd-tls"
_OUR_ALLOWED = "qmigd-tls-peer"


class Tls(Feature):
    """Both daemons have certificates of CAs that the other one trusts."""

    name = "tls"
    summary = "everything is encrypted, and both hosts prove who they are"
    paths = frozenset({DIRECT, RELAY})
    paths_with: Mapping[str, frozenset[str]] = {"ktls": frozenset({HANDOVER})}
    avoids = frozenset({DIRECT})
    rank = Rank.SECURITY
    parameters = frozenset({"tls-creds", "tls-hostname", "tls-authz"})

    def probe_host(self, host: Host) -> Answer:
        return host.tls

    def paths_for(self, guest: GuestFacts, host: Host) -> frozenset[str]:
        """QEMU has to know TLS, and to be allowed to read the files."""
        reads = guest.process is None or guest.process.uid in (0, os.getuid())
        if host.tls_directory is not None and guest.types.get(CREDENTIALS, True) and reads:
            return self.paths
        return self.paths - {DIRECT}

    def settings_direct(
        self, agreement: Mapping[str, Any], host: Host, role: Role, peer: PeerIdentity
    ) -> Settings:
        """The daemons know each other by now: the QEMUs have to be with the same two."""
        credentials = {
            "qom-type": CREDENTIALS,
            "dir": host.tls_directory,
            "endpoint": "server" if role == "destination" else "client",
            "verify-peer": True,
        }
        if role == "source":
            return Settings(
                parameters={"tls-creds": _OUR_CREDENTIALS, "tls-hostname": peer.hostname},
                objects={_OUR_CREDENTIALS: credentials},
            )
        return Settings(
            parameters={"tls-creds": _OUR_CREDENTIALS, "tls-authz": _OUR_ALLOWED},
            objects={
                _OUR_CREDENTIALS: credentials,
                _OUR_ALLOWED: {"qom-type": _ALLOWED, "identity": peer.subject},
            },
        )


feature = Tls()
