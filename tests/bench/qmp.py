"""A QMP client for measuring: no threads, and QEMU's own time of each event.

The rig's client serves everything else; this one costs the least CPU that can be,
and its events say when they happened rather than when they were read.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Client", "Event"]

#: Seconds after which a QEMU is taken for hung.
_DEADLINE = 60.0


class Event(NamedTuple):
    """An event, and QEMU's wall-clock time of it in seconds since 1970."""

    name: str
    data: dict[str, Any]
    time: float


class Client:
    """A connection to a QMP socket, in command mode; a context manager that closes it.

    :ivar events: all that were read so far.
    """

    def __init__(self, path: str) -> None:
        """:raises OSError: nobody listens there."""
        self.events: list[Event] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_DEADLINE)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._read()
        self.execute("qmp_capabilities")

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *fds: int) -> Any:
        """Run a command, with descriptors if need be, and return what it returns.

        :raises RuntimeError: QEMU refused.
        """
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = arguments
        data = json.dumps(request).encode()
        if fds:
            socket.send_fds(self._socket, [data], fds)
        else:
            self._socket.sendall(data)
        while True:
            message = self._read()
            if "error" in message:
                raise RuntimeError(f"{command}: {message['error'].get('desc')}")
            if "return" in message:
                return message["return"]

    def until(self, is_it: Callable[[Event], bool]) -> Event:
        """Return the first event of its kind, waiting for it."""
        seen = 0
        while True:
            for event in self.events[seen:]:
                if is_it(event):
                    return event
            seen = len(self.events)
            self._read()

    def forget(self) -> None:
        """Forget all events up to now."""
        self.execute("query-status")  # those before its answer have been read then
        self.events.clear()

    def _read(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise RuntimeError("a QEMU has ended")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            stamp = message["timestamp"]
            time = stamp["seconds"] + stamp["microseconds"] / 1e6
            self.events.append(Event(message["event"], message.get("data", {}), time))
        return message

    def close(self) -> None:
        """Hang up; harmless when that has happened."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
