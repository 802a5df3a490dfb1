"""``multifd``: RAM goes over several channels at once (QEMU 4.0 and newer)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ArgumentError
from ..interfaces import (
    DIRECT,
    MAPPED_RAM,
    RELAY,
    Answer,
    Channels,
    Feature,
    GuestFacts,
    Host,
    Role,
    Settings,
    Withdraw,
)
from .capabilities import known, none_on

__all__ = ["COMPRESSION", "COUNT", "MOST", "Multifd", "feature", "most_channels"]

#: More channels than this have not been seen to gain anything.
MOST = 8
#: QEMU's own default.
LEAST = 2
#: ``multifd-channels`` is a uint8 in QEMU (qapi/migration.json).
QEMU_MOST = 255

COUNT = "multifd-channels"
COMPRESSION = "multifd-compression"


def most_channels(*cpus: int) -> int:
    """Return how many channels hosts with so many CPUs have, each at the most, without a wish."""
    return max(LEAST, min(MOST, *cpus))


class Multifd(Feature):
    """Both sides must have the same number of channels and the same compression.

    The number is that of the smaller host's CPUs, from 2 to 8, unless the user gives
    the tunable ``multifd-channels``.
    """

    name = "multifd"
    summary = "RAM over several channels at once"
    paths = frozenset({DIRECT, RELAY})
    formats = frozenset({MAPPED_RAM})
    tunables = frozenset({COUNT, COMPRESSION})

    def probe_guest(self, guest: GuestFacts, role: Role) -> Answer:
        return known(guest, "multifd", f"it ({_version(guest)})") and none_on(
            guest, "xbzrle", "mapped-ram", "x-ignore-shared"
        )

    def propose(self, guest: GuestFacts, host: Host, tunables: Mapping[str, Any]) -> dict[str, Any]:
        proposal: dict[str, Any] = {"cpus": host.cpus}
        if COUNT in tunables:
            if not 1 <= tunables[COUNT] <= QEMU_MOST:
                raise ArgumentError(
                    f"{COUNT} cannot be {tunables[COUNT]}: it has to be from 1 to {QEMU_MOST}"
                )
            proposal["channels"] = tunables[COUNT]
        compression = tunables.get(COMPRESSION, guest.parameters.get(COMPRESSION))
        if compression is not None:
            proposal["compression"] = compression
        return proposal

    def answer(self, guest: GuestFacts, host: Host, proposal: Mapping[str, Any]) -> dict[str, Any]:
        channels = proposal.get("channels")
        if channels is None:
            cpus = proposal.get("cpus")
            if not isinstance(cpus, int) or cpus < 1:
                raise ValueError("its 'cpus' is not a number of CPUs")
            channels = most_channels(cpus, host.cpus)
        elif not isinstance(channels, int) or not 1 <= channels <= QEMU_MOST:
            raise ValueError(f"its 'channels' is not a number from 1 to {QEMU_MOST}")
        agreement: dict[str, Any] = {"channels": channels}
        if "compression" in proposal:
            compression = proposal["compression"]
            if COMPRESSION not in guest.parameters and compression != "none":
                raise Withdraw(f"it ({_version(guest)}) cannot compress its channels")
            if COMPRESSION in guest.parameters:
                agreement["compression"] = compression
        return agreement

    def accept(self, proposal: Mapping[str, Any], agreement: Mapping[str, Any]) -> None:
        channels = agreement.get("channels")
        if not isinstance(channels, int) or not 1 <= channels <= QEMU_MOST:
            raise ValueError("its 'channels' is not a number of channels")
        if "channels" in proposal and channels != proposal["channels"]:
            raise ValueError(f"{proposal['channels']} channels were asked for, not {channels}")
        if agreement.get("compression", "none") != proposal.get("compression", "none"):
            raise ValueError("its 'compression' is another one than was asked for")

    def settings(self, agreement: Mapping[str, Any], role: Role) -> Settings:
        parameters = {COUNT: agreement["channels"]}
        if "compression" in agreement:
            parameters[COMPRESSION] = agreement["compression"]
        return Settings({"multifd": True}, parameters)

    def channels(self, agreement: Mapping[str, Any]) -> Sequence[Channels]:
        return (Channels("multifd", agreement["channels"]),)


def _version(guest: GuestFacts) -> str:
    return ".".join(map(str, guest.version))


feature = Multifd()
