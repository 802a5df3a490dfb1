"""A guest in a QEMU of its own, driven over QMP: the ``qemu`` backend.

Nothing of a QEMU is taken from its version where it can be asked.  What it is
told is read back, because a setting that was ignored on one side makes a
migration hang, or corrupts RAM in silence.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any
from uuid import uuid4

from twisted.internet.defer import CancelledError, Deferred, DeferredList, maybeDeferred
from twisted.internet.task import deferLater
from twisted.logger import Logger

from qmigd.api import greets_as
from qmigd.backend import Examined, Tunable
from qmigd.errors import DeadlineError, GuestBusy, GuestError, GuestGone
from qmigd.guests import builds, describe, process, schema
from qmigd.guests.quirks import CONNECTED_FIRST, POSTCOPY_WITHOUT_PAGES, SEVERAL_CHANNELS
from qmigd.interfaces import GuestFacts, Settings
from qmigd.qmp.client import COMMAND_DEADLINE, QMPClient, QMPDeadline, QMPRefusal
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

#: Where QEMU finds its sets of descriptors (monitor_fdset_dup_fd_add in monitor/fds.c).
_FD_SETS = "/dev/fdset/"

#: Builds of QEMU, and arguments that they were found not to know.
_UNKNOWN: set[tuple[str, str]] = set()

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
        self._names = (f"qmigd-{uuid4().hex}-{number}" for number in count())

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
        if greets_as(client.greeting) is None:
            client.close()
            raise GuestError(
                f"{self.qmp} is the management socket of a qmigd, and no guest's: name the one "
                "that the guest's QEMU was started with (-qmp)"
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
            raise GuestGone(f"qmigd is not connected to guest {self.name}; its QEMU may have ended")
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

    # -- settings

    async def apply(
        self, settings: Settings, facts: GuestFacts | None = None
    ) -> tuple[Settings, Settings]:
        """Set, and read back that it is set; returns what was before, and what is now.

        A parameter that had no value before is ``None`` in what is returned, and
        giving ``None`` unsets one where QEMU can do that (``tls-creds``); where it
        cannot (``block-bitmap-mapping``), ``None`` is passed over.

        :param facts: say what was before, and what is so already is not set again; without
            them QEMU is asked.
        :raises GuestError: QEMU refused or ignored one of them; all are as before.
        """
        wanted = settings if facts is None else _lacking(settings, facts)
        parameters = await self._settable(wanted.parameters)
        # All at once: QEMU answers in order, so what it had comes before what it is told.
        (known, before), *answers = await DeferredList(
            [
                Deferred.fromCoroutine(self.readback(settings))
                if facts is None
                else maybeDeferred(self._pick, settings, facts.capabilities, facts.parameters),
                *self._set(Settings(wanted.capabilities, parameters, wanted.objects)),
                Deferred.fromCoroutine(self.readback(settings)),
            ],
            consumeErrors=True,
        )
        try:
            for succeeded, answer in ((known, before), *answers):
                if not succeeded:
                    raise answer.value
            self._compare(settings, answers[-1][1])
        except (GuestGone, DeadlineError):
            raise
        except GuestError:
            if known:
                earlier = await self._settable(before.parameters)
                await together(self._set(Settings(before.capabilities, earlier)))
                # Whether there was one: the one that was refused there never was.
                await DeferredList(self._set(Settings(objects=before.objects)), consumeErrors=True)
            raise
        return before, answers[-1][1]

    def _compare(self, wanted: Settings, got: Settings) -> None:
        present = {**got.capabilities, **got.parameters}
        for name, value in {**wanted.capabilities, **wanted.parameters}.items():
            if value is not None and present[name] != value:
                raise GuestError(
                    f"the QEMU of guest {self.name} was to have {name} at {value!r}, and has it"
                    f" at {present[name]!r}"
                )

    async def readback(self, settings: Settings) -> Settings:
        """Return the present values of the names in ``settings``, ``None`` for no value.

        :raises GuestError: QEMU does not know one of the capabilities.
        """
        asked: list[Deferred[Any]] = []
        if settings.capabilities:
            asked.append(Deferred.fromCoroutine(self._capabilities()))
        if settings.parameters:
            asked.append(self.client.execute("query-migrate-parameters"))
        answers = await together(asked)
        return self._pick(
            settings,
            answers[0] if settings.capabilities else {},
            answers[-1] if settings.parameters else {},
        )

    def _pick(
        self, settings: Settings, capabilities: Mapping[str, bool], parameters: Mapping[str, Any]
    ) -> Settings:
        """Return what a QEMU has for the names in ``settings``, out of all that it has."""
        for name in settings.capabilities:
            if name not in capabilities:
                raise GuestError(f"the QEMU of guest {self.name} has no capability {name}")
        return Settings(
            {name: capabilities[name] for name in settings.capabilities},
            {name: parameters.get(name) for name in settings.parameters},
            dict.fromkeys(settings.objects),
        )

    async def _capabilities(self) -> dict[str, bool]:
        answer = await self.client.execute("query-migrate-capabilities")
        return {entry["capability"]: entry["state"] for entry in answer}

    def _set(self, settings: Settings) -> list[Deferred[Any]]:
        """Send what sets them; returns the answers to come.

        Objects are there before a parameter names them, and go when none does any more.
        """
        asked = [
            self.client.execute("object-add", id=name, **arguments)
            for name, arguments in settings.objects.items()
            if arguments is not None
        ]
        if settings.capabilities:
            # All in one command: QEMU checks them together.
            switches = [
                {"capability": name, "state": state}
                for name, state in settings.capabilities.items()
            ]
            asked.append(self.client.execute("migrate-set-capabilities", capabilities=switches))
        if settings.parameters:
            asked.append(self.client.execute("migrate-set-parameters", **settings.parameters))
        asked += [
            self.client.execute("object-del", id=name)
            for name, arguments in settings.objects.items()
            if arguments is None
        ]
        return asked

    async def _settable(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return them without those that are ``None`` and that QEMU cannot unset."""
        if None not in parameters.values():
            return dict(parameters)
        known = await schema.of(self.client)
        return {
            name: value
            for name, value in parameters.items()
            if value is not None or known.nullable(name)
        }

    # -- the move

    async def incoming(self, channel: str | socket.socket) -> None:
        """Have it wait for the stream on a URI, or take it from a connected socket.

        A socket is the guest's from here on, whatever comes of it.  From QEMU
        9.1 on the process stays when the migration fails, so that
        ``query-migrate`` can tell why (``error-desc``); it is of no use then but
        for :meth:`quit`.  An older QEMU ends itself.

        :raises GuestError: QEMU refused.
        """
        await self._with_channel(
            "migrate-incoming", channel, {_STAY: False}, check=self._one_channel
        )

    async def migrate(self, channel: str | socket.socket) -> None:
        """Start the outgoing migration to a URI, or into a connected socket.

        A socket is the guest's from here on, whatever comes of it.

        :raises GuestError: QEMU refused.
        """
        await self._with_channel("migrate", channel)

    async def _one_channel(self) -> None:
        """See that the migration needs one channel only.

        QEMU 7.2 answers ``migrate-incoming`` with success all the same, and
        says on its stderr only that it will not do it.
        """
        present = await self._capabilities()
        for name in SEVERAL_CHANNELS:
            if present.get(name):
                raise GuestError(
                    f"guest {self.name} has {name} switched on, which needs several channels,"
                    " and a single one was given"
                )

    async def _with_channel(
        self,
        command: str,
        channel: str | socket.socket,
        wishes: Mapping[str, Any] | None = None,
        *,
        check: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Run a command that takes a channel.

        :param check: for one whose connection is there already; nothing is begun where it fails.
        """

        async def run(uri: str) -> None:
            if check is not None and uri.startswith(("fd:", "exec:")):
                await check()
            await self._try(command, uri, wishes or {})

        if isinstance(channel, str):
            await run(channel)
            return
        client = self.client
        name = next(self._names)
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

    async def _try(self, command: str, uri: str, wishes: Mapping[str, Any]) -> None:
        """Run a command, without those of ``wishes`` that this QEMU does not know.

        Trying is cheaper than reading the schema, which takes a QEMU some 20 ms; and what
        one build does not know is remembered.
        """
        build = str(self.client.greeting["version"])
        known = {name: wish for name, wish in wishes.items() if (build, name) not in _UNKNOWN}
        try:
            seconds = max(self._deadline, CONNECTED_FIRST.get(uri.partition(":")[0], 0))
            await self.client.execute_within(seconds, command, uri=uri, **known)
        except QMPRefusal as refusal:
            refused = {(build, name) for name in known if name in refusal.desc}
            if not refused:
                raise
            _UNKNOWN.update(refused)
            await self._try(command, uri, known)

    async def lend(self, *descriptors: int) -> str:
        """Put descriptors of one file into a set of QEMU's; returns the name for ``file:``.

        Each of them has to be opened in another way: QEMU takes the one that fits.
        """
        client = self.client
        first, *others = descriptors
        async with client.fd_turn:
            number = (await client.execute_with_fd(first, "add-fd"))["fdset-id"]
            for other in others:
                await client.execute_with_fd(other, "add-fd", **{"fdset-id": number})
        return f"{_FD_SETS}{number}"

    async def unlend(self, name: str) -> None:
        await self.client.execute("remove-fd", **{"fdset-id": int(name.removeprefix(_FD_SETS))})

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
                    f"the QEMU of guest {self.name} is still completing its migration after "
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
            QMPDeadline(f"the QEMU of guest {self.name} did not end within {self._deadline:g} s"),
        )
        try:
            await gone
        finally:
            if timer.active():
                timer.cancel()


def _lacking(settings: Settings, facts: GuestFacts) -> Settings:
    """Return what of the settings is not so yet.

    A QEMU reads what it is told byte by byte (monitor_can_read in monitor/monitor.c), some
    3.5 us each: what need not be said makes everybody wait less.
    """
    return Settings(
        {
            name: on
            for name, on in settings.capabilities.items()
            if facts.capabilities.get(name) is not on
        },
        {
            name: value
            for name, value in settings.parameters.items()
            if facts.parameters.get(name) != value
        },
        settings.objects,
    )
