"""The server's side of QMP's dialect, whatever the commands are.

A client is greeted, and enters command mode with ``qmp_capabilities``.  Its
commands are run one after another and answered in that order; clients do not
wait for each other.  Whatever a client sends is answered: what is no JSON, no
command or no argument with an error that says so.

Over a unix socket a client may hand over file descriptors
(:mod:`qmigd.qmp.descriptors`); what a command does with them is the command's affair.

Memory is bounded for each client: a message has a limit, no more is read while
commands wait, no command is begun while the client does not read its answers,
and one that does not even read its events is let go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import (
    IAddress,
    IFileDescriptorReceiver,
    IPushProducer,
    IReactorTime,
)
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from qmigd.errors import CommandNotFound, DeviceNotFound, ProtocolError, QmigdError
from qmigd.qmp.codec import SERVER_LIMIT, Decoder, Message, encode
from qmigd.qmp.descriptors import Descriptors

__all__ = ["EVENT_BACKLOG", "QUEUE", "Dispatch", "QMPServer"]

#: Commands of one client that may wait before no more is read from it
#: (QEMU has the same number, ``QMP_REQ_QUEUE_LEN_MAX`` in monitor/monitor-internal.h).
QUEUE = 8
#: Bytes of events that wait for a client that does not read; then it is let go.
EVENT_BACKLOG = 1 << 20

#: Runs a command: takes its name, its arguments and the client's descriptors, returns JSON.
Dispatch = Callable[[str, dict[str, Any], Descriptors], Awaitable[Any]]

_log = Logger()


class QMPServer(Factory):
    """Serves any number of clients with what ``dispatch`` can do."""

    noisy = False

    def __init__(
        self, clock: IReactorTime, dispatch: Dispatch, version: str, package: str = ""
    ) -> None:
        """:param clock: its seconds are since 1970: events are stamped with them.
        :param dispatch: raises an error of :mod:`qmigd.errors` to refuse a command.
        :param version: ``"1.2.3"``, for the greeting.
        """
        major, minor, micro = (int(part) for part in version.split(".")[:3])
        self.greeting: Message = {
            "QMP": {
                "version": {
                    "qemu": {"major": major, "minor": minor, "micro": micro},
                    "package": package,
                },
                "capabilities": [],
            }
        }
        self.dispatch = dispatch
        self.clients: set[_Client] = set()
        self._clock = clock

    def buildProtocol(self, addr: IAddress | None) -> Protocol:
        return _Client(self)

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        """Send an event to every client in command mode."""
        now = self._clock.seconds()
        seconds = int(now)
        microseconds = int((now - seconds) * 1e6)
        stamp = {"seconds": seconds, "microseconds": microseconds}
        message = encode({"event": name, "data": dict(data), "timestamp": stamp})
        for client in list(self.clients):
            client.send_event(message)

    def close(self) -> None:
        """Let all clients go; answers that are on their way still go out."""
        for client in list(self.clients):
            client.transport.loseConnection()


class _Refusal(Exception):
    """A command that does not reach ``dispatch``: QMP's class, and what is wrong."""

    def __init__(self, kind: str, desc: str) -> None:
        super().__init__(kind, desc)
        self.kind = kind
        self.desc = desc


@implementer(IPushProducer, IFileDescriptorReceiver)
class _Client(Protocol):
    """One client; produces its answers for the transport, as fast as that takes them."""

    transport: Any

    def __init__(self, server: QMPServer) -> None:
        self._server = server
        self._decoder = Decoder(SERVER_LIMIT)
        self._descriptors = Descriptors()
        self._queue: deque[Message | ProtocolError] = deque()
        self._ready = False  # in command mode
        self._busy = False  # with commands
        self._blocked = False  # the client does not read
        self._unread = bytearray()  # events for it
        self._gone = False

    # -- for Twisted

    def connectionMade(self) -> None:
        self._server.clients.add(self)
        self.transport.registerProducer(self, True)
        self._write(self._server.greeting)

    def dataReceived(self, data: bytes) -> None:
        try:
            self._queue.extend(self._decoder.feed(data))
        except ProtocolError as error:
            self._refuse(error)
            return
        self._next()

    def fileDescriptorReceived(self, descriptor: int) -> None:
        try:
            self._descriptors.receive(descriptor)
        except ProtocolError as error:
            self._refuse(error)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._gone = True
        self._server.clients.discard(self)
        self._queue.clear()
        self._unread.clear()
        self._descriptors.close()

    def pauseProducing(self) -> None:
        self._blocked = True
        self._read_or_not()

    def resumeProducing(self) -> None:
        self._blocked = False
        unread, self._unread = self._unread, bytearray()
        self.transport.write(bytes(unread))
        self._next()

    def stopProducing(self) -> None:
        """The connection is lost: Twisted says so with ``connectionLost`` too."""

    # -- inside

    def send_event(self, message: bytes) -> None:
        if not self._ready:
            return
        if not self._blocked:
            self.transport.write(message)
            return
        self._unread += message
        if len(self._unread) > EVENT_BACKLOG:
            _log.warn("a client of the management socket does not read, and is let go")
            self._unread.clear()
            self.transport.abortConnection()

    def _next(self) -> None:
        """Go on with the commands that wait, if it is time for that."""
        if not self._busy:
            self._busy = True
            Deferred.fromCoroutine(self._work())
        self._read_or_not()

    async def _work(self) -> None:
        while self._queue and not (self._blocked or self._gone):
            message = self._queue.popleft()
            self._read_or_not()
            if isinstance(message, ProtocolError):
                self._write_error("GenericError", message.text, message.code)
            else:
                await self._run(message)
        self._busy = False

    def _read_or_not(self) -> None:
        if self._gone or self.transport.disconnecting:
            return
        if self._blocked or len(self._queue) >= QUEUE:
            self.transport.pauseProducing()
        else:
            self.transport.resumeProducing()

    async def _run(self, message: Message) -> None:
        id_ = {"id": message["id"]} if "id" in message else {}
        try:
            command, arguments = _command(message)
            if command == "qmp_capabilities" or not self._ready:
                self._negotiate(command, arguments)
                result: Any = {}
            else:
                result = await self._server.dispatch(command, arguments, self._descriptors)
            answer = encode({"return": {} if result is None else result, **id_})
        except _Refusal as refusal:
            self._write_error(refusal.kind, refusal.desc, "command", id_)
        except (CommandNotFound, DeviceNotFound) as error:
            self._write_error(type(error).__name__, error.text, error.code, id_)
        except QmigdError as error:
            self._write_error("GenericError", error.text, error.code, id_)
        except Exception:
            _log.failure("command {command} failed", command=message.get("execute"))
            self._write_error("GenericError", *_INTERNAL, id_)
        else:
            self._write(answer)

    def _negotiate(self, command: str, arguments: Mapping[str, Any]) -> None:
        if self._ready:
            raise _Refusal(
                "CommandNotFound", "Capabilities negotiation is already complete, command ignored"
            )
        if command != "qmp_capabilities":
            raise _Refusal(
                "CommandNotFound",
                "Expecting capabilities negotiation with 'qmp_capabilities'",
            )
        if unknown := set(arguments) - {"enable"}:
            raise _Refusal("GenericError", f"Parameter '{min(unknown)}' is unexpected")
        if arguments.get("enable"):
            raise _Refusal("GenericError", "There are no capabilities that could be enabled")
        self._ready = True

    def _refuse(self, error: ProtocolError) -> None:
        """Say why, and let the client go."""
        self._write_error("GenericError", error.text, error.code)
        self.transport.loseConnection()

    def _write(self, message: Message | bytes) -> None:
        if not self._gone:
            self.transport.write(message if isinstance(message, bytes) else encode(message))

    def _write_error(
        self, kind: str, desc: str, code: str, id_: Mapping[str, Any] | None = None
    ) -> None:
        error = {"class": kind, "desc": desc, "data": {"code": code}}
        self._write({"error": error, **(id_ or {})})


#: What is said of a fault in qmigd itself, and its code.
_INTERNAL = ("qmigd itself failed on this command; its log has the details", "internal")


def _command(message: Message) -> tuple[str, dict[str, Any]]:
    """Return name and arguments of a command.

    :raises _Refusal: it is none.
    """
    if "execute" not in message:
        raise _Refusal("GenericError", "QMP input lacks member 'execute'")
    if unknown := set(message) - {"execute", "arguments", "id"}:
        raise _Refusal("GenericError", f"QMP input member '{min(unknown)}' is unexpected")
    command, arguments = message["execute"], message.get("arguments", {})
    if not isinstance(command, str):
        raise _Refusal("GenericError", "QMP input member 'execute' must be a string")
    if not isinstance(arguments, dict):
        raise _Refusal("GenericError", "QMP input member 'arguments' must be an object")
    return command, arguments
