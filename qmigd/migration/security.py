"""TLS between two daemons: with whose certificate, and what is asked of the peer.

On either side OpenSSL sees to it that the peer's certificate is good, and that the peer has
its key (:mod:`qmigd.channels.credentials`).  What is decided here is whether it is the
right one: the source wants the host that it has called, and the destination one that may
send guests here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..channels.credentials import CredentialStore
from ..channels.identity import check_host
from ..channels.secured import TlsSide
from ..channels.tls import TlsSession
from ..errors import FeatureError, LocalError
from ..negotiation.allow import Allow, PeerNames

__all__ = ["Security"]


@dataclass(frozen=True)
class Security:
    """What this host asks of its peers.

    :ivar store: this host's certificates; ``None``: there is no TLS here.
    :ivar allow: who may send guests here, and which.
    :ivar insecure: other hosts may send them without TLS.
    """

    store: CredentialStore | None = None
    allow: Allow = field(default_factory=Allow)
    insecure: bool = False

    def calling(self, host: str, *, keep_keys: bool = False) -> TlsSide | None:
        """What the source does on a connection that it makes.

        :param host: the name or address that the peer's certificate has to be for.
        """
        if self.store is None:
            return None

        def judge(session: TlsSession) -> None:
            check_host(session.certificate, host)

        return TlsSide(self.store.current, False, judge, keep_keys)

    def called(self, *, keep_keys: bool) -> TlsSide | None:
        """What the destination does on a connection that comes in."""
        if self.store is None:
            return None

        def judge(session: TlsSession) -> None:
            if reason := self.allow.permits_peer(session.peer):
                raise LocalError(f"This host takes no guest from that peer: {reason}", code="peer")

        return TlsSide(self.store.current, True, judge, keep_keys)

    def check_guest(self, peer: PeerNames | None, guest: str) -> None:
        """See that a guest may come in from that peer.

        :param peer: whose certificate it came with; ``None``: it came in clear.
        :raises FeatureError: it may not, and why.
        """
        if peer is None:
            if self.allow.entries is not None:
                raise FeatureError(
                    "this host takes guests only from peers that its 'allow' names, and only a "
                    "certificate shows who a peer is: let the source use TLS"
                )
        elif reason := self.allow.permits_guest(peer, guest):
            raise FeatureError(reason, code="peer")
