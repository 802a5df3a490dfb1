"""How a connection to a QEMU's QMP socket is made, and why it cannot be."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint
from twisted.internet.error import (
    ConnectError,
    ConnectionRefusedError,
    NoProtocol,
    TimeoutError,
)
from twisted.internet.interfaces import (
    IStreamClientEndpoint,
)
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from twisted.python.failure import Failure

from qmigd.errors import (
    ArgumentError,
    GuestBusy,
    GuestGone,
)
from qmigd.qmp.client import COMMAND_DEADLINE, TAKEN, QMPClient

__all__ = ["GREETING_DEADLINE", "QUEUE_POLL", "connect"]

#: Seconds that a QEMU has for its greeting.  A free one greets within a
#: millisecond, from a thread of its own, also where its main loop hangs.
GREETING_DEADLINE = 3.0

#: Seconds between two tries to connect while too many clients wait already.
QUEUE_POLL = 0.01


def _endpoint(reactor: Any, address: str, deadline: float) -> IStreamClientEndpoint:
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest:
        make: Callable[..., IStreamClientEndpoint] = UNIXClientEndpoint
        return make(reactor, rest, timeout=deadline)
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and host and port.isdecimal() and int(port) <= 65535:
        return HostnameEndpoint(reactor, host.strip("[]"), int(port), timeout=deadline)
    raise ArgumentError(f"{address} is no QMP address: it has to be unix:PATH or tcp:HOST:PORT")


def _refusal(address: str, error: Exception) -> GuestGone:
    """Return the sentence for a connection that could not be made."""
    path = address.partition(":")[2]
    if address.startswith("unix:") and os.path.exists(path) and not _is_socket(path):
        why = f"{path} is no socket"
    elif isinstance(error, ConnectionRefusedError):
        why = "nobody listens there; the guest has ended, or was started without -qmp on it"
    elif address.startswith("unix:") and "No such file" in str(error):
        why = f"there is no socket {path}; is the guest running, and started with -qmp on it?"
    elif isinstance(error, TimeoutError):
        why = "no answer came in time"
    else:
        why = str(getattr(error, "osError", None) or error)
    return GuestGone(f"cannot reach a guest on {address}: {why}")


def _is_socket(path: str) -> bool:
    with suppress(OSError):
        return stat.S_ISSOCK(os.stat(path).st_mode)
    return True  # whatever it is, it was there a moment ago


def _queue_is_full(error: Exception) -> bool:
    """Return whether the kernel has no room for another client to wait in.

    A QEMU's queue has one place.  A unix socket's connect() then gives EAGAIN,
    which Twisted takes for a connection under way, and then for one that closed.
    """
    cause = error.args[0] if error.args else None
    return type(error) is ConnectError and isinstance(cause, Failure)


async def _open(reactor: Any, address: str, deadline: float, seconds: float) -> QMPClient:
    """Return a connection, not greeted yet; a full queue is waited for ``seconds``."""
    endpoint = _endpoint(reactor, address, seconds)
    factory = Factory.forProtocol(lambda: QMPClient(reactor, address, deadline=deadline))
    factory.noisy = False
    end = reactor.seconds() + seconds
    while True:
        try:
            client = await endpoint.connect(factory)
        except (ConnectError, NoProtocol, OSError) as error:
            if not _queue_is_full(error):
                raise _refusal(address, error) from None
            if reactor.seconds() >= end:
                raise GuestBusy(TAKEN.format(address)) from None
            await deferLater(reactor, QUEUE_POLL)
        else:
            assert isinstance(client, QMPClient)  # what the factory makes
            return client


async def _connect(
    reactor: Any, address: str, deadline: float, greeting_deadline: float
) -> QMPClient:
    client = await _open(reactor, address, deadline, greeting_deadline)
    try:
        await client.handshake(greeting_deadline)
    except BaseException:  # also where the caller cancels
        client.close()
        raise
    return client


def connect(
    reactor: Any,
    address: str,
    *,
    deadline: float = COMMAND_DEADLINE,
    greeting_deadline: float = GREETING_DEADLINE,
) -> Deferred[QMPClient]:
    """Connect to a QEMU and enter command mode, out-of-band commands included.

    :param reactor: provides ``IReactorTime``, and ``IReactorUNIX`` or what
        ``HostnameEndpoint`` needs.
    :param address: ``unix:PATH`` or ``tcp:HOST:PORT``.
    :param deadline: seconds that each command has.
    :param greeting_deadline: seconds that the QEMU has for its greeting.
    :raises ArgumentError: the address is none.
    :raises GuestBusy: somebody else is connected to that QMP socket.
    :raises GuestGone: nobody is there.
    """
    return Deferred.fromCoroutine(_connect(reactor, address, deadline, greeting_deadline))
