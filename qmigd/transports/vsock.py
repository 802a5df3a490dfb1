"""vsock(7): connections between a virtual machine and what it runs on, without a network.

Twisted knows no such addresses; here is what makes the sockets, and says whose they are.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from twisted.internet import error
from twisted.internet.abstract import FileDescriptor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IAddress,
    IListeningPort,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
    IStreamServerEndpoint,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from qmigd.transports.adopting import adopt

__all__ = [
    "ANY_CID",
    "LOCAL_CID",
    "VsockClientEndpoint",
    "VsockPeer",
    "VsockServerEndpoint",
]

log = Logger()

#: VMADDR_CID_ANY and VMADDR_CID_LOCAL (linux/vm_sockets.h).
ANY_CID: Final = 0xFFFFFFFF
LOCAL_CID: Final = 1

#: Connections that are taken before the reactor looks after others.
_AT_ONCE: Final = 64


@implementer(IAddress)
@dataclass(frozen=True)
class VsockPeer:
    """One end of a connection."""

    cid: int
    port: int

    def __str__(self) -> str:
        return f"vsock:{self.cid}:{self.port}"


def _begin(sock: socket.socket, factory: IProtocolFactory, reactor: Any) -> IProtocol | None:
    """Give a connected socket to a protocol, or close it if nobody wants it."""
    host, peer = VsockPeer(*sock.getsockname()), VsockPeer(*sock.getpeername())
    return adopt(reactor, sock, factory, peer, host)


@implementer(IStreamClientEndpoint)
class VsockClientEndpoint:
    """What connects to a port of a machine."""

    def __init__(self, reactor: Any, cid: int, port: int, timeout: float) -> None:
        self._reactor = reactor
        self._address = cid, port
        self._timeout = timeout

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """Fails with a :class:`twisted.internet.error.ConnectError`."""
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        try:
            sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        except OSError as failed:
            raise error.ConnectError(failed.errno, f"no vsock here: {failed.strerror}") from None
        try:
            sock.setblocking(False)
            code = sock.connect_ex(self._address)
            if code == errno.EINPROGRESS:
                await self._writable(sock)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise error.ConnectError(code, os.strerror(code))
            protocol = _begin(sock, factory, self._reactor)
        except BaseException:
            sock.close()
            raise
        if protocol is None:
            raise error.ConnectError(string="nobody wants the connection")
        return protocol

    async def _writable(self, sock: socket.socket) -> None:
        def expire() -> None:
            done.errback(error.TimeoutError(string=f"no answer within {self._timeout:g} seconds"))

        done: Deferred[None] = Deferred()
        waiting = _Ready(self._reactor, sock, lambda: done.callback(None))
        waiting.startWriting()
        timer = self._reactor.callLater(self._timeout, expire)
        try:
            await done
        finally:
            waiting.stopWriting()
            if timer.active():
                timer.cancel()


@implementer(IStreamServerEndpoint)
class VsockServerEndpoint:
    """What listens on a port of this machine."""

    def __init__(self, reactor: Any, cid: int, port: int, backlog: int) -> None:
        self._reactor = reactor
        self._address = cid, port
        self._backlog = backlog

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[IListeningPort]:
        """Fails with a :class:`twisted.internet.error.CannotListenError`."""

        async def listen() -> IListeningPort:
            try:
                sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            except OSError as failed:
                raise error.CannotListenError("vsock", self._address[1], failed) from None
            try:
                sock.setblocking(False)
                sock.bind(self._address)
                sock.listen(self._backlog)
            except OSError as failed:
                sock.close()
                raise error.CannotListenError("vsock", self._address[1], failed) from None
            return _Port(self._reactor, sock, protocolFactory)

        return Deferred.fromCoroutine(listen())


@implementer(IListeningPort)
class _Port:
    """A listening socket."""

    def __init__(self, reactor: Any, sock: socket.socket, factory: IProtocolFactory) -> None:
        self._reactor = reactor
        self._socket = sock
        self._factory = factory
        self._waiting = _Ready(reactor, sock, self._accept)
        self.startListening()

    def startListening(self) -> None:
        self._factory.doStart()
        self._waiting.startReading()

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, _ = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as failed:
                log.warn("a vsock connection could not be taken: {why}", why=failed.strerror)
                return
            try:
                _begin(sock, self._factory, self._reactor)
            except OSError:  # gone already
                sock.close()

    def stopListening(self) -> None:
        if self._socket.fileno() >= 0:
            self._waiting.stopReading()
            self._socket.close()
            self._factory.doStop()

    def getHost(self) -> VsockPeer:
        return VsockPeer(*self._socket.getsockname())


class _Ready(FileDescriptor):
    """Calls back whenever the reactor finds a socket ready."""

    def __init__(self, reactor: Any, sock: socket.socket, ready: Callable[[], None]) -> None:
        super().__init__(reactor)
        self._socket = sock
        self._ready = ready

    def fileno(self) -> int:
        return self._socket.fileno()

    def doRead(self) -> None:
        self._ready()

    def doWrite(self) -> None:
        self.stopWriting()
        self._ready()

    def connectionLost(self, reason: Failure) -> None:
        """The socket belongs to somebody else."""
        self.stopReading()
        self.stopWriting()
