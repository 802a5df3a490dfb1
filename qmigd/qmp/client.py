"""The client's side of QMP: one connection to one QEMU.

A QEMU serves one client at a time on a QMP socket.  A second one is connected
by the kernel, which queues it, and then waits in silence until the first has
gone: that is how a socket that is taken is told apart from one that is dead.

Commands are answered in the order they were given, except those given out of
band (``exec-oob``), which QEMU answers even where its main loop hangs; only those
bear an id there.  Every
command has a deadline.  When it passes, the command's Deferred fails and the
answer, should it still come, is dropped; whether QEMU carried the command out
is then unknown.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred, DeferredLock, fail
from twisted.internet.interfaces import (
    IDelayedCall,
    IReactorTime,
    IUNIXTransport,
)
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from qmigd.errors import (
    ArgumentError,
    DeadlineError,
    GuestBusy,
    GuestError,
    GuestGone,
    ProtocolError,
)
from qmigd.qmp.codec import CLIENT_LIMIT, Decoder, Message, encode
from qmigd.waiting import with_deadline

__all__ = [
    "COMMAND_DEADLINE",
    "TAKEN",
    "EventCallback",
    "QMPClient",
    "QMPDeadline",
    "QMPRefusal",
]

#: Seconds that a QEMU has for the answer to a command.
COMMAND_DEADLINE = 10.0

#: Called with an event's name, its data, and its time in seconds since 1970.
EventCallback = Callable[[str, dict[str, Any], float], None]

_log = Logger()

#: The sentence for a socket that does not greet, but for its address.
TAKEN = (
    "{} accepts connections but does not greet: a QMP socket serves one client at a time,"
    " and this one, if it is one, already has one; give qmigd a QMP socket of its own (another"
    " -qmp option)"
)

#: How a QEMU's monitor for people begins (monitor_readline_cb in monitor/hmp.c).
_HMP = re.compile(rb"QEMU \S+ monitor")
#: Bytes that are shown of what somebody else says.
_SHOWN = 60


class QMPRefusal(GuestError):
    """QEMU answered a command with an error.

    :ivar command: the command.
    :ivar desc: QEMU's own words.
    :ivar kind: QEMU's error class, ``"GenericError"`` or ``"CommandNotFound"`` mostly.

    ``code`` is what a qmigd says in ``data``; a QEMU says nothing there.
    """

    def __init__(self, command: str, kind: str, desc: str, code: str | None = None) -> None:
        super().__init__(f"the guest's process refused {command}: {desc}", code=code)
        self.command = command
        self.desc = desc
        self.kind = kind


class QMPDeadline(GuestError, DeadlineError):
    """QEMU did not answer a command in time."""

    code = DeadlineError.code


class _Asked(NamedTuple):
    """A command that waits for its answer.

    :ivar seconds: what it has for that.
    :ivar due: when they are over, on the connection's clock.
    """

    command: str
    answer: Deferred[Any]
    seconds: float
    due: float


class QMPClient(Protocol):
    """One connection; made and greeted by :func:`~qmigd.qmp.connecting.connect`."""

    transport: Any

    def __init__(
        self, clock: IReactorTime, address: str, *, deadline: float = COMMAND_DEADLINE
    ) -> None:
        """:param deadline: seconds that each command has."""
        self.address = address
        #: What the QEMU said of itself: ``{"version": {...}, "capabilities": [...]}``.
        self.greeting: dict[str, Any] = {}
        self.deadline = deadline
        self._clock = clock
        self._decoder = Decoder(CLIENT_LIMIT)
        self._greeted: Deferred[dict[str, Any]] | None = None
        self._pending: dict[int, _Asked] = {}
        # Who answers in order is not told an id: what was asked so and is not answered yet,
        # whether somebody still waits for it or not.
        self._in_order = False
        self._queue: deque[int] = deque()
        self._timer: IDelayedCall | None = None
        self._last_id = 0
        #: To be held while a command with a descriptor waits for its answer: QEMU keeps the
        #: descriptors that came last only.
        self.fd_turn = DeferredLock()
        self._subscribers: list[EventCallback] = []
        self._mourners: list[Callable[[GuestGone], None]] = []
        self._lost: GuestGone | None = None

    # -- for the owner

    def execute(self, command: str, /, **arguments: Any) -> Deferred[Any]:
        """Run a command; fires with what it returned.

        Names of arguments that are no Python names are given as
        ``execute("human-monitor-command", **{"command-line": "info mtree"})``.

        :raises QMPRefusal: QEMU refused it.
        :raises QMPDeadline: no answer came in time.
        :raises GuestGone: the connection is lost.
        """
        return self._send("execute", command, arguments)

    def execute_within(self, seconds: float, command: str, /, **arguments: Any) -> Deferred[Any]:
        """Like :meth:`execute`, for a command that has a deadline of its own."""
        return self._send("execute", command, arguments, seconds)

    def execute_oob(self, command: str, /, **arguments: Any) -> Deferred[Any]:
        """Like :meth:`execute`, past the queue of commands that QEMU still works on."""
        return self._send("exec-oob", command, arguments)

    def execute_with_fd(self, fd: int, command: str, /, **arguments: Any) -> Deferred[Any]:
        """Like :meth:`execute`, with a copy of the descriptor ``fd``.

        ``fd`` stays the caller's, and has to stay open until the Deferred fires.  The caller
        holds :attr:`fd_turn` until then.

        :raises ArgumentError: the connection is not one over a unix socket.
        """
        if not IUNIXTransport.providedBy(self.transport):
            return fail(
                ArgumentError(
                    f"{self.address} cannot take a file descriptor: give qmigd a QMP socket"
                    " of the kind unix:PATH"
                )
            )
        if self._lost is None:
            self.transport.sendFileDescriptor(fd)
        return self._send("execute", command, arguments)

    def subscribe(self, callback: EventCallback) -> Callable[[], None]:
        """Have ``callback`` called with every event; returns what ends that."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def when_lost(self, callback: Callable[[GuestGone], None]) -> None:
        """Have ``callback`` called once with the reason when the connection is lost."""
        if self._lost is not None:
            callback(self._lost)
        else:
            self._mourners.append(callback)

    def close(self) -> None:
        """Close the connection; commands that wait for an answer fail with GuestGone."""
        if self._lost is None:
            self._fail(GuestGone(f"qmigd closed its connection to {self.address}"))

    # -- for Twisted

    def connectionMade(self) -> None:
        self._greeted = Deferred()

    def dataReceived(self, data: bytes) -> None:
        if self._greeted is not None and (first := data.lstrip()) and first[:1] != b"{":
            self._fail(GuestError(_other(self.address, first)))
            return
        try:
            messages = self._decoder.feed(data)
        except ProtocolError as error:
            messages = [error]
        for message in messages:
            if self._lost is not None:
                return
            if isinstance(message, ProtocolError):
                self._fail(
                    GuestError(f"what answers on {self.address} does not speak QMP: {message.text}")
                )
                return
            self._handle(message)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._lost is None:
            self._fail(
                GuestGone(f"the process on {self.address} has ended or closed its QMP socket")
            )

    # -- inside

    async def handshake(self, deadline: float) -> None:
        """Wait for the greeting and enter command mode.  For whoever has made the connection.

        The answer to that is not waited for: QEMU takes commands in order, so what is sent
        next can go along.  Should it refuse, the connection fails with its reason.

        :raises GuestBusy: no greeting came within ``deadline`` seconds.
        """
        assert self._greeted is not None  # connected by now
        try:
            self.greeting = await with_deadline(self._clock, self._greeted, deadline, "a greeting")
        except DeadlineError:
            busy = GuestBusy(TAKEN.format(self.address))
            self._fail(busy)
            raise busy from None
        wanted = [name for name in self.greeting.get("capabilities", []) if name == "oob"]
        # A QEMU takes one after the other what it is not told out of band
        # (monitor_qmp_dispatcher_co in monitor/qmp.c), and reads byte by byte, 3.5 us each:
        # nine ids are a third of a millisecond.  A qmigd, which knows no such band, does not.
        self._in_order = bool(wanted)
        entering = self.execute("qmp_capabilities", **({"enable": wanted} if wanted else {}))
        entering.addErrback(self._not_entered)

    def _not_entered(self, failure: Failure) -> None:
        error = failure.value
        if not isinstance(error, GuestError):
            failure.raiseException()
        elif self._lost is None:
            self._fail(error)

    def _send(
        self, key: str, command: str, arguments: Mapping[str, Any], seconds: float | None = None
    ) -> Deferred[Any]:
        if self._lost is not None:
            return fail(self._lost)
        self._last_id = number = self._last_id + 1
        message: Message = {key: command}
        if self._in_order and key == "execute":
            self._queue.append(number)
        else:
            message["id"] = number
        if arguments:
            message["arguments"] = dict(arguments)
        answer: Deferred[Any] = Deferred()
        within = self.deadline if seconds is None else seconds
        self._pending[number] = _Asked(command, answer, within, self._clock.seconds() + within)
        self._ring_in(within)
        self.transport.write(encode(message))

        def forget(failure: Failure) -> Failure:
            self._take(number)
            return failure

        return answer.addErrback(forget)

    def _take(self, number: int) -> _Asked | None:
        """Take what was asked under a number off the list, if it is there."""
        asked = self._pending.pop(number, None)
        if not self._pending:
            self._stop_clock()
        return asked

    def _ring_in(self, seconds: float) -> None:
        """Have the clock ring by then: one for all commands, most of which go by the dozen."""
        if self._timer is None:
            self._timer = self._clock.callLater(seconds, self._ring)
        elif self._timer.getTime() > self._clock.seconds() + seconds:
            self._timer.reset(seconds)

    def _stop_clock(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _ring(self) -> None:
        self._timer = None
        now = self._clock.seconds()
        for asked in [asked for asked in self._pending.values() if asked.due <= now]:
            asked.answer.errback(
                QMPDeadline(
                    f"the process on {self.address} did not answer {asked.command} within "
                    f"{asked.seconds:g} s"
                )
            )
        if self._pending:
            self._ring_in(min(asked.due for asked in self._pending.values()) - now)

    def _handle(self, message: Message) -> None:
        if "event" in message:
            self._event(message)
        elif "QMP" in message:
            greeted, self._greeted = self._greeted, None
            if greeted is not None and not greeted.called:
                greeted.callback(message["QMP"])
        elif "id" in message or (self._queue and ("return" in message or "error" in message)):
            # An answer that came after its deadline has nobody waiting any more.
            asked = self._take(message["id"] if "id" in message else self._queue.popleft())
            if asked is None:
                return
            if "error" in message:
                error = message["error"]
                asked.answer.errback(
                    QMPRefusal(
                        asked.command,
                        error.get("class", ""),
                        error.get("desc", "no reason given"),
                        error.get("data", {}).get("code"),
                    )
                )
            else:
                asked.answer.callback(message.get("return"))
        else:
            _log.warn(
                "{address} sent a message that answers nothing: {message}",
                address=self.address,
                message=message,
            )

    def _event(self, message: Message) -> None:
        stamp = message.get("timestamp", {})
        time = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
        for callback in list(self._subscribers):
            try:
                callback(message["event"], message.get("data", {}), time)
            except Exception:  # its fault is not the connection's
                _log.failure("a subscriber to QMP events failed")

    def _fail(self, reason: GuestError) -> None:
        """End the connection, and everything that waits for something from it."""
        gone = reason if isinstance(reason, GuestGone) else GuestGone(reason.text)
        self._lost = gone
        self.transport.abortConnection()
        waiting = [asked.answer for asked in self._pending.values()]
        self._pending.clear()
        self._stop_clock()
        if self._greeted is not None and not self._greeted.called:
            waiting.append(self._greeted)
        for answer in waiting:
            if not answer.called:
                answer.errback(reason)
        mourners, self._mourners = self._mourners, []
        for mourn in mourners:
            mourn(gone)


def _other(address: str, said: bytes) -> str:
    """Return the sentence for somebody who does not greet as QMP does."""
    if _HMP.match(said):
        return (
            f"{address} is a QEMU's monitor for people (HMP), and qmigd needs one that speaks QMP: "
            "start the QEMU with '-qmp' instead of '-monitor', or '-mon' with 'mode=control'"
        )
    line = ascii(said[:_SHOWN].splitlines()[0].decode("latin-1"))
    return f"what answers on {address} does not speak QMP: it begins with {line}"
