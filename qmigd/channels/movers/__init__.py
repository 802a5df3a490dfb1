"""Movers: the ways to get a direction's bytes from one socket to the other.

===========  ==========================================================================
``copy``     read into a buffer, write from it: two copies, and the only way with a codec
``splice``   socket, pipe, socket: the kernel passes pages on and copies nothing, but pays
             for each page
``zerocopy`` towards the network MSG_ZEROCOPY: the kernel sends out of the buffer itself;
             from the network TCP_ZEROCOPY_RECEIVE: the kernel maps what has come
===========  ==========================================================================

Which is the cheapest depends on the kernel and on the CPU, so that it is measured
(:mod:`qmigd.channels.calibration`).  What comes out of the other socket is the same, and
so are the rules: a mover blocks where there is nothing to read and where nobody takes
what it writes, passes on at once whatever has come, holds no more than about a buffer,
and is woken by shutting the sockets.  It ends by returning how its direction ended.

A socket that a mover cannot serve is served by ``copy``, from the beginning or, where it
turns out later that the kernel copies after all, from there on.
"""

from __future__ import annotations

import socket

from qmigd.channels.movers.common import BUFFER_SIZE, Count, End, Mover, is_tcp
from qmigd.channels.movers.copying import copy
from qmigd.channels.movers.receiving import receive
from qmigd.channels.movers.sending import send
from qmigd.channels.movers.splicing import splice
from qmigd.channels.tls import PeerSocket
from qmigd.interfaces import MOVERS

__all__ = ["BUFFER_SIZE", "Count", "End", "Mover", "copy", "mover_for"]


def mover_for(name: str, source: PeerSocket, sink: PeerSocket) -> Mover:
    """Return the mover of that name for a direction between these two sockets.

    :param name: out of :data:`~qmigd.interfaces.MOVERS`.
    :raises ValueError: there is none of that name.
    """
    if name not in MOVERS:
        raise ValueError(f"there is no mover {name!r}; there are {', '.join(MOVERS)}")
    if not (isinstance(source, socket.socket) and isinstance(sink, socket.socket)):
        # TLS is done here, between the socket and us.
        return copy
    if name == "splice":
        return splice
    if name == "zerocopy" and is_tcp(sink):
        return send
    if name == "zerocopy" and is_tcp(source):
        return receive
    return copy
