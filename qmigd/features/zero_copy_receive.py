"""``zero-copy-receive``: in a relay, bytes are moved without copying them, where that is cheaper.

What QEMU's ``zero-copy-send`` is on the path ``direct``, from qmigd's side of the
relay.  The bytes on the wire are the same whatever moves them, so that each side
chooses for itself: the source what moves the stream from its QEMU to the network, the
destination what moves it from the network to its QEMU, by what was measured on that host.
The agreement says what they have chosen; one for whom a copy is the cheapest copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..interfaces import (
    COPY,
    KERNEL,
    RELAY,
    Answer,
    Feature,
    GuestFacts,
    Host,
    Rank,
    Role,
    Withdraw,
    Yes,
)

__all__ = ["ZeroCopyReceive", "feature"]


class ZeroCopyReceive(Feature):
    """Offered by a host that gains by it in one direction at least."""

    name = "zero-copy-receive"
    summary = "a relay moves bytes without copying them, where that is cheaper"
    paths = frozenset({RELAY})
    # In TLS, what is received has to be decrypted first, and it was not measured.
    excludes = frozenset({"tls"})
    rank = Rank.THRIFT

    def probe_host(self, host: Host) -> Answer:
        if host.zero_copy.send == host.zero_copy.receive == COPY:
            return host.zero_copy.obstacle
        return Yes()

    def propose(self, guest: GuestFacts, host: Host, tunables: Mapping[str, Any]) -> dict[str, Any]:
        return {"send": host.zero_copy.send}

    def answer(self, guest: GuestFacts, host: Host, proposal: Mapping[str, Any]) -> dict[str, Any]:
        send, receive = proposal.get("send"), host.zero_copy.receive
        if not isinstance(send, str):
            raise ValueError("its 'send' is not the name of a mover")
        if send == receive == COPY:
            raise Withdraw(
                "a copy is cheaper for the source's kernel to send, and for this one to receive",
                KERNEL,
            )
        return {"send": send, "receive": receive}

    def accept(self, proposal: Mapping[str, Any], agreement: Mapping[str, Any]) -> None:
        if agreement.get("send") != proposal["send"]:
            raise ValueError(f"its 'send' is {agreement.get('send')!r}, not {proposal['send']!r}")
        if not isinstance(agreement.get("receive"), str):
            raise ValueError("its 'receive' is not the name of a mover")

    def mover(self, agreement: Mapping[str, Any], role: Role) -> str:
        return str(agreement["send" if role == "source" else "receive"])


feature = ZeroCopyReceive()
