"""Connections that a stream goes over, for the threads that write and read it.

They are plain blocking sockets: each has a thread of its own at either end.  Whoever ends a
migration shuts them down, and that ends whatever waits in them.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from qmigd.errors import ArgumentError
from qmigd.guests.memory.vector import IOV_MAX, Vector, send
from qmigd.transports.mptcp import IPPROTO_MPTCP
from qmigd.transports.uri import TcpAddress, UnixAddress, VsockAddress, parse_uri

__all__ = ["Channel", "Lost", "Pace", "Rate", "by_rdma", "check", "connect", "listen", "strip"]

#: What a URI begins with where pages go by RDMA and all else over TCP.
_RDMA = "rdma:"

#: Bytes of a socket's buffers, where the kernel does not grow them by itself.
_BUFFER = 1 << 20
_INET = (socket.AF_INET, socket.AF_INET6)
#: Bytes at once that show that much comes, how many are waited for then, and the seconds after
#: which they are not.
_BULK = 32 << 10
_MUCH = 1 << 20
_LULL = 0.001
#: Where struct tcp_info (linux/tcp.h) has the shortest round trip, in µs; up to how many of them a
#: path is short; and the bytes that may be on it then: enough for 8 Gbit/s, and 2 ms of 1 Gbit/s.
_MIN_RTT = 148
_SHORT = 250
_QUEUED = 128 << 10  # which the kernel doubles
#: TCP_RTO_MIN_US (linux/tcp.h, Linux 6.15), and the µs after which a lost page is sent again at the
#: earliest; else it is 200 ms.
_TCP_RTO_MIN_US = 45
_AGAIN = 5000
#: Seconds that a connection may take.
_CONNECT = 10.0
#: Seconds over which bandwidth is evened out (QEMU: BUFFER_DELAY in migration/migration.c).
_SLICE = 0.1


class Lost(Exception):
    """The connection ended before the stream did; the text says how."""


class Pace:
    """Keeps all channels of a migration together below a bandwidth.

    :ivar limit: returns bytes a second; 0 for no limit.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self.limit = limit
        self._changed = threading.Condition()
        self._open = False
        self._begun = 0.0
        self._spent = 0

    def changed(self) -> None:
        """The limit is another one, or something else is to be looked at."""
        with self._changed:
            self._changed.notify_all()

    def release(self) -> None:
        """Hold nobody any more."""
        with self._changed:
            self._open = True
            self._changed.notify_all()

    def spend(self, count: int) -> None:
        """Note down that bytes are sent."""
        with self._changed:
            self._spent += count

    def wait(self, interrupted: Callable[[], bool]) -> None:
        """Return when there is something left to be sent in this slice of time.

        :param interrupted: looked at whenever something has changed; ends the wait.
        """
        with self._changed:
            while not self._open and not interrupted():
                limit, now = self.limit(), time.monotonic()
                if now - self._begun >= _SLICE:
                    # What was too much in the last slice is taken from this one.
                    over = self._spent - limit * _SLICE if limit and self._begun else 0
                    passed = min(1.0, now - self._begun) - _SLICE
                    self._spent = max(0, int(over - limit * passed))
                    self._begun = now
                if not limit or self._spent < limit * _SLICE:
                    return
                self._changed.wait(max(0.001, self._begun + _SLICE - now))


class Rate:
    """Bytes a second, over what was sent without being held back."""

    def __init__(self) -> None:
        self.value = 0.0

    def sent(self, count: int, seconds: float) -> None:
        if seconds > 0.001 and count > 1 << 16:
            rate = count / seconds
            self.value = rate if not self.value else 0.5 * self.value + 0.5 * rate


class Channel:
    """One connection.

    :ivar sent: bytes that were given to the kernel.
    :ivar received: bytes that came out of it.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        if sock.family in _INET:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        elif sock.family == socket.AF_UNIX:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        self.sock = sock
        self.sent = 0
        self.received = 0
        self.closed = False
        # The other kinds of sockets do not wait for more than one byte, or not in poll().
        self._patient = sock.family in _INET and sock.proto in (0, socket.IPPROTO_TCP)
        self._least = 1

    def send(self, buffers: Sequence[Any]) -> int:
        """Send them all, and return how many bytes they were.

        :raises Lost: the connection broke.
        """
        before = self.sent
        for at in range(0, len(buffers), IOV_MAX):
            self._send(buffers[at : at + IOV_MAX])
        return self.sent - before

    def send_vector(self, vector: Vector) -> int:
        """Send buffers that are given as an array, and return how many bytes they were.

        :raises Lost: the connection broke.
        """
        try:
            count = send(self.sock, vector)
        except OSError as error:
            raise Lost(error.strerror or str(error)) from None
        self.sent += count
        return count

    def _send(self, buffers: Sequence[Any]) -> None:
        wanted = sum(map(_size, buffers))
        try:
            count = self.sock.sendmsg(buffers)
            self.sent += count
            if count == wanted:
                return
            for buffer in buffers:
                size = _size(buffer)
                if count >= size:
                    count -= size
                    continue
                rest = memoryview(buffer).cast("B")[count:]
                self.sock.sendall(rest)
                self.sent += len(rest)
                count = 0
        except OSError as error:
            raise Lost(error.strerror or str(error)) from None

    def receive_some(self, into: memoryview) -> int:
        """Receive what there is, and return how many bytes; 0 at the end.

        :raises Lost: the connection broke.
        """
        self._wait_for(1)
        return self._receive(into)

    def _receive(self, into: memoryview) -> int:
        try:
            count = self.sock.recv_into(into)
        except OSError as error:
            raise Lost(error.strerror or str(error)) from None
        self.received += count
        return count

    def receive_much(self, into: memoryview) -> int:
        """The same, in larger pieces for as long as much comes.

        Each piece wakes a thread up and is looked at by Python: that takes more time than the
        pages in it where the kernel hands over each segment.
        """
        if self._least > 1 and not select.select([self.sock], [], [], _LULL)[0]:
            self._wait_for(1)
        count = self._receive(into)
        if self._patient and count >= _BULK:
            self._wait_for(_MUCH)
        return count

    def _wait_for(self, least: int) -> None:
        """Have the kernel wake us up only when so many bytes are there, or the end."""
        if least != self._least:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
            self._least = least

    def receive(self, *into: memoryview) -> bool:
        """Fill buffers; returns false if the connection ended before the last one's first byte.

        :raises Lost: the connection broke, or ended elsewhere.
        """
        left = list(into)
        try:
            while left:
                # In one call, without the interpreter's lock, however many segments it takes.
                count = self.sock.recvmsg_into(left, 0, socket.MSG_WAITALL)[0]
                self.received += count
                if not count:
                    if len(left) == 1 and len(left[0]) == len(into[-1]):
                        return False
                    raise Lost("the other side closed the connection")
                strip(left, count)
        except OSError as error:
            raise Lost(error.strerror or str(error)) from None
        return True

    def fill(self, left: list[memoryview]) -> int:
        """Fill buffers with what there is, take out those that are full, and return how many bytes
        that was.

        :raises Lost: the connection broke, or ended.
        """
        try:
            count = self.sock.recvmsg_into(left, 0, socket.MSG_DONTWAIT)[0]
        except BlockingIOError:
            return 0
        except OSError as error:
            raise Lost(error.strerror or str(error)) from None
        if not count:
            raise Lost("it ended before the stream did")
        self.received += count
        strip(left, count)
        return count

    def expect(self, count: int) -> None:
        """Have poll() say that something has come only when it is so many bytes, or the end."""
        if self._patient:
            self._wait_for(count)

    def take(self, count: int) -> bytes:
        """Return so many bytes; none at the end.

        :raises Lost: the connection broke, or ended within.
        """
        data = bytearray(count)
        return bytes(data) if not count or self.receive(memoryview(data)) else b""

    def keep_short(self) -> None:
        """Keep little of what is sent in the network's queues: there other channels' pages wait,
        and what comes out of them is no longer in the CPU's cache.

        Where the path is short; on a long one that would take bandwidth away.
        """
        with contextlib.suppress(OSError, struct.error):
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            (round_trip,) = struct.unpack_from("=I", info, _MIN_RTT)
            if round_trip < _SHORT:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUED)

    def hurry(self) -> None:
        """Send again soon what was lost: somebody waits for it."""
        with contextlib.suppress(OSError):
            self.sock.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MIN_US, _AGAIN)

    def shut(self) -> None:
        """End whatever waits in it, at either end."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.closed = True
        self.shut()
        self.sock.close()


def strip(left: list[memoryview], count: int) -> None:
    """Take so many bytes off the beginning of a list of buffers."""
    while left and count >= len(left[0]):
        count -= len(left.pop(0))
    if count:
        left[0] = left[0][count:]


def _size(buffer: Any) -> int:
    return buffer.nbytes if hasattr(buffer, "nbytes") else len(buffer)


def by_rdma(end: str | socket.socket) -> bool:
    """Whether pages go to or come from there by RDMA."""
    return isinstance(end, str) and end.startswith(_RDMA)


def _parse(uri: str) -> Any:
    return parse_uri(f"tcp:{uri.removeprefix(_RDMA)}" if by_rdma(uri) else uri)


def check(uri: str) -> None:
    """See that a stream can go to or come from there.

    :raises ArgumentError: it cannot; the text says why.
    """
    address = _parse(uri)
    if not isinstance(address, TcpAddress | UnixAddress | VsockAddress):
        raise ArgumentError(
            f"A memory guest cannot migrate over {address}; it can over tcp:, rdma:, unix:, vsock:"
            " and fd:"
        )


def connect(uri: str) -> socket.socket:
    """Connect to ``tcp:``, ``rdma:``, ``unix:`` or ``vsock:``.

    :raises ArgumentError: the URI is nothing that one can connect to.
    :raises OSError: nobody takes the connection.
    """
    address: Any
    match _parse(uri):
        case TcpAddress(host, port, mptcp):
            return _connect_tcp(host, port, mptcp)
        case UnixAddress(path=path):
            sock, address = socket.socket(socket.AF_UNIX), path
        case VsockAddress(cid, port):
            sock, address = socket.socket(socket.AF_VSOCK), (cid, port)
        case other:
            raise ArgumentError(f"a memory guest cannot migrate to {other}")
    try:
        sock.settimeout(_CONNECT)
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def _connect_tcp(host: str, port: int, mptcp: bool) -> socket.socket:
    failure: OSError | None = None
    for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = _tcp(family, kind, mptcp)
        try:
            sock.settimeout(_CONNECT)
            sock.connect(address)
        except OSError as error:
            failure = error
            sock.close()
        else:
            return sock
    raise failure or OSError(f"{host} has no address")


def _tcp(family: int, kind: int, mptcp: bool) -> socket.socket:
    if mptcp:
        with contextlib.suppress(OSError):
            return socket.socket(family, kind, IPPROTO_MPTCP)
    return socket.socket(family, kind)


def listen(uri: str) -> socket.socket:
    """Listen on ``tcp:``, ``rdma:``, ``unix:`` or ``vsock:``.

    :raises ArgumentError: the URI is nothing that one can listen on.
    :raises OSError: somebody does already.
    """
    address: Any
    match _parse(uri):
        case TcpAddress(host, port, mptcp):
            family, kind, _, _, address = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            sock = _tcp(family, kind, mptcp)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        case UnixAddress(path=path):
            sock, address = socket.socket(socket.AF_UNIX), path
            with contextlib.suppress(OSError):
                os.unlink(path)
        case VsockAddress(cid, port):
            sock, address = socket.socket(socket.AF_VSOCK), (cid, port)
        case other:
            raise ArgumentError(f"a memory guest cannot come in from {other}")
    try:
        sock.bind(address)
        sock.listen(256)
    except OSError:
        sock.close()
        raise
    return sock
