"""Connected sockets that did not come about by an endpoint of Twisted's."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet import tcp
from twisted.internet.interfaces import IAddress, IProtocol, IProtocolFactory

__all__ = ["adopt"]


class _Adopted(tcp.Connection):
    """A connected stream socket in the reactor's hands, of any family."""

    def __init__(
        self, sock: socket.socket, protocol: Any, reactor: Any, host: IAddress, peer: IAddress
    ) -> None:
        super().__init__(sock, protocol, reactor)
        self._names = host, peer
        self.connected = 1
        self.logstr = f"{self._getLogPrefix(protocol)},{peer}"
        self.startReading()

    def getHost(self) -> IAddress:
        return self._names[0]

    def getPeer(self) -> IAddress:
        return self._names[1]


def adopt(
    reactor: Any,
    sock: socket.socket,
    factory: IProtocolFactory,
    peer: IAddress,
    host: IAddress | None = None,
) -> IProtocol | None:
    """Give a connected socket to a protocol, as if it had been connected or accepted here.

    :param peer: what the transport says of the other end.
    :param host: and of this one; ``None``: the same.
    :return: ``None``: nobody wants it, and it is closed.
    """
    protocol = factory.buildProtocol(peer)
    if protocol is None:
        sock.close()
        return None
    protocol.makeConnection(_Adopted(sock, protocol, reactor, host or peer, peer))
    return protocol
