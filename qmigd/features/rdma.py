"""``rdma``: RAM goes by RDMA, into the other host's memory without either CPU (QEMU 1.5).

The daemons go on talking over TCP; the stream is QEMU's own ``rdma:HOST:PORT``, between
addresses that RDMA devices serve.  The destination says which of its addresses it is: the
one at which the source has reached it, else one in a subnet that the source's devices are
in too, else its first.

QEMU has one channel there and no postcopy to speak of (10.0 accepts it and 11.1 refuses), so
this excludes most of what else could be had, and is taken on request only.

Three things that QEMU gets wrong are kept away from, and shown by tests/kernel/test_rdma.py:

- With ``return-path`` QEMU before 8.0 fails, and as the destination of a newer one keeps that
  one waiting for 5 s; so both do without where either is that old.  What makes sure that the
  guest runs on one side only is qmigd's RELEASE, which needs no return path.
- What was sent stays registered with the device, and so is locked memory; a limit below all
  of the RAM fails the move half-way, and hangs a QEMU 11.1 that is the source, its guest
  included.
- ``xbzrle`` is refused by newer QEMUs, and taken and ignored by 7.2.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from typing import Any

from ..interfaces import (
    DIRECT,
    HOST,
    Answer,
    Feature,
    GuestFacts,
    Host,
    No,
    Rank,
    Role,
    Settings,
    Withdraw,
    Yes,
)
from .capabilities import known, none_on

__all__ = ["PinAll", "Rdma", "feature", "locked_memory", "pin_all"]

#: The type that a QEMU has that can do RDMA (migration/rdma.c).
_CHANNEL = "qio-channel-rdma"
#: The first QEMU whose return path works here ("migration/rdma: Fix return-path case").
_RETURN_PATH = (8, 0, 0)

#: Bytes that QEMU registers beside the guest's RAM: three control buffers of 512 KiB
#: (RDMA_CONTROL_MAX_BUFFER) for each direction, and the queues.
_CONTROL = 8 << 20

_Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def locked_memory(guest: GuestFacts) -> int | None:
    """Return how many bytes a QEMU has to lock for its guest; ``None``: not known."""
    return sum(block.size for block in guest.ram) + _CONTROL if guest.ram else None


class Rdma(Feature):
    """Both QEMUs have to be able to lock all of the guest's RAM."""

    name = "rdma"
    summary = "RAM goes by RDMA"
    excludes = frozenset({"multifd", "postcopy-preempt", "postcopy-ram", "tls", "zero-copy-send"})
    paths = frozenset({DIRECT})
    rank = Rank.ON_REQUEST

    def probe_host(self, host: Host) -> Answer:
        if not host.rdma:
            return No("it has no RDMA device with a port that is up")
        if not list(_addresses(host)):
            names = ", ".join(device.name for device in host.rdma)
            return No(f"its RDMA devices ({names}) serve no IP address")
        return Yes()

    def probe_guest(self, guest: GuestFacts, role: Role) -> Answer:
        if not (answer := guest.types.get(_CHANNEL, Yes()) and none_on(guest, "xbzrle")):
            return answer
        needed, process = locked_memory(guest), guest.process
        limit = None if process is None else process.memlock
        if limit is not None and needed is not None and limit < needed:
            return No(
                f"its locked-memory limit is {limit >> 20} MiB, and {-(-needed >> 20)} MiB are"
                " needed: raise it with 'ulimit -l', or LimitMEMLOCK= in a systemd unit, before"
                " the guest is started"
            )
        return Yes()

    def propose(self, guest: GuestFacts, host: Host, tunables: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "addresses": [str(address) for address in _addresses(host)],
            "return-path": guest.version >= _RETURN_PATH,
        }

    def answer(self, guest: GuestFacts, host: Host, proposal: Mapping[str, Any]) -> dict[str, Any]:
        theirs = proposal.get("addresses")
        if not isinstance(theirs, list) or not all(isinstance(one, str) for one in theirs):
            raise ValueError("its 'addresses' is not a list of strings")
        address = _choose(list(_addresses(host)), host.address, [_interface(one) for one in theirs])
        if address is None:
            raise Withdraw("no RDMA device serves an IP address any more", HOST)
        return {
            "address": str(address.ip),
            "return-path": proposal.get("return-path") is True and guest.version >= _RETURN_PATH,
        }

    def accept(self, proposal: Mapping[str, Any], agreement: Mapping[str, Any]) -> None:
        _interface(agreement.get("address"))
        if not isinstance(agreement.get("return-path"), bool):
            raise ValueError("its 'return-path' is neither true nor false")
        if agreement["return-path"] and not proposal["return-path"]:
            raise ValueError("it wants a return path that was not proposed")

    def settings(self, agreement: Mapping[str, Any], role: Role) -> Settings:
        return Settings({"return-path": agreement["return-path"]})

    def uri(self, agreement: Mapping[str, Any], host: str, port: int) -> str:
        address = agreement["address"]
        return f"rdma:[{address}]:{port}" if ":" in address else f"rdma:{address}:{port}"


class PinAll(Feature):
    """An addition to ``rdma``: QEMU's capability on both sides."""

    name = "rdma-pin-all"
    summary = "all RAM is locked and registered at once, and not as it is sent"
    requires = frozenset({"rdma"})
    paths = frozenset({DIRECT})

    def probe_host(self, host: Host) -> Answer:
        return feature.probe_host(host)

    def probe_guest(self, guest: GuestFacts, role: Role) -> Answer:
        return known(guest, self.name)

    def settings(self, agreement: Mapping[str, Any], role: Role) -> Settings:
        return Settings({self.name: True})


def _addresses(host: Host) -> Iterator[_Interface]:
    for device in host.rdma:
        for address in device.addresses:
            yield ipaddress.ip_interface(address)


def _interface(text: object) -> _Interface:
    """:raises ValueError: it is no IP address."""
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no IP address")
    return ipaddress.ip_interface(text)


def _choose(ours: list[_Interface], reached: str, theirs: list[_Interface]) -> _Interface | None:
    """Return the address of ours that the source's QEMU is to connect to."""
    same = [address for address in ours if str(address.ip) == reached]
    shared = [address for address in ours if any(address.network == one.network for one in theirs)]
    return next(iter([*same, *shared, *ours]), None)


feature = Rdma()
pin_all = PinAll()
