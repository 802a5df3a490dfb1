"""The management socket: :mod:`qmigd.api` on one side, QMP on the other.

A command's arguments are checked against its declaration, and then the handler
of its name is called: a method of an :class:`Operations` object.  Whoever can
open the socket decides where guests go, so that only the daemon's own user can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from twisted.internet.defer import maybeDeferred
from twisted.internet.interfaces import IListeningPort

from .. import __version__
from ..api import COMMANDS, check_arguments, command, package
from ..errors import ArgumentError
from ..qmp.descriptors import Descriptors
from ..qmp.server import QMPServer
from ..transports.doors import listen_unix

__all__ = ["Monitor", "Operations"]

_Json = dict[str, Any]


class Operations(Protocol):
    """What the daemon can do: one method for each command of :data:`qmigd.api.COMMANDS`.

    Each has the command's name with underscores, and takes the arguments by
    name; those that the client left out are not passed.  One that is declared to work
    with descriptors also gets those of its client.  What it returns is the
    answer, ``None`` for the empty object; what it raises of :mod:`qmigd.errors`
    is told the client.
    """

    async def query_version(self) -> _Json: ...

    async def query_commands(self) -> list[_Json]: ...

    async def query_qmp_schema(self) -> list[_Json]: ...

    async def query_guests(self) -> list[_Json]: ...

    async def guest_add(self, name: str, qmp: str) -> dict[str, Any]: ...

    async def guest_remove(self, name: str) -> None: ...

    async def query_features(
        self,
        guest: str | None = None,
        uri: str | None = None,
        tls_hostname: str | None = None,
        argv: list[str] | tuple[str, ...] = (),
    ) -> _Json: ...

    async def query_tunables(self, guest: str) -> list[_Json]: ...

    async def migrate(
        self,
        guest: str,
        uri: str,
        tunables: Mapping[str, Any] | None = None,
        prefer: list[str] | tuple[str, ...] = (),
        require: list[str] | tuple[str, ...] = (),
        exclude: list[str] | tuple[str, ...] = (),
        tls_hostname: str | None = None,
        argv: list[str] | tuple[str, ...] = (),
    ) -> _Json: ...

    async def query_migrate(
        self, guest: str | None = None, id: str | None = None
    ) -> list[_Json]: ...

    async def migrate_start_postcopy(self, guest: str) -> None: ...

    async def migrate_cancel(self, guest: str) -> None: ...

    async def migrate_set_parameters(self, guest: str, tunables: Mapping[str, Any]) -> None: ...

    async def getfd(self, fdname: str, *, descriptors: Descriptors) -> None: ...

    async def closefd(self, fdname: str, *, descriptors: Descriptors) -> None: ...

    async def add_channel(
        self, id: str, channel: str, fdname: str, index: int = 0, *, descriptors: Descriptors
    ) -> None: ...

    async def incoming(self, uri: str, *, descriptors: Descriptors) -> None: ...


class Monitor:
    """The management socket of one daemon."""

    def __init__(self, reactor: Any, path: str, operations: Operations) -> None:
        """:param reactor: provides ``IReactorUNIX`` and ``IReactorTime``.
        :param path: of the unix socket.
        :raises TypeError: ``operations`` lacks a command's handler.
        """
        self._reactor = reactor
        self._path = path
        self._handlers = {name: _handler(operations, name) for name in COMMANDS}
        self._server = QMPServer(reactor, self.dispatch, __version__, package(__version__))
        self._port: IListeningPort | None = None

    async def start(self) -> None:
        """Listen.

        :raises ConfigError: that is not possible; the text says why.
        """
        self._port = listen_unix(
            self._reactor, self._path, self._server, what="The management socket", key="monitor"
        )

    async def stop(self) -> None:
        """Stop listening, remove the socket, and let the clients go."""
        port, self._port = self._port, None
        if port is not None:
            await maybeDeferred(port.stopListening)
        self._server.close()

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        """Tell every client of an event of :data:`qmigd.api.EVENTS`."""
        self._server.event(name, data)

    async def dispatch(
        self, name: str, arguments: Mapping[str, Any], descriptors: Descriptors
    ) -> Any:
        """Check a command and carry it out.

        :raises CommandNotFound: there is none of that name.
        :raises ArgumentError: its arguments do not fit its declaration.
        """
        declared = command(name)
        try:
            check_arguments(declared, arguments)
        except ArgumentError:
            if name == "getfd":
                # Else the next getfd would take the one that came with this one.
                descriptors.drop()
            raise
        given = {argument.replace("-", "_"): value for argument, value in arguments.items()}
        if declared.descriptors:
            given["descriptors"] = descriptors
        return await self._handlers[name](**given)


def _handler(operations: Operations, name: str) -> Any:
    handler = getattr(operations, name.replace("-", "_"), None)
    if not callable(handler):
        raise TypeError(f"{type(operations).__name__} has no handler for the command '{name}'")
    return handler
