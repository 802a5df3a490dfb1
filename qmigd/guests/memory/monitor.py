"""The QMP commands of the guest: what qmigd asks of a QEMU, and three of its own.

``query-clock`` tells how far the guest has counted and where, ``check-ram`` proves its RAM
(:mod:`qmigd.guests.memory.contents`), and ``query-faults`` tells how long it has waited for
pages in postcopy.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.threads import deferToThreadPool

from qmigd.errors import ArgumentError, CommandNotFound, DeviceNotFound, GuestError
from qmigd.guests.builds import missing
from qmigd.guests.memory.devices import MACHINE
from qmigd.guests.memory.machine import Machine
from qmigd.guests.memory.options import Start
from qmigd.guests.memory.ram import PAGE
from qmigd.guests.memory.settings import SCHEMA
from qmigd.guests.memory.verbs import usable
from qmigd.qmp.descriptors import Descriptors
from qmigd.qmp.server import QMPServer
from qmigd.transports.doors import listen_unix

__all__ = ["PACKAGE", "VERSION", "Monitor"]

#: The QEMU whose ways it has, as far as others go by versions: several channels go together
#: with postcopy, and multifd has zero pages.
VERSION = "10.1.0"
PACKAGE = "qmigd-memory"

#: The type by which qmigd asks whether there is RDMA.
_RDMA = "qio-channel-rdma"

_Json = dict[str, Any]


class Monitor:
    """A machine with a QMP server in front of it."""

    def __init__(self, reactor: Any, start: Start) -> None:
        """:raises OSError: there is no room for its RAM."""
        self._reactor = reactor
        self._start = start
        self.ended: Deferred[None] = Deferred()
        self._server = QMPServer(reactor, self._dispatch, VERSION, PACKAGE)
        self.machine = Machine(start, self._event, self._end_later)
        self._port: IListeningPort | None = None

    async def listen(self) -> None:
        """Answer on the socket, and wait for the stream where the command line says so.

        :raises LocalError: nobody can listen there.
        """
        if self._start.incoming not in (None, "defer"):
            assert self._start.incoming is not None
            self.machine.receive(self._start.incoming, stay=False)
        self._port = listen_unix(
            self._reactor, self._start.qmp, self._server, what="the QMP socket", key="-qmp"
        )

    async def close(self) -> None:
        """End it all."""
        self.machine.close()
        self._server.close()
        port, self._port = self._port, None
        if port is not None:
            done = port.stopListening()
            if done is not None:
                await done

    def _event(self, name: str, data: Mapping[str, Any]) -> None:
        self._reactor.callFromThread(self._server.event, name, data)

    def _end_later(self) -> None:
        self._reactor.callFromThread(self._end)

    def _end(self) -> None:
        if not self.ended.called:
            self.ended.callback(None)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """Run one of its QMP commands from within the process.

        :raises QmigdError: it was refused.
        """
        descriptors = Descriptors()
        try:
            return await self._dispatch(command, arguments, descriptors)
        finally:
            descriptors.close()

    # -- the commands

    async def _dispatch(self, name: str, arguments: _Json, descriptors: Descriptors) -> Any:
        command = _COMMANDS.get(name)
        if command is None:
            raise CommandNotFound(f"The command {name} has not been found")
        return await command(self, arguments, descriptors)

    def _thread(self, call: Any, *arguments: Any) -> Deferred[Any]:
        """For what may wait."""
        pool = self._reactor.getThreadPool()
        return deferToThreadPool(self._reactor, pool, call, *arguments)

    async def _query_version(self, _: _Json, __: Descriptors) -> _Json:
        version: _Json = self._server.greeting["QMP"]["version"]
        return version

    async def _query_commands(self, _: _Json, __: Descriptors) -> list[_Json]:
        return [{"name": name} for name in sorted(_COMMANDS)]

    async def _query_schema(self, _: _Json, __: Descriptors) -> list[_Json]:
        return SCHEMA

    async def _query_status(self, _: _Json, __: Descriptors) -> _Json:
        state = self.machine.state
        return {"status": state, "running": state == "running"}

    async def _query_name(self, _: _Json, __: Descriptors) -> _Json:
        return {"name": self._start.name}

    async def _query_uuid(self, _: _Json, __: Descriptors) -> _Json:
        return {"UUID": str(self._start.uuid)}

    async def _query_memory(self, _: _Json, __: Descriptors) -> _Json:
        return {"base-memory": self.machine.ram.size, "plugged-memory": 0}

    async def _query_clock(self, _: _Json, __: Descriptors) -> _Json:
        return self.machine.clock()

    async def _query_faults(self, _: _Json, __: Descriptors) -> _Json:
        return self.machine.faults()

    async def _check_ram(self, _: _Json, __: Descriptors) -> _Json:
        machine = self.machine
        ran = machine.state == "running"
        if machine.state not in ("running", "paused", "postmigrate"):
            raise GuestError(f"The RAM of a guest that is {machine.state} cannot be checked")
        if ran:
            await self._thread(machine.stop)
        try:
            wrong = await self._thread(machine.check)
        finally:
            if ran:
                machine.cont()
        return {"wrong": wrong} if wrong else {}

    async def _pmemsave(self, arguments: _Json, _: Descriptors) -> None:
        start, size = arguments.get("val"), arguments.get("size")
        if not isinstance(start, int) or not isinstance(size, int):
            raise ArgumentError("Parameters 'val' and 'size' are missing, or no integers")
        path = _string(arguments, "filename")
        try:
            await self._thread(self.machine.save, start, size, path)
        except OSError as error:
            raise GuestError(f"{path} cannot be written: {error.strerror}") from None

    async def _qom_get(self, arguments: _Json, _: Descriptors) -> str:
        path, name = arguments.get("path"), arguments.get("property")
        if (path, name) == ("/machine", "type"):
            return f"{MACHINE}-machine"
        raise GuestError(f"Property '{path}.{name}' not found")

    async def _device_properties(self, arguments: _Json, _: Descriptors) -> list[_Json]:
        name, reason = str(arguments.get("typename")), ""
        if name == _RDMA:
            answer = await self._thread(usable, self.machine.ram.size)
            if answer:
                return []
            reason = answer.reason
        raise DeviceNotFound(missing(name, reason))

    async def _hmp(self, arguments: _Json, _: Descriptors) -> str:
        if arguments.get("command-line") != "info ramblock":
            raise GuestError("The only command of the human monitor here is 'info ramblock'")
        ram = self.machine.ram
        size = f"{ram.size:#018x}"
        return (
            f"{'Block Name':>24} {'PSize':>8} {'Offset':>18} {'Used':>18} {'Total':>18}\r\n"
            f"{ram.name:>24} {PAGE >> 10:>4} KiB  {0:#018x} {size} {size}\r\n"
        )

    async def _stop(self, _: _Json, __: Descriptors) -> None:
        await self._thread(self.machine.stop)

    async def _cont(self, _: _Json, __: Descriptors) -> None:
        self.machine.cont()

    async def _quit(self, _: _Json, __: Descriptors) -> None:
        # After the answer.
        self._reactor.callLater(0, self._end)

    async def _getfd(self, arguments: _Json, descriptors: Descriptors) -> None:
        descriptors.name(_string(arguments, "fdname"))

    async def _closefd(self, arguments: _Json, descriptors: Descriptors) -> None:
        socket.close(descriptors.take(_string(arguments, "fdname")))

    async def _query_capabilities(self, _: _Json, __: Descriptors) -> list[_Json]:
        return self.machine.settings.capabilities

    async def _set_capabilities(self, arguments: _Json, _: Descriptors) -> None:
        switches = arguments.get("capabilities")
        if not isinstance(switches, list) or not all(isinstance(one, dict) for one in switches):
            raise ArgumentError("Parameter 'capabilities' is missing, or no list of switches")
        self.machine.settings.switch(switches)

    async def _query_parameters(self, _: _Json, __: Descriptors) -> _Json:
        return self.machine.settings.parameters

    async def _set_parameters(self, arguments: _Json, _: Descriptors) -> None:
        self.machine.set_parameters(arguments)

    async def _query_migrate(self, _: _Json, __: Descriptors) -> _Json:
        return self.machine.query_migrate()

    async def _query_yank(self, _: _Json, __: Descriptors) -> list[_Json]:
        return [{"type": "migration"}] if self.machine.holds_on() else []

    async def _migrate(self, arguments: _Json, descriptors: Descriptors) -> None:
        self.machine.migrate(_end(arguments, descriptors))

    async def _migrate_incoming(self, arguments: _Json, descriptors: Descriptors) -> None:
        stay = arguments.get("exit-on-error", True) is False
        self.machine.receive(_end(arguments, descriptors), stay=stay)

    async def _migrate_cancel(self, _: _Json, __: Descriptors) -> None:
        self.machine.cancel()

    async def _start_postcopy(self, _: _Json, __: Descriptors) -> None:
        self.machine.start_postcopy()


def _string(arguments: Mapping[str, Any], name: str) -> str:
    value = arguments.get(name)
    if not isinstance(value, str):
        raise ArgumentError(f"Parameter '{name}' is missing, or no string")
    return value


def _end(arguments: Mapping[str, Any], descriptors: Descriptors) -> str | socket.socket:
    """Return a URI, or the socket that ``fd:NAME`` names."""
    uri = _string(arguments, "uri")
    if not uri.startswith("fd:"):
        return uri
    return socket.socket(fileno=descriptors.take(uri.removeprefix("fd:")))


_COMMANDS = {
    "check-ram": Monitor._check_ram,
    "closefd": Monitor._closefd,
    "cont": Monitor._cont,
    "device-list-properties": Monitor._device_properties,
    "getfd": Monitor._getfd,
    "human-monitor-command": Monitor._hmp,
    "migrate": Monitor._migrate,
    "migrate-incoming": Monitor._migrate_incoming,
    "migrate-set-capabilities": Monitor._set_capabilities,
    "migrate-set-parameters": Monitor._set_parameters,
    "migrate-start-postcopy": Monitor._start_postcopy,
    "migrate_cancel": Monitor._migrate_cancel,
    "pmemsave": Monitor._pmemsave,
    "qom-get": Monitor._qom_get,
    "query-clock": Monitor._query_clock,
    "query-commands": Monitor._query_commands,
    "query-faults": Monitor._query_faults,
    "query-memory-size-summary": Monitor._query_memory,
    "query-migrate": Monitor._query_migrate,
    "query-migrate-capabilities": Monitor._query_capabilities,
    "query-migrate-parameters": Monitor._query_parameters,
    "query-name": Monitor._query_name,
    "query-qmp-schema": Monitor._query_schema,
    "query-status": Monitor._query_status,
    "query-uuid": Monitor._query_uuid,
    "query-version": Monitor._query_version,
    "query-yank": Monitor._query_yank,
    "quit": Monitor._quit,
    "stop": Monitor._stop,
}
