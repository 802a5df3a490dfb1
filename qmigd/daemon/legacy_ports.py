"""Whether a guest may come in at an address without TLS, where nobody is greeted."""

from __future__ import annotations

from collections.abc import Iterable

from ..transports.uri import Door, InBandAddress, UnixAddress, bare

__all__ = ["objection"]


def objection(
    address: Door,
    *,
    tls_required: bool,
    allow: bool,
    insecure: bool,
    listen: Iterable[Door | InBandAddress[Door]],
    direct_ports: range,
    others: Iterable[tuple[str, Door | None]],
) -> str | None:
    """Return why not, the end of a sentence; ``None``: it may.

    :param allow: ``[tls]`` says whose guests are taken.
    :param insecure: peers without TLS are served beyond loopback.
    :param listen: where the daemon itself listens.
    :param others: the other guests' tables, and where those come in.
    """
    if tls_required:
        return "TLS is required, and QEMU's plain stream has none"
    if allow:
        return (
            "[tls] allow names the peers whose guests are taken, and a plain stream does not show "
            "whose it is"
        )
    if not (insecure or address.is_loopback):
        return (
            "other hosts can reach that, and a plain stream is never in TLS: everybody on the way "
            "could read the guest's RAM, and anybody could send one. Listen on a loopback address "
            "or, in a network that only hypervisors can reach, say 'insecure = true' in [daemon]"
        )
    if address in [bare(one) for one in listen]:
        return "[daemon] listen has it too"
    if not isinstance(address, UnixAddress) and address.port in direct_ports:
        return f"[daemon] direct-ports has {address.port} in it"
    for table, other in others:
        if other == address:
            return f"{table} has it too"
    return None
