"""A small synchronous QMP client: the test's own line to a QEMU or to a daemon.

It is independent of qmigd's client on purpose: what is under test does not
measure itself.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from tests.rig.news import DEADLINE, Hang, tell, wait_until

__all__ = ["Event", "Lost", "QmpClient", "QmpError"]


class QmpError(Exception):
    """The other end answered with an error; ``kind`` is its class, ``text`` its words."""

    def __init__(self, command: str, error: dict[str, Any]) -> None:
        self.kind = str(error.get("class", ""))
        self.text = str(error.get("desc", ""))
        super().__init__(f"{command}: {self.text} ({self.kind})")


class Lost(Exception):
    """The connection ended before the answer came."""


@dataclass(frozen=True)
class Event:
    """A QMP event: its name and its data."""

    name: str
    data: dict[str, Any]


class QmpClient:
    """A connection that speaks QMP, greeted and ready for commands.

    :ivar greeting: the server's greeting, the value of its ``QMP``.
    :ivar events: all events so far, in order; only ever grows.
    """

    def __init__(self, connection: socket.socket, name: str = "monitor") -> None:
        """Take over a connected socket and wait for the greeting.

        :raises Lost: the connection ended first.
        :raises Hang: the server is silent; it may have another client.
        """
        self.events: list[Event] = []
        self.greeting: dict[str, Any] = {}
        self._name = name
        self._connection = connection
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._answers: dict[int, Future[dict[str, Any]]] = {}
        self._greeted: Future[dict[str, Any]] = Future()
        self._closed = False
        self._thread = threading.Thread(target=self._read, name=f"qmp {name}", daemon=True)
        self._thread.start()
        self.greeting = self._result(self._greeted, "greeting", DEADLINE)["QMP"]
        self.execute("qmp_capabilities")

    @classmethod
    def connect(cls, path: str) -> QmpClient:
        """Connect to the unix socket ``path``.

        :raises OSError: nobody listens there.
        """
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
        except OSError:
            connection.close()
            raise
        return cls(connection, path)

    @property
    def lost(self) -> bool:
        """Whether the other end has closed the connection, or was killed."""
        return self._closed

    def execute(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        deadline: float = DEADLINE,
        sock: socket.socket | None = None,
        **more: Any,
    ) -> Any:
        """Run a command and return what it returns.

        :param arguments: by their own names.
        :param sock: what ``getfd`` is to get.
        :param more: further arguments; ``_`` in a name stands for ``-``.
        :raises QmpError: it was refused.
        :raises Lost: the connection ended.
        :raises Hang: no answer within ``deadline`` seconds.
        """
        request: dict[str, Any] = {"execute": command}
        if values := {**(arguments or {}), **{k.replace("_", "-"): v for k, v in more.items()}}:
            request["arguments"] = values
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            if self._closed:
                raise Lost(f"{command}: {self._name} has closed the connection.")
            number = request["id"] = next(self._numbers)
            self._answers[number] = answer
        with contextlib.suppress(OSError):  # the reader finds out and says so
            if sock is not None:
                socket.send_fds(self._connection, [b" "], [sock.fileno()])
            self._connection.sendall(json.dumps(request).encode() + b"\n")
        reply = self._result(answer, command, deadline)
        if "error" in reply:
            raise QmpError(command, reply["error"])
        return reply["return"]

    def wait_event(
        self,
        name: str,
        *,
        where: Callable[[dict[str, Any]], bool] = lambda data: True,
        since: int = 0,
        deadline: float = DEADLINE,
    ) -> Event:
        """Return the first event of that name whose data is as wanted, waiting for it.

        :param since: look at ``events[since:]`` only.
        :raises Lost: the connection ended first.
        """

        def look() -> Event | None:
            ended = self._closed
            for event in self.events[since:]:
                if event.name == name and where(event.data):
                    return event
            if ended:
                raise Lost(f"{self._name} closed the connection before {name}.")
            return None

        found = wait_until(
            look, lambda: f"{name} from {self._name}; seen {self.events[since:]}", deadline=deadline
        )
        assert found is not None
        return found

    def close(self) -> None:
        """Close the connection; harmless when that has happened."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._connection.close()

    def _result(
        self, answer: Future[dict[str, Any]], command: str, deadline: float
    ) -> dict[str, Any]:
        try:
            return answer.result(deadline)
        except FutureTimeout:
            raise Hang(f"{self._name} did not answer {command} in {deadline:g} s.") from None

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as lines:
                for line in lines:
                    self._take(json.loads(line))
        except OSError:
            pass
        finally:
            with self._lock:
                self._closed = True
                waiting = [self._greeted, *self._answers.values()]
                self._answers.clear()
            for answer in waiting:
                if not answer.done():
                    answer.set_exception(Lost(f"{self._name} has closed the connection."))
            tell()

    def _take(self, message: dict[str, Any]) -> None:
        if "QMP" in message:
            self._greeted.set_result(message)
        elif "event" in message:
            self.events.append(Event(message["event"], message.get("data", {})))
            tell()
        else:
            with self._lock:
                answer = self._answers.pop(message.get("id", 0), None)
            if answer is not None:
                answer.set_result(message)
