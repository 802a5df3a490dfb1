"""A management socket whose answers are written down beforehand, for tests of both its ends."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Coroutine
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.trial.unittest import TestCase

from qmigd.api import COMMANDS, mismatch
from qmigd.daemon.monitor import Monitor

E = TypeVar("E", bound=Exception)

__all__ = ["MIGRATION", "ManagementTestCase", "Scripted", "entry"]

#: The id of the migration in these tests.
MIGRATION = "9d5b0d3c-6e4e-4a8b-9d8e-0c6f5a1f7b11"


def entry(status: str = "active", **more: Any) -> dict[str, Any]:
    """Return an entry of ``query-migrate`` with something in every place."""
    return {
        "id": MIGRATION,
        "guest": "web1",
        "role": "source",
        "peer": "tcp:host-b:16516",
        "status": status,
        "step": "moving RAM",
        "tunables": {},
        "started": 1000.0,
        "plan": {
            "path": "direct",
            "path-reason": "the destination offers ports",
            "features": ["multifd", "postcopy-ram"],
            "agreements": {"multifd": {"channels": 2}},
            "channels": [
                {"name": "main", "index": 0},
                {"name": "multifd", "index": 0},
                {"name": "multifd", "index": 1},
            ],
            "left-out": [{"name": "postcopy-preempt", "reason": "QEMU 7.2 lacks it"}],
        },
        "ram": {
            "total": 4 << 30,
            "transferred": 3 << 30,
            "remaining": 1 << 30,
            "mbps": 8589.934592,
            "dirty-sync-count": 2,
            "dirty-pages-rate": 0,
            "page-size": 4096,
        },
        **more,
    }


class Scripted:
    """Answers each command with what ``answers`` has under its name.

    A value is returned, an exception raised, a list of type ``Sequence`` walked
    through (its last element stays), and a callable is called with the arguments.

    :ivar calls: name and arguments of each command.
    """

    class Sequence(list[Any]):
        """Answers to one command, one after another."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}
        self._waiting: list[tuple[str, int, Deferred[None]]] = []

    def called(self, name: str, times: int = 1) -> Deferred[None]:
        """Return what fires when a command has been given so often."""
        waiting: Deferred[None] = Deferred()
        self._waiting.append((name, times, waiting))
        self._fire()
        return waiting

    def _fire(self) -> None:
        for one in list(self._waiting):
            name, times, waiting = one
            if sum(called == name for called, _ in self.calls) >= times:
                self._waiting.remove(one)
                waiting.callback(None)

    async def _answer(self, name: str, arguments: dict[str, Any]) -> Any:
        answer = self.answers.get(name)
        if isinstance(answer, Scripted.Sequence):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer):
            answer = answer(**arguments)
        if isinstance(answer, Deferred):
            answer = await answer
        self.calls.append((name, arguments))
        self._fire()
        if isinstance(answer, Exception):
            raise answer
        declared = COMMANDS[name].returns
        if declared is not None:
            problem = mismatch(declared, answer, name)
            if problem:
                raise AssertionError(problem)
        return answer

    def __getattr__(self, attribute: str) -> Any:
        name = attribute.replace("_", "-")
        if name not in COMMANDS:
            raise AttributeError(attribute)

        async def handler(**arguments: Any) -> Any:
            return await self._answer(name, arguments)

        return handler


class ManagementTestCase(TestCase):
    """Has a monitor on a real unix socket, ``self.socket``, with ``self.operations`` behind it."""

    def setUp(self) -> Any:
        from twisted.internet import reactor

        self.reactor: Any = reactor
        # trial's own directories are too deep for a unix socket's path
        self.directory = tempfile.mkdtemp(prefix="qmigd-")
        self.addCleanup(shutil.rmtree, self.directory)
        self.path = f"{self.directory}/q.sock"
        self.socket = f"unix:{self.path}"
        self.operations = Scripted()
        self.monitor = Monitor(reactor, self.path, self.operations)
        return Deferred.fromCoroutine(self.start())

    async def start(self) -> None:
        await self.monitor.start()
        self.addCleanup(lambda: Deferred.fromCoroutine(self.monitor.stop()))

    async def raised(self, kind: type[E], work: Coroutine[Any, Any, Any] | Deferred[Any]) -> E:
        """Return the error of a kind that ``work`` ends in."""
        try:
            result = await work
        except kind as error:
            return error
        raise AssertionError(f"{result!r} came, and no {kind.__name__}")
