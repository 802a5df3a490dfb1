"""What became of the guests that came in: for a source that lost the connection.

When the control connection breaks just after RELEASE, the source cannot know whether
the guest runs at the destination.  It connects again and asks (docs/protocol, ASK);
the destination answers from here, to whoever can prove the migration's secret.
"""

from __future__ import annotations

import hmac
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..channels.secured import TlsSide
from ..errors import ProtocolError
from ..handshake.events import Asked, Outcome, Secured
from ..handshake.source import SourceHandshake
from ..negotiation.allow import PeerNames
from ..negotiation.terms import expect
from ..transports.uri import Reachable
from ..wire.greeting import TLS
from ..wire.role import RoleHeader
from .control import connect_control

__all__ = ["Verdicts", "ask"]

#: How many are remembered; the oldest are forgotten first.
REMEMBERED = 1000

#: The name that the proof of an ASK is made with: no payload channel is called so.
CHANNEL = "control"


@dataclass
class _Verdict:
    secret: bytes = field(repr=False)
    peer: PeerNames | None
    ran: bool | None = None


class Verdicts:
    """One destination's memory."""

    def __init__(self) -> None:
        self._verdicts: dict[str, _Verdict] = {}

    def expect(self, migration: str, secret: bytes, peer: PeerNames | None = None) -> None:
        """A migration begins; nobody can say yet what becomes of it.

        :param peer: whose certificate the source has; ``None``: it came in clear, or it is
            not known any more.
        """
        while len(self._verdicts) >= REMEMBERED:
            del self._verdicts[next(iter(self._verdicts))]
        self._verdicts[migration] = _Verdict(secret, peer)

    def settle(self, migration: str, ran: bool | None) -> None:
        """The guest has run here (``True``), never will (``False``), or nobody knows."""
        if migration in self._verdicts:
            self._verdicts[migration].ran = ran

    def answer(self, asked: Asked, peer: PeerNames | None = None) -> dict[str, Any]:
        """Return the body of the OUTCOME that answers an ASK.

        :param peer: whose certificate it came with; ``None``: it came in clear.
        :raises ProtocolError: there was no such migration here, or the proof is wrong.
        """
        migration = expect(asked.body, "migration", str)
        verdict = self._verdicts.get(migration)
        if verdict is None:
            raise ProtocolError(
                f"No migration {migration} is remembered here.", code="unknown-migration"
            )
        proof = expect(asked.body, "proof", str)
        if not hmac.compare_digest(proof.encode(), _proof(migration, verdict.secret).encode()):
            raise ProtocolError(
                f"The ASK does not prove the secret of migration {migration}.", code="bad-proof"
            )
        if verdict.peer is not None and peer != verdict.peer:
            raise ProtocolError(
                f"Migration {migration} was one in TLS, with the certificate of {verdict.peer}; "
                f"so has its ASK to be.",
                code="not-secured",
            )
        return {"ran": verdict.ran}


def _proof(migration: str, secret: bytes) -> str:
    return RoleHeader(uuid.UUID(migration), CHANNEL, 0).prove(secret).proof.hex()


async def ask(
    reactor: Any,
    peer: Reachable,
    migration: str,
    secret: bytes,
    deadline: float,
    tls: TlsSide | None = None,
    *,
    in_band: bool = False,
) -> Mapping[str, Any]:
    """Ask a destination what became of a guest; returns the body of its OUTCOME.

    :param deadline: in seconds, for each step.
    :param tls: of a migration that was one in TLS.
    :param in_band: the handshake has its in-band form there.
    :raises QmigdError: it cannot be reached, or does not know.
    """
    machine = SourceHandshake()
    control = await connect_control(reactor, peer, machine, deadline, tls, in_band=in_band)
    try:
        await control.greeted(deadline)
        machine.reply([TLS] if tls else [])
        control.flush()
        if tls:
            await control.next(Secured, deadline=deadline, what="TLS with the peer")
        machine.ask({"migration": migration, "proof": _proof(migration, secret)})
        control.flush()
        outcome = await control.next(Outcome, deadline=deadline, what="the answer to ASK")
    finally:
        control.close()
    return outcome.body
