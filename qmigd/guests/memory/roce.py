"""Which RDMA device serves an IP address by RoCE v2, as sysfs has it.

A RoCE device has a GID for each address of its network interface, one of each version of
RoCE; a packet goes by that whose index its queue pair was given.  In version 2 it is an IP
address (an IPv4 one mapped into IPv6), and the packets are UDP.

Source: Documentation/ABI/stable/sysfs-class-infiniband of the kernel.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Port", "devices", "of"]

_DEVICES = Path("/sys/class/infiniband")
_ACTIVE = "4:"  # IB_PORT_ACTIVE
_VERSION = "RoCE v2"


@dataclass(frozen=True)
class Port:
    """A port of a device, and one of its GIDs.

    :ivar device: the kernel's name for the device, ``"rxe0"``.
    :ivar number: of the port; the first is 1.
    :ivar index: of the GID.
    :ivar gid: 16 bytes.
    """

    device: str
    number: int
    index: int
    gid: bytes


def devices(root: Path = _DEVICES) -> list[str]:
    """Return the devices that can do RoCE v2 on a port that is up."""
    return [device.name for device in _within(root) if any(_ports(device))]


def _ports(device: Path) -> Iterator[Port]:
    """Give the GIDs of RoCE v2 of its ports that are up, one by one: there is room for 1024."""
    for port in _within(device / "ports"):
        if not _read(port / "state").startswith(_ACTIVE):
            continue
        kinds = port / "gid_attrs" / "types"
        for index in sorted(int(entry.name) for entry in _within(kinds)):
            name = str(index)
            if _read(kinds / name) == _VERSION and (gid := _read(port / "gids" / name)):
                packed = ipaddress.IPv6Address(gid).packed
                yield Port(device=device.name, number=int(port.name), index=index, gid=packed)


def of(address: str, root: Path = _DEVICES) -> Port | None:
    """Return the port that serves an IP address.

    :param address: without a zone; an IPv4 address may be a mapped one.
    """
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv4Address):
        found = ipaddress.IPv6Address(f"::ffff:{found}")
    wanted = found.packed
    all_ports = (port for device in _within(root) for port in _ports(device))
    return next((port for port in all_ports if port.gid == wanted), None)


def _within(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _read(path: Path) -> str:
    # Reading what belongs to a GID that is not in use gives EINVAL.
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""
