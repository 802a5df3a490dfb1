"""Multipath TCP (RFC 8684): sockets of another protocol that speak TCP with who lacks it.

The kernel sees to all of it: with a peer that has it too, a connection is carried by as
many paths as ``ip mptcp`` allows on the two hosts; with any other it is an ordinary TCP
connection.  Twisted makes TCP's sockets, so :func:`multipath` gives it a reactor that makes
these.
"""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet import tcp
from twisted.internet.interfaces import IReactorPluggableNameResolver, IReactorTCP, IReactorTime
from zope.interface import directlyProvides

__all__ = ["IPPROTO_MPTCP", "carries_mptcp", "is_available", "multipath"]

#: What the socket module does not name yet (linux/in.h, linux/socket.h, linux/mptcp.h).
IPPROTO_MPTCP = 262
_SOL_MPTCP = 284
_MPTCP_INFO = 1
#: struct mptcp_info begins with eight numbers of a byte each; then come flags.
_FLAGS = slice(8, 12)
_FALLBACK = 1


def is_available() -> str:
    """Return why this kernel does not do it, half a sentence; empty if it does."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP).close()
    except OSError as error:
        # ENOPROTOOPT where net.mptcp.enabled is 0, EPROTONOSUPPORT where it is not built in.
        return f"its kernel does not do Multipath TCP ({error.strerror})"
    return ""


def carries_mptcp(sock: socket.socket) -> bool:
    """Whether a connection has turned out to be one, which the peer has a say in."""
    try:
        info = sock.getsockopt(_SOL_MPTCP, _MPTCP_INFO, _FLAGS.stop)
    except OSError:  # of plain TCP, also where an MPTCP listener has accepted it
        return False
    return not int.from_bytes(info[_FLAGS], "little") & _FALLBACK


def multipath(reactor: Any) -> Any:
    """Return a reactor whose connections and listening ports are Multipath TCP's.

    They are TCP's where this kernel can do no better.
    """
    return reactor if is_available() else _Reactor(reactor)


class _Reactor:
    """A reactor but for :meth:`connectTCP` and :meth:`listenTCP`."""

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        for interface in (IReactorTCP, IReactorTime, IReactorPluggableNameResolver):
            if interface.providedBy(reactor):
                directlyProvides(self, interface)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reactor, name)

    def connectTCP(
        self, host: str, port: int, factory: Any, timeout: float = 30, bindAddress: Any = None
    ) -> Any:
        connector = _Connector(host, port, factory, timeout, bindAddress, self._reactor)
        connector.connect()
        return connector

    def listenTCP(self, port: int, factory: Any, backlog: int = 50, interface: str = "") -> Any:
        listening = _Port(port, factory, backlog, interface, self._reactor)
        listening.startListening()
        return listening


def _socket(family: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP)
    made.setblocking(False)
    return made


class _Client(tcp.Client):
    def createInternetSocket(self) -> socket.socket:
        return _socket(self.addressFamily)


class _Connector(tcp.Connector):
    def _makeTransport(self) -> _Client:
        return _Client(self.host, self.port, self.bindAddress, self, self.reactor)


class _Port(tcp.Port):
    def createInternetSocket(self) -> socket.socket:
        made = _socket(self.addressFamily)
        # As tcp.Port does.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return made
