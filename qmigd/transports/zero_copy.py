"""MSG_ZEROCOPY: leave to send without copying, and what the kernel says when it has done with it.

The kernel numbers the calls on a socket that sent in this way and took something, and tells
on the socket's error queue which of them it needs the memory of no more
(Documentation/networking/msg_zerocopy.rst).
"""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

__all__ = ["MSG_ZEROCOPY", "Completion", "completions", "enable"]

# Constants of Linux that the socket module does not name: MSG_ZEROCOPY (linux/socket.h),
# SO_ZEROCOPY (asm-generic/socket.h), and from linux/errqueue.h struct sock_extended_err with
# its SO_EE_ORIGIN_ZEROCOPY and SO_EE_CODE_ZEROCOPY_COPIED.
MSG_ZEROCOPY: Final = 0x4000000
_SO_ZEROCOPY: Final = 60
_EXTENDED_ERR: Final = struct.Struct("=IBBBxII")
_ORIGIN_ZEROCOPY: Final = 5
_CODE_COPIED: Final = 1

# A completion comes as what IP_RECVERR or IPV6_RECVERR (linux/in.h, in6.h) would bring.
_ERRORS: Final = {(socket.IPPROTO_IP, 11), (socket.IPPROTO_IPV6, 25)}
#: Room for it: the struct above, and the offender's address behind it.
_ROOM: Final = 128


class Completion(NamedTuple):
    """What the kernel has done with.

    :ivar low: the number of the first call, in 32 bits.
    :ivar high: of the last one.
    :ivar copied: it has copied nevertheless.
    """

    low: int
    high: int
    copied: bool


def enable(sock: socket.socket) -> None:
    """Allow a socket to send without copying.

    :raises OSError: the kernel cannot do it with this socket.
    """
    sock.setsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY, 1)


def completions(sock: socket.socket) -> list[Completion] | None:
    """Take one message off a socket's error queue; returns ``None`` where there is none.

    It never waits, whatever the socket does.

    :raises OSError: the connection has failed.
    """
    try:
        _, ancillary, _, _ = sock.recvmsg(0, _ROOM, socket.MSG_ERRQUEUE)
    except BlockingIOError:
        return None
    found = []
    for level, kind, data in ancillary:
        if (level, kind) in _ERRORS and len(data) >= _EXTENDED_ERR.size:
            _, origin, _, code, low, high = _EXTENDED_ERR.unpack_from(data)
            if origin == _ORIGIN_ZEROCOPY:
                found.append(Completion(low, high, code == _CODE_COPIED))
    return found
