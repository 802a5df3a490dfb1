"""A guest in a QEMU of its own, driven over QMP: the ``qemu`` backend.

Nothing of a QEMU is taken from its version where it can be asked.  What it is
told is read back, because a setting that was ignored on one side makes a
migration hang, or corrupts RAM in silence.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from qmigd.api import is_qmigd
from qmigd.backend import Examined, Tunable
from qmigd.errors import GuestBusy, GuestError, GuestGone
from qmigd.guests import builds, describe, process, schema, setting, streams
from qmigd.guests.quirks import POSTCOPY_WITHOUT_PAGES
from qmigd.interfaces import GuestFacts, Settings
from qmigd.qmp.client import COMMAND_DEADLINE, QMPClient, QMPDeadline
from qmigd.qmp.connecting import connect
from qmigd.waiting import together

__all__ = ["GONE", "Known", "QemuGuest"]

#: The event that :meth:`QemuGuest.watch` has beside QEMU's own.
GONE = "QMIGD_GONE"
#: Seconds between two looks whether a guest that is to run can: there are no events of that.
STATE_POLL = 0.003

#: The argument of ``migrate-incoming`` with which a failed load does not end the
#: process (QEMU 9.1 and newer), so that it can tell why it failed.
_STAY = "exit-on-error"

Watcher = Callable[[str, dict[str, Any]], None]

#: A process: its number, and when it was started.
_Identity = tuple[int, int]

_log = Logger()


class Known:
    """What was found out about a guest, for as long as the same process has it."""

    def __init__(self) -> None:
        self._kept: tuple[_Identity, describe.Lasting] | None = None

    def keep(self, identity: _Identity | None, lasting: describe.Lasting) -> None:
        """Keep it for the next look."""
        self._kept = None if identity is None else (identity, lasting)

    def of(self, identity: _Identity | None) -> describe.Lasting | None:
        """What is known of a process; ``None``: nothing."""
        return self._kept[1] if self._kept is not None and self._kept[0] == identity else None


class QemuGuest:
    """One QEMU; provides :class:`qmigd.backend.Guest`."""

    backend = "qemu"

    def __init__(
        self,
        reactor: Any,
        name: str,
        qmp: str,
        *,
        deadline: float = COMMAND_DEADLINE,
        known: Known | None = None,
        backend: str = backend,
    ) -> None:
        """:param name: the guest's name in qmigd.
        :param qmp: where its QMP is, ``unix:PATH`` or ``tcp:HOST:PORT``.
        :param deadline: seconds that each command has.
        :param known: what was found out about it before.
        :param backend: what kind of guest it is, where it only behaves like a QEMU.
        """
        self._known = known or Known()
        self.name = name
        self.backend = backend
        self.qmp = qmp
        self._reactor = reactor
        self._deadline = deadline
        self._client: QMPClient | None = None
        self._attaching = False
        self._watchers: list[Watcher] = []
        self._starting: Deferred[None] | None = None
        self.told_to_run = False

    # -- taking hold

    async def attach(self) -> None:
        """Connect to its QMP.

        :raises GuestBusy: somebody else is connected to it, or this object is.
        :raises GuestGone: nobody is there.
        :raises GuestError: it is somebody who is no QEMU.
        """
        if self._client is not None or self._attaching:
            raise GuestBusy(f"guest {self.name} is already in the hands of another migration")
        self._attaching = True
        try:
            client = await connect(self._reactor, self.qmp, deadline=self._deadline)
        finally:
            self._attaching = False
        if is_qmigd(client.greeting):
            client.close()
            raise GuestError(
                f"{self.qmp} is the management socket of a qmigd, and no guest's: name the one "
                "that the guest was started with (-qmp)"
            )
        self._client = client
        self.told_to_run = False
        client.subscribe(lambda name, data, time: self._tell(name, data))
        client.when_lost(lambda reason: self._on_lost(client, reason))

    @property
    def attached(self) -> bool:
        """Whether there is a connection."""
        return self._client is not None

    def detach(self) -> None:
        """Close the connection; the guest goes on.  Harmless when not attached."""
        self._start_later(None)
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def watch(self, callback: Watcher) -> Callable[[], None]:
        """Call back with name and data of each event; returns what ends that.

        When the guest is lost while attached, there is :data:`GONE` with ``reason``.
        """
        self._watchers.append(callback)
        return lambda: self._watchers.remove(callback)

    def _tell(self, name: str, data: dict[str, Any]) -> None:
        for watcher in list(self._watchers):
            try:
                watcher(name, data)
            except Exception:
                _log.failure("a watcher of guest {name} failed", name=self.name)

    def _on_lost(self, client: QMPClient, reason: GuestGone) -> None:
        if self._client is client:
            self._client = None
            self._tell(GONE, {"reason": reason.text})

    @property
    def client(self) -> QMPClient:
        """The connection.

        :raises GuestGone: there is none (any more).
        """
        if self._client is None:
            raise GuestGone(
                f"qmigd is not connected to guest {self.name}; its process may have ended"
            )
        return self._client

    # -- what it is

    async def examine(self) -> Examined:
        client = self.client
        pid = process.peer(client.transport)
        began = process.started(pid) if pid else None
        identity = (pid, began) if pid and began else None
        known = self._known.of(identity)
        # All at once: QEMU answers in order, and nobody waits in between.
        asked: list[Deferred[Any]] = [
            Deferred.fromCoroutine(describe.describe(client, known)),
            Deferred.fromCoroutine(builds.types(client)),
            client.execute("query-migrate-parameters"),
            client.execute("query-status"),
        ]
        thread = known.thread if known is not None else None
        seen = process.look(pid, thread) if pid and thread else None
        described, types, parameters, status = await together(asked)
        version = client.greeting["version"]["qemu"]
        body, lasting = described.body, described.lasting
        if pid and lasting.thread and lasting.thread != thread:
            seen = process.look(pid, lasting.thread)
        ram = lasting.ram
        if seen is not None:
            self._known.keep(identity, lasting)
            if lasting.files:
                kinds = process.filesystems(seen.pid, lasting.files)
                ram = tuple(replace(block, filesystem=kinds.get(block.name)) for block in ram)
        facts = GuestFacts(
            name=self.name,
            backend=self.backend,
            version=(version["major"], version["minor"], version["micro"]),
            machine=body.get("machine", ""),
            capabilities=described.capabilities,
            parameters=parameters,
            memory=body.get("memory"),
            ram=ram,
            blockers=described.blockers,
            types=types,
            process=seen,
        )
        described_as = {"name": self.name, **body}
        return Examined(facts, status["status"], described_as, described.migration)

    async def tunables(self) -> list[Tunable]:
        client = self.client
        known = await schema.of(client)
        return known.tunables(await client.execute("query-migrate-parameters"))

    async def checked(self, tunables: Mapping[str, Any]) -> dict[str, Any]:
        """Return a user's values in the types that QEMU declares.

        :raises ArgumentError: a name is unknown or a value does not fit.
        """
        if not tunables:
            return {}
        known = (await schema.of(self.client)).parameters
        return {
            name: schema.coerce(schema.find(known, name), value) for name, value in tunables.items()
        }

    async def apply(
        self, settings: Settings, facts: GuestFacts | None = None
    ) -> tuple[Settings, Settings]:
        """Set, and read back that it is set; returns what was before, and what is now.

        :raises GuestError: QEMU refused or ignored one of them; all are as before.
        """
        return await setting.apply(self.client, self.name, settings, facts)

    async def readback(self, settings: Settings) -> Settings:
        """Return the present values of the names in ``settings``, ``None`` for no value.

        :raises GuestError: QEMU does not know one of the capabilities.
        """
        return await setting.readback(self.client, self.name, settings)

    # -- the move

    async def incoming(self, channel: str | socket.socket) -> None:
        """Have it wait for the stream on a URI, or take it from a connected socket.

        A socket is the guest's from here on, whatever comes of it.  From QEMU
        9.1 on the process stays when the migration fails, so that
        ``query-migrate`` can tell why (``error-desc``); it is of no use then but
        for :meth:`quit`.  An older QEMU ends itself.

        :raises GuestError: QEMU refused.
        """
        client = self.client
        one = partial(streams.one_channel, client, self.name)
        await streams.give(client, "migrate-incoming", channel, {_STAY: False}, check=one)

    async def migrate(self, channel: str | socket.socket) -> None:
        """Start the outgoing migration to a URI, or into a connected socket.

        A socket is the guest's from here on, whatever comes of it.

        :raises GuestError: QEMU refused.
        """
        await streams.give(self.client, "migrate", channel)

    async def lend(self, *descriptors: int) -> str:
        return await streams.lend(self.client, *descriptors)

    async def unlend(self, name: str) -> None:
        await streams.unlend(self.client, name)

    async def query_status(self) -> str:
        status: str = (await self.client.execute("query-status"))["status"]
        return status

    async def query_migrate(self) -> dict[str, Any]:
        return {"status": "none", **await self.client.execute("query-migrate")}

    async def holds_on(self) -> bool:
        instances = await self.client.execute("query-yank")
        return any(instance["type"] == "migration" for instance in instances)

    @property
    def postcopy_without_pages(self) -> bool:
        version = self.client.greeting["version"]["qemu"]
        return (version["major"], version["minor"], version["micro"]) in POSTCOPY_WITHOUT_PAGES

    async def start_postcopy(self) -> None:
        await self.client.execute("migrate-start-postcopy")

    async def cancel(self) -> None:
        await self.client.execute("migrate_cancel")

    async def stop(self) -> None:
        """Stop it; one that waits for the stream will be paused once it is loaded."""
        self._start_later(None)
        await self.client.execute("stop")

    async def cont(self) -> None:
        """Let it run; one that waits for the stream runs as soon as it is loaded.

        QEMU's own ``cont`` does not serve there: up to 9.2 it opens the images
        for writing at once, while the source may still write to them.  It fails
        where the source holds their locks, and spoils them where there are none.

        A source refuses it from when it stops the guest until it is done with its migration,
        which is some time after that has become ``completed``, ``failed`` or ``cancelled``.

        :raises DeadlineError: it is not done with it in time.
        """
        client = self.client
        if await self._until_finished(client) == "inmigrate":
            self._start_later(Deferred.fromCoroutine(self._start_when_loaded(client)))
        else:
            await self._run(client)

    async def _until_finished(self, client: QMPClient) -> str:
        """Wait until a source is done with its migration; returns the run state then."""
        end = self._reactor.seconds() + self._deadline
        while (state := (await client.execute("query-status"))["status"]) == "finish-migrate":
            if self._reactor.seconds() >= end:
                raise QMPDeadline(
                    f"the process of guest {self.name} is still completing its migration after "
                    f"{self._deadline:g} s, and does not let the guest run before it is done"
                )
            await deferLater(self._reactor, STATE_POLL)
        return str(state)

    def _start_later(self, starting: Deferred[None] | None) -> None:
        """Forget an earlier ``cont`` for when it is loaded, if there is one."""
        earlier, self._starting = self._starting, starting
        if earlier is not None:
            earlier.addErrback(lambda failure: failure.trap(CancelledError) and None)
            earlier.cancel()

    async def _start_when_loaded(self, client: QMPClient) -> None:
        try:
            while (await client.execute("query-status"))["status"] == "inmigrate":
                await deferLater(self._reactor, STATE_POLL)
            await self._run(client)
        except GuestError as error:
            _log.warn(
                "guest {name} was to run once it is loaded: {error}",
                name=self.name,
                error=error.text,
            )

    async def _run(self, client: QMPClient) -> None:
        self.told_to_run = True
        await client.execute("cont")

    async def quit(self) -> None:
        """End the process; returns once its QMP connection is closed.

        :raises QMPDeadline: it did not end in time.
        """
        client = self.client
        gone: Deferred[None] = Deferred()
        client.when_lost(lambda reason: None if gone.called else gone.callback(None))
        try:
            await client.execute("quit")
        except GuestGone:
            return  # it did not take the time to answer
        timer = self._reactor.callLater(
            self._deadline,
            gone.errback,
            QMPDeadline(
                f"the process of guest {self.name} did not end within {self._deadline:g} s"
            ),
        )
        try:
            await gone
        finally:
            if timer.active():
                timer.cancel()
