"""What this kernel can do: every mover is tried on real sockets of this host."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import Literal

from qmigd.channels.movers.common import said
from qmigd.channels.movers.receiving import Receiving
from qmigd.transports.sockets import tcp_pair
from qmigd.transports.zero_copy import enable

__all__ = ["Direction", "obstacle"]

#: Of the guest's stream: from QEMU to the network, or from the network to QEMU.
Direction = Literal["send", "receive"]


def obstacle(mover: str, direction: Direction) -> str | None:
    """Return why this kernel cannot move bytes like that; ``None``: it can.

    What is found out is what the kernel has, not what it costs.

    :param mover: out of :data:`~qmigd.interfaces.MOVERS`.
    """
    try:
        with contextlib.ExitStack() as stack:
            peer, wire = map(stack.enter_context, tcp_pair())
            if mover == "zerocopy":
                if direction == "send":
                    enable(wire)
                else:
                    Receiving(wire).close()
            elif mover == "splice":
                qemu, guest = map(stack.enter_context, socket.socketpair())
                ends = (qemu, guest, wire, peer)
                if direction == "receive":
                    ends = (peer, wire, guest, qemu)
                _splice(stack, *ends)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "an error")
        return f"this kernel does not do it ({name}: {said(error)})"
    return None


def _splice(
    stack: contextlib.ExitStack,
    writer: socket.socket,
    source: socket.socket,
    sink: socket.socket,
    reader: socket.socket,
) -> None:
    out, into = os.pipe()
    stack.callback(os.close, out)
    stack.callback(os.close, into)
    writer.sendall(b"x")
    os.splice(source.fileno(), into, 1)
    os.splice(out, sink.fileno(), 1)
    reader.recv(1)
