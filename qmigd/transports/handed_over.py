"""What a descriptor that somebody hands over has to be, so that a channel can go over it."""

from __future__ import annotations

import errno
import ipaddress
import os
import select
import socket
import stat

from qmigd.errors import ArgumentError
from qmigd.transports.vsock import LOCAL_CID

__all__ = ["checked", "is_local"]


def checked(descriptor: int) -> socket.socket:
    """Return the socket that a descriptor is, if a channel can go over it.

    :raises ArgumentError: it cannot; the text says what it is.  The descriptor stays open.
    """
    if wrong := _wrong(descriptor):
        raise ArgumentError(
            f"A channel needs a stream socket that is connected and open in both directions, "
            f"and this is {wrong}."
        )
    return socket.socket(fileno=descriptor)


def _wrong(descriptor: int) -> str | None:
    """Say what keeps a descriptor from being a channel; ``None``: nothing."""
    if kind := _other_than_socket(descriptor):
        return kind
    sock = socket.socket(fileno=descriptor)
    try:
        return _wrong_socket(sock)
    except OSError as error:
        return f"a socket that cannot be used ({os.strerror(error.errno or 0)})"
    finally:
        sock.detach()


def _other_than_socket(descriptor: int) -> str | None:
    kinds = (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    )
    mode = os.fstat(descriptor).st_mode
    for fits, kind in kinds:
        if fits(mode):
            return kind
    try:
        # A descriptor that was opened with O_PATH is none, whatever it leads to.
        with socket.socket(fileno=os.dup(descriptor)):
            return None
    except OSError:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        return f"no socket ({name})"


def _wrong_socket(sock: socket.socket) -> str | None:
    kind = sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
    if kind != socket.SOCK_STREAM:
        names = {int(socket.SOCK_DGRAM): "datagram", int(socket.SOCK_SEQPACKET): "packet"}
        return f"a {names.get(kind, 'raw')} socket"
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "a listening socket"
    try:
        sock.getpeername()
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return "a socket that is not connected"
        raise
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    if any(found & (select.POLLRDHUP | select.POLLHUP) for _, found in poll.poll(0)):
        return "a socket from which nothing can come any more: the other end has closed it"
    try:
        # Nothing is sent; but who may not send is told.
        sock.send(b"", socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except BrokenPipeError:
        return "a socket on which nothing can be sent any more"
    return None


def is_local(sock: socket.socket) -> bool:
    """Whether what is sent on it does not leave this host, as far as the kernel knows."""
    if sock.family == socket.AF_UNIX:
        return True
    peer = sock.getpeername()
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        address = ipaddress.ip_address(peer[0].partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback
    return sock.family == socket.AF_VSOCK and peer[0] == LOCAL_CID
