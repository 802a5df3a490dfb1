"""Addresses in QEMU's URI syntax: ``tcp:HOST:PORT`` and ``unix:PATH``.

The text is what a person writes, in the configuration or for ``migrate``; what comes
out is frozen, compares by value and gives the same text again with ``str()``.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Final

from twisted.internet.endpoints import (
    HostnameEndpoint,
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    TCP6ServerEndpoint,
    UNIXClientEndpoint,
    UNIXServerEndpoint,
)
from twisted.internet.interfaces import IStreamClientEndpoint, IStreamServerEndpoint

from qmigd.errors import ArgumentError

__all__ = [
    "DEFAULT_PORT",
    "MAX_UNIX_PATH",
    "Address",
    "TcpAddress",
    "UnixAddress",
    "parse_uri",
]

#: Where a peer listens unless its URI says otherwise.
DEFAULT_PORT: Final = 16516

#: Bytes of a unix socket's path: ``sun_path`` has 108, and the last one is zero.
MAX_UNIX_PATH: Final = 107

#: What QEMU migrates over besides, and a qmigd does not listen on.
_NOT_SERVED = ("exec", "fd", "file", "rdma", "vsock")


@dataclass(frozen=True)
class TcpAddress:
    """``tcp:HOST:PORT``.

    :ivar host: a name or an IP address, without brackets; empty: every address of
        this host, which is good for listening only.
    :ivar port: 0-65535; 0 lets the kernel choose, which is good for listening only.
    """

    host: str
    port: int = DEFAULT_PORT

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"

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
        # An address needs no look-up, which takes longer than the connection itself.
        if _is_ipv4(self.host):
            return TCP4ClientEndpoint(reactor, self.host, self.port, timeout)
        return HostnameEndpoint(reactor, self.host, self.port, timeout)

    def server(self, reactor: object, backlog: int = 1024) -> IStreamServerEndpoint:
        """What listens on it; without a host on IPv6 and IPv4 alike."""
        if not self.host or ":" in self.host:
            return TCP6ServerEndpoint(reactor, self.port, backlog, self.host or "::")
        return TCP4ServerEndpoint(reactor, self.port, backlog, self.host)


@dataclass(frozen=True)
class UnixAddress:
    """``unix:PATH``.

    :ivar path: of the socket, at most :data:`MAX_UNIX_PATH` bytes long.
    """

    path: str

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
        """What listens on it; only the same user can connect."""
        return UNIXServerEndpoint(reactor, self.path, backlog, mode=0o600)


Address = TcpAddress | UnixAddress


def parse_uri(text: str) -> Address:
    """Read a URI: ``tcp:HOST``, ``tcp:HOST:PORT``, ``tcp:[IPV6]:PORT`` or ``unix:PATH``.

    :raises ArgumentError: it is none of these; the text says what is wrong with it.
    """
    scheme, colon, rest = text.partition(":")
    if not colon:
        raise ArgumentError(f'"{text}" is not a URI: write tcp:HOST:PORT or unix:PATH.')
    if scheme == "tcp":
        return _parse_tcp(text, rest)
    if scheme == "unix":
        return _parse_unix(text, rest)
    if scheme in _NOT_SERVED:
        raise ArgumentError(
            f'"{text}": a qmigd cannot be reached over {scheme}:, only over tcp: and unix:.'
        )
    raise ArgumentError(
        f'"{text}" has the unknown scheme "{scheme}": write tcp:HOST:PORT or unix:PATH.'
    )


def _is_ipv4(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).version == 4
    except ValueError:
        return False


def _parse_tcp(text: str, rest: str) -> TcpAddress:
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
