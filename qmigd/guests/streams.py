"""How a QEMU gets its stream: a URI, a connected socket, or a file that it need not find itself."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from uuid import uuid4

from twisted.internet.defer import Deferred, DeferredList

from qmigd.errors import GuestError
from qmigd.guests.quirks import SEVERAL_CHANNELS, SILENT
from qmigd.guests.setting import capabilities
from qmigd.qmp.client import QMPClient, QMPRefusal

__all__ = ["give", "lend", "one_channel", "unlend"]

#: Where QEMU finds its sets of descriptors (monitor_fdset_dup_fd_add in monitor/fds.c).
_FD_SETS = "/dev/fdset/"

#: Builds of QEMU, and arguments that they were found not to know.
_UNKNOWN: set[tuple[str, str]] = set()


async def one_channel(client: QMPClient, guest: str) -> None:
    """See that the migration needs one channel only.

    QEMU 7.2 answers ``migrate-incoming`` with success all the same, and
    says on its stderr only that it will not do it.

    :raises GuestError: it needs several.
    """
    present = await capabilities(client)
    for name in SEVERAL_CHANNELS:
        if present.get(name):
            raise GuestError(
                f"guest {guest} has {name} switched on, which needs several channels,"
                " and a single one was given"
            )


async def give(
    client: QMPClient,
    command: str,
    channel: str | socket.socket,
    wishes: Mapping[str, Any] | None = None,
    *,
    check: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Run a command that takes a channel: a URI, or a connected socket, which is QEMU's then.

    :param wishes: arguments that not every QEMU knows.
    :param check: for one whose connection is there already; nothing is begun where it fails.
    """

    async def run(uri: str) -> None:
        if check is not None and uri.startswith(("fd:", "exec:")):
            await check()
        await _try(client, command, uri, wishes or {})

    if isinstance(channel, str):
        await run(channel)
        return
    name = f"qmigd-{uuid4().hex}"
    with channel:
        async with client.fd_turn:
            # What is sent next goes along: QEMU takes its commands in order.
            given = client.execute_with_fd(channel.fileno(), "getfd", fdname=name)
            going = Deferred.fromCoroutine(run(f"fd:{name}"))
            answers = await DeferredList([given, going], consumeErrors=True)
    try:
        for succeeded, failure in answers:
            if not succeeded:
                raise failure.value
    except GuestError:
        # QEMU has taken it out of its list, or has not; gone it must be.
        await client.execute("closefd", fdname=name).addErrback(lambda _: None)
        raise


async def _try(client: QMPClient, command: str, uri: str, wishes: Mapping[str, Any]) -> None:
    """Run a command, without those of ``wishes`` that this QEMU does not know.

    Trying is cheaper than reading the schema, which takes a QEMU some 20 ms; and what
    one build does not know is remembered.
    """
    build = str(client.greeting["version"])
    known = {name: wish for name, wish in wishes.items() if (build, name) not in _UNKNOWN}
    try:
        # For this command, and all that follow on this connection.
        client.deadline = max(client.deadline, SILENT.get(uri.partition(":")[0], 0))
        await client.execute(command, uri=uri, **known)
    except QMPRefusal as refusal:
        refused = {(build, name) for name in known if name in refusal.desc}
        if not refused:
            raise
        _UNKNOWN.update(refused)
        await _try(client, command, uri, known)


async def lend(client: QMPClient, *descriptors: int) -> str:
    """Put descriptors of one file into a set of QEMU's; returns the name for ``file:``.

    Each of them has to be opened in another way: QEMU takes the one that fits.
    """
    first, *others = descriptors
    async with client.fd_turn:
        number = (await client.execute_with_fd(first, "add-fd"))["fdset-id"]
        for other in others:
            await client.execute_with_fd(other, "add-fd", **{"fdset-id": number})
    return f"{_FD_SETS}{number}"


async def unlend(client: QMPClient, name: str) -> None:
    """Take such a set away again; what QEMU has opened stays open."""
    await client.execute("remove-fd", **{"fdset-id": int(name.removeprefix(_FD_SETS))})
