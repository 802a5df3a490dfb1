"""Addresses in QEMU's URI syntax: ``tcp:``, ``unix:``, ``vsock:``, ``exec:`` and ``fd:``.

The text is what a person writes, in the configuration or for ``migrate``; what comes
out is frozen, compares by value and gives the same text again with ``str()``.

Nobody can listen on ``exec:``, and each migration starts programs of its own:
:mod:`qmigd.transports.programs` has what connects to it.
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic, Protocol, TypeVar

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.endpoints import (
    HostnameEndpoint,
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    TCP6ClientEndpoint,
    TCP6ServerEndpoint,
    UNIXClientEndpoint,
)
from twisted.internet.interfaces import IStreamClientEndpoint, IStreamServerEndpoint

from qmigd.errors import ArgumentError
from qmigd.transports.descriptors import FdAddress

from .doors import UnixServerEndpoint
from .mptcp import multipath
from .vsock import ANY_CID, LOCAL_CID, VsockClientEndpoint, VsockPeer, VsockServerEndpoint

__all__ = [
    "DEFAULT_PORT",
    "MAX_UNIX_PATH",
    "Address",
    "Door",
    "ExecAddress",
    "FdAddress",
    "InBandAddress",
    "Network",
    "Place",
    "Reachable",
    "TcpAddress",
    "UnixAddress",
    "VsockAddress",
    "bare",
    "network_of",
    "parse_peer",
    "parse_uri",
]

#: Where a peer listens unless its URI says otherwise.
DEFAULT_PORT: Final = 16516

#: Bytes of a unix socket's path: ``sun_path`` has 108, and the last one is zero.
MAX_UNIX_PATH: Final = 107

#: What QEMU migrates over besides, and a qmigd is not reached by.
_NOT_SERVED = ("file", "rdma")

#: QEMU's option of a TCP address.
_MPTCP = ",mptcp=on"

#: Seconds after which the next address of a name is tried beside the one before, which
#: RFC 8305, 5 recommends.
_ATTEMPT_DELAY = 0.25

#: What QEMU has ``exec:COMMAND`` run by.
_SHELL = ("/bin/sh", "-c")

_FORMS = "tcp:HOST:PORT, unix:PATH, vsock:CID:PORT, exec:COMMAND or fd:"


class Reachable(Protocol):
    """Where a peer can be connected to, any number of times; ``str()`` says it to people."""

    def client(self, reactor: object, timeout: float = 30.0) -> IStreamClientEndpoint:
        """What connects to it, within ``timeout`` seconds."""


@dataclass(frozen=True)
class TcpAddress:
    """``tcp:HOST:PORT``.

    :ivar host: a name or an IP address, without brackets; empty: every address of
        this host, which is good for listening only.
    :ivar port: 0-65535; 0 lets the kernel choose, which is good for listening only.
    :ivar mptcp: Multipath TCP (RFC 8684) with a peer that has it too, else TCP.
    """

    host: str
    port: int = DEFAULT_PORT
    mptcp: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}{_MPTCP if self.mptcp else ''}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this host can reach it.  A name other than localhost may be any."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def client(self, reactor: object, timeout: float = 30.0) -> IStreamClientEndpoint:
        """What connects to it, within ``timeout`` seconds.

        :raises ArgumentError: nothing can be connected to here.
        """
        if not self.host or not self.port:
            raise ArgumentError(f"{self} names no host and port that could be connected to.")
        if self.mptcp:
            reactor = multipath(reactor)
        # An address needs no look-up, which takes longer than the connection itself.
        if ":" in self.host:
            return TCP6ClientEndpoint(reactor, self.host, self.port, timeout)
        if _is_ipv4(self.host):
            return TCP4ClientEndpoint(reactor, self.host, self.port, timeout)
        return HostnameEndpoint(reactor, self.host, self.port, timeout, attemptDelay=_ATTEMPT_DELAY)

    def server(self, reactor: object, backlog: int = 1024) -> IStreamServerEndpoint:
        """What listens on it; without a host on IPv6 and IPv4 alike."""
        if self.mptcp:
            reactor = multipath(reactor)
        if not self.host or ":" in self.host:
            return TCP6ServerEndpoint(reactor, self.port, backlog, self.host or "::")
        return TCP4ServerEndpoint(reactor, self.port, backlog, self.host)


@dataclass(frozen=True)
class UnixAddress:
    """``unix:PATH``.

    :ivar path: of the socket, at most :data:`MAX_UNIX_PATH` bytes long.
    :ivar group: whose members may connect to it as well, which is for listening only.
    """

    path: str
    group: str | None = None

    def __str__(self) -> str:
        return f"unix:{self.path}"

    @property
    def is_loopback(self) -> bool:
        """Always true: no other host can reach it."""
        return True

    def client(self, reactor: object, timeout: float = 30.0) -> IStreamClientEndpoint:
        """What connects to it, within ``timeout`` seconds."""
        return UNIXClientEndpoint(reactor, self.path, timeout)

    def server(self, reactor: object, backlog: int = 1024) -> IStreamServerEndpoint:
        """What listens on it; only the same user and the group can connect."""
        return UnixServerEndpoint(reactor, self.path, backlog, self.group)


@dataclass(frozen=True)
class VsockAddress:
    """``vsock:CID:PORT``: between a virtual machine and what it runs on (vsock(7)).

    :ivar cid: of a machine; ``None``: any of this one's, which is good for listening only.
    :ivar port: 0 to 2^32 - 2.
    """

    cid: int | None
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        return f"vsock:{'' if self.cid is None else self.cid}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.cid == LOCAL_CID

    def client(self, reactor: object, timeout: float = 30.0) -> IStreamClientEndpoint:
        """What connects to it, within ``timeout`` seconds.

        :raises ArgumentError: nothing can be connected to here.
        """
        if self.cid is None:
            raise ArgumentError(f"{self} names no machine that could be connected to.")
        return VsockClientEndpoint(reactor, self.cid, self.port, timeout)

    def server(self, reactor: object, backlog: int = 1024) -> IStreamServerEndpoint:
        """What listens on it."""
        cid = ANY_CID if self.cid is None else self.cid
        return VsockServerEndpoint(reactor, cid, self.port, backlog)


@dataclass(frozen=True)
class ExecAddress:
    """``exec:COMMAND``, which is run by a shell, as QEMU does it; or a program's own arguments.

    :ivar argv: the program and its arguments.
    """

    argv: tuple[str, ...]

    def __str__(self) -> str:
        if self.argv[:-1] == _SHELL:
            return f"exec:{self.argv[-1]}"
        # Another text, but it comes to the same.
        return f"exec:exec {shlex.join(self.argv)}"


#: Where a daemon can listen.
Door = TcpAddress | UnixAddress | VsockAddress

A = TypeVar("A", bound=Door | ExecAddress | FdAddress, covariant=True)


@dataclass(frozen=True)
class InBandAddress(Generic[A]):
    """``in-band:`` and another address: the handshake has its in-band form there.

    :ivar inner: where that is.
    """

    inner: A

    def __str__(self) -> str:
        return f"{IN_BAND}{self.inner}"


#: Where a migration can go.
Place = Door | ExecAddress | FdAddress

Address = Place | InBandAddress[Place]

#: What stands before an address for the other form of the handshake.
IN_BAND = "in-band:"


def bare(address: A | InBandAddress[A]) -> A:
    """Return an address without the form of the handshake there."""
    return address.inner if isinstance(address, InBandAddress) else address


#: What a QEMU has an address of its own in.
Network = TcpAddress | VsockAddress


def network_of(end: object) -> Network | None:
    """Return one end of a connection as an address, or ``None``: it is in no network.

    :param end: what Twisted calls ``IAddress``.
    """
    if isinstance(end, IPv4Address | IPv6Address):
        return TcpAddress(end.host, end.port)
    return VsockAddress(end.cid, end.port) if isinstance(end, VsockPeer) else None


def parse_uri(text: str, argv: Sequence[str] = ()) -> Address:
    """Read a URI: ``tcp:HOST``, ``tcp:HOST:PORT``, ``tcp:[IPV6]:PORT`` or another kind.

    ``in-band:`` before it stands for the other form of the handshake.

    :param argv: a program and its arguments; the URI is ``exec:`` then, and no more.
    :raises ArgumentError: it is none of these; the text says what is wrong with it.
    """
    if text.startswith(IN_BAND):
        inner = parse_uri(text.removeprefix(IN_BAND), argv)
        if isinstance(inner, InBandAddress):
            raise ArgumentError(f'"{text}": {IN_BAND} stands there once.')
        return InBandAddress(inner)
    scheme, colon, rest = text.partition(":")
    if not colon:
        raise ArgumentError(f'"{text}" is not a URI: write {_FORMS}.')
    if argv and text != "exec:":
        raise ArgumentError(f'"{text}": a program and its arguments go with "exec:" alone.')
    if scheme == "tcp":
        return _parse_tcp(text, rest)
    if scheme == "unix":
        return _parse_unix(text, rest)
    if scheme == "vsock":
        return _parse_vsock(text, rest)
    if scheme == "exec":
        return _parse_exec(rest, argv)
    if scheme == "fd":
        if rest:
            raise ArgumentError(
                f'"{text}" names a descriptor: write fd: alone, and hand over a connection for '
                f"each CHANNEL_REQUEST with add-channel."
            )
        return FdAddress()
    if scheme in _NOT_SERVED:
        raise ArgumentError(
            f'"{text}": a qmigd cannot be reached over {scheme}:, only over tcp:, unix:, vsock:, '
            f"exec: and fd:."
        )
    raise ArgumentError(f'"{text}" has the unknown scheme "{scheme}": write {_FORMS}.')


def parse_peer(text: str, argv: Sequence[str] = ()) -> Address:
    """Read the URI of somebody to connect to; see :func:`parse_uri`.

    :raises ArgumentError: as well where one can only listen.
    """
    address = parse_uri(text, argv)
    place = bare(address)
    if isinstance(place, TcpAddress) and not (place.host and place.port):
        raise ArgumentError(f'"{text}" leads to no host and port: write tcp:HOST:PORT.')
    if isinstance(place, VsockAddress) and place.cid is None:
        raise ArgumentError(f'"{text}" leads to no machine: write vsock:CID:PORT.')
    return address


def _is_ipv4(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 4
    except ValueError:
        return False


def _parse_tcp(text: str, rest: str) -> TcpAddress:
    plain = rest.removesuffix(_MPTCP)
    if plain != rest:
        return replace(_parse_tcp(text, plain), mptcp=True)
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        if not bracket or (tail and not tail.startswith(":")):
            raise ArgumentError(f'"{text}": an IPv6 address is written tcp:[ADDRESS]:PORT.')
        try:
            # A scope, as in fe80::1%eth0, is part of the address.
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ArgumentError(f'"{text}": "{host}" is not an IPv6 address.') from None
        return TcpAddress(host, _parse_port(text, tail[1:]) if tail else DEFAULT_PORT)
    if rest.count(":") > 1:
        raise ArgumentError(f'"{text}": an IPv6 address stands in brackets: tcp:[ADDRESS]:PORT.')
    host, colon, port = rest.partition(":")
    if not host and not colon:
        raise ArgumentError(f'"{text}" names no host: write tcp:HOST:PORT.')
    if any(not character.isprintable() or character in " ,/[]" for character in host):
        raise ArgumentError(f'"{text}": "{host}" is not the name or address of a host.')
    return TcpAddress(host, _parse_port(text, port) if colon else DEFAULT_PORT)


def _parse_port(text: str, port: str) -> int:
    if not (port.isascii() and port.isdigit()) or int(port[:6]) > 0xFFFF:
        raise ArgumentError(f'"{text}": "{port}" is not a port, a number up to 65535.')
    return int(port)


def _parse_vsock(text: str, rest: str) -> VsockAddress:
    cid, colon, port = rest.partition(":")
    numbers = [cid or "0", port if colon else str(DEFAULT_PORT)]
    if not all(_is_vsock_number(number) for number in numbers) or not rest:
        raise ArgumentError(
            f'"{text}" is not vsock:CID:PORT, two numbers up to {ANY_CID - 1}; a virtual machine '
            f"has the CID that its hypervisor gave it, and the hypervisor 2."
        )
    return VsockAddress(int(cid) if cid else None, int(numbers[1]))


def _is_vsock_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text[:11]) < ANY_CID


def _parse_exec(command: str, argv: Sequence[str]) -> ExecAddress:
    words = tuple(argv) or (*_SHELL, command)
    if not words[0].strip() or not (argv or command.strip()):
        raise ArgumentError(
            '"exec:" needs a command: exec:COMMAND, which /bin/sh runs, or "exec:" and a program '
            "with its arguments."
        )
    if any("\0" in word for word in words):
        raise ArgumentError("A command cannot have a zero byte in it.")
    return ExecAddress(words)


def _parse_unix(text: str, path: str) -> UnixAddress:
    if not path:
        raise ArgumentError(f'"{text}" names no socket: write unix:PATH.')
    if "\0" in path:
        raise ArgumentError("The path of a unix socket cannot have a zero byte in it.")
    if len(path.encode(errors="surrogateescape")) > MAX_UNIX_PATH:
        raise ArgumentError(
            f'"{text}" is too long: a unix socket\'s path has at most {MAX_UNIX_PATH} bytes.'
        )
    return UnixAddress(path)
