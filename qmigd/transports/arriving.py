"""A connection that has come in, before a byte of it is read: how it begins.

Whoever is to get the socket in the end may want all of the stream, so the first bytes are
looked at and left where they are.
"""

from __future__ import annotations

import socket
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReadDescriptor
from twisted.python.failure import Failure
from zope.interface import implementer

from ..errors import PeerGone
from ..waiting import with_deadline

__all__ = ["peek"]

#: Seconds until a connection is looked at again that has brought too few bytes: the kernel
#: calls it readable all the time.
_AGAIN: Final = 0.01


async def peek(reactor: Any, sock: socket.socket, count: int, deadline: float) -> bytes:
    """Return the first ``count`` bytes that wait in a socket, which keeps them.

    :param sock: connected, and no reactor's.
    :param deadline: in seconds.
    :raises PeerGone: the connection ended before there were so many.
    :raises DeadlineError: they did not come in time.
    """
    looking = _Peek(reactor, sock, count)
    return await with_deadline(reactor, looking.done, deadline, "the beginning of a stream")


@implementer(IReadDescriptor)
class _Peek:
    """Looks into a socket whenever there is something in it."""

    def __init__(self, reactor: Any, sock: socket.socket, count: int) -> None:
        self.done: Deferred[bytes] = Deferred(lambda _: self._end())
        self._reactor = reactor
        self._sock = sock
        self._count = count
        self._again: Any = None
        reactor.addReader(self)

    def fileno(self) -> int:
        return self._sock.fileno()

    def doRead(self) -> None:
        try:
            data = self._sock.recv(self._count, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(f"the connection broke: {error.strerror}")
            return
        if len(data) == self._count:
            self._end()
            self.done.callback(data)
        elif not data:
            self._fail("the connection was closed before anything came")
        else:
            self._reactor.removeReader(self)
            self._again = self._reactor.callLater(_AGAIN, self._reactor.addReader, self)

    def connectionLost(self, reason: Failure) -> None:
        self._fail("the connection was lost before anything came")

    def logPrefix(self) -> str:
        return "arriving"

    def _end(self) -> None:
        self._reactor.removeReader(self)
        if self._again is not None and self._again.active():
            self._again.cancel()

    def _fail(self, text: str) -> None:
        self._end()
        if not self.done.called:
            self.done.errback(PeerGone(text))
