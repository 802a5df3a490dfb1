"""What all movers share: how a direction ends, and what a socket is."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from twisted.python.failure import Failure

from qmigd.channels.kernel_tls import TCP_ULP

__all__ = ["BUFFER_SIZE", "Count", "End", "Mover", "is_tcp", "said"]

#: Bytes that one read takes at the most, and so what a direction holds at the most.
BUFFER_SIZE: Final = 1 << 20


@dataclass(frozen=True)
class End:
    """How a direction ended.

    :ivar what: ``eof``: its source had no more to say; ``source`` or ``sink``: that
        socket failed; ``codec``: the bytes could not be encoded or decoded.
    :ivar text: why, for people; empty for ``eof``.
    :ivar mistake: what a codec raised that it should not have.
    """

    what: Literal["eof", "source", "sink", "codec"]
    text: str = ""
    mistake: Failure | None = None


#: Told of bytes that the sink has taken.
Count = Callable[[int], None]

#: Moves bytes from the first socket to the second until one of them ends.
Mover = Callable[[Any, Any, Count], End]


def said(error: OSError) -> str:
    """What the kernel says went wrong."""
    return error.strerror or str(error)


def is_tcp(sock: socket.socket) -> bool:
    """Whether it is TCP and nothing else: no TLS in the kernel on top of it.

    Below kTLS the queues hold records, which TCP_ZEROCOPY_RECEIVE would hand out as they
    are, encrypted.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        return not sock.getsockopt(socket.IPPROTO_TCP, TCP_ULP, 16).rstrip(b"\0")
    except OSError:
        return True
