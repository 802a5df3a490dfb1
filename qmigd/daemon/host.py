"""What this host can do, found out once, when the daemon starts.

RDMA devices are in /sys/class/infiniband, whatever the hardware: InfiniBand, RoCE, iWARP
and the soft ones alike.  A device serves the IP addresses of its network interfaces:
those that its GIDs belong to (RoCE, iWARP), or that have it as their parent (IP over
InfiniBand).  The addresses themselves, with the length of their prefix, come over
netlink, as ``ip address`` has them.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from qmigd.interfaces import Host, RdmaDevice
from qmigd.transports.zero_copy import enable

__all__ = ["gather", "rdma_devices"]

_INFINIBAND = Path("/sys/class/infiniband")
_NETWORK = Path("/sys/class/net")
_TCP_WMEM = Path("/proc/sys/net/ipv4/tcp_wmem")
#: A port's state in sysfs begins with its number (IB_PORT_ACTIVE in rdma/ib_verbs.h).
_ACTIVE = "4:"

# Netlink (linux/rtnetlink.h, linux/if_addr.h).
_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x300
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_NLMSGHDR = struct.Struct("=IHHII")
_IFADDRMSG = struct.Struct("=BBBBI")
_RTATTR = struct.Struct("=HH")


def gather() -> Host:
    """Return the facts.  What cannot be found out is not known; nothing is raised."""
    return Host(
        cpus=len(os.sched_getaffinity(0)),
        kernel=os.uname().release,
        rdma=tuple(rdma_devices()),
        zero_copy_sockets=_takes_zero_copy(),
        tcp_send_buffer=_tcp_send_buffer(),
    )


def _takes_zero_copy() -> bool:
    with socket.socket(socket.AF_INET) as probe:
        try:
            enable(probe)
        except OSError:
            return False
    return True


def _tcp_send_buffer() -> int | None:
    try:
        return int(_TCP_WMEM.read_text().split()[2])
    except (OSError, ValueError, IndexError):
        return None


def rdma_devices(root: Path = _INFINIBAND, network: Path = _NETWORK) -> Iterator[RdmaDevice]:
    """Give the devices that have a port that is up."""
    devices = [device for device in _within(root) if _is_up(device)]
    if not devices:
        return
    addresses = _addresses()
    for device in devices:
        served = [
            address
            for interface in sorted({*_interfaces(device), *_children(device, network)})
            for address in addresses.get(interface, ())
        ]
        yield RdmaDevice(device.name, tuple(served))


def _within(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _is_up(device: Path) -> bool:
    return any(_read(port / "state").startswith(_ACTIVE) for port in _within(device / "ports"))


def _interfaces(device: Path) -> Iterator[str]:
    """Give the network interfaces that the device's GIDs belong to."""
    for port in _within(device / "ports"):
        for gid in _within(port / "gid_attrs" / "ndevs"):
            if interface := _read(gid):
                yield interface


def _children(device: Path, network: Path) -> Iterator[str]:
    """Give the network interfaces whose parent the device is."""
    for interface in _within(network):
        if (interface / "device" / "infiniband" / device.name).exists():
            yield interface.name


def _read(path: Path) -> str:
    # Reading a GID that is not in use gives EINVAL.
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def _addresses() -> dict[str, list[str]]:
    """Return the IP addresses of each network interface, each with its prefix's length."""
    found: dict[str, list[str]] = {}
    try:
        for index, address in _dump():
            if not address.is_link_local:
                found.setdefault(socket.if_indextoname(index), []).append(str(address))
    except OSError:
        pass
    return found


def _dump() -> Iterator[tuple[int, ipaddress.IPv4Interface | ipaddress.IPv6Interface]]:
    request = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    header = _NLMSGHDR.pack(
        _NLMSGHDR.size + len(request), _RTM_GETADDR, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(header + request)
        while True:
            rest = netlink.recv(1 << 16)
            while len(rest) >= _NLMSGHDR.size:
                size, kind, *_ = _NLMSGHDR.unpack_from(rest)
                if kind != _RTM_NEWADDR:  # NLMSG_DONE, or an error
                    return
                yield from _entry(rest[_NLMSGHDR.size : size])
                rest = rest[size + 3 & ~3 :]


def _entry(body: bytes) -> Iterator[tuple[int, ipaddress.IPv4Interface | ipaddress.IPv6Interface]]:
    _, prefix, _, _, index = _IFADDRMSG.unpack_from(body)
    attributes = {}
    rest = body[_IFADDRMSG.size :]
    while len(rest) >= _RTATTR.size:
        size, kind = _RTATTR.unpack_from(rest)
        attributes[kind] = rest[_RTATTR.size : size]
        rest = rest[max(size, _RTATTR.size) + 3 & ~3 :]
    # On a point-to-point link IFA_ADDRESS is the other end's.
    packed = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS))
    if packed is not None:
        yield index, ipaddress.ip_interface((packed, prefix))
