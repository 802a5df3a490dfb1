"""Programs that an earlier life of the daemon has left behind, with real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any, cast

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater
from twisted.trial.unittest import TestCase

from qmigd.transports.leftovers import MARK, Leftovers

#: A socket that nobody has.
_GONE = 1


class LeftoversTests(TestCase):
    def setUp(self) -> None:
        self.directory = Path(self.mktemp())
        self.earlier = Leftovers(reactor, self.directory)

    def left(
        self,
        script: str = "exec sleep 98768",
        connection: int = _GONE,
        owner: str = "a migration",
    ) -> Any:
        """Start a program as a daemon does that is killed after that."""
        note = self.earlier.note(connection, owner)
        child = self.start(script, note.environment)
        note.started(child.pid)
        return child

    def start(self, script: str, environment: dict[str, str]) -> Any:
        """Start a shell, and wait until it is one."""
        child = subprocess.Popen(
            ["/bin/sh", "-c", f"echo; {script}"],
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,
        )

        def end() -> None:
            child.kill()
            child.communicate()

        self.addCleanup(end)
        assert child.stdout is not None
        child.stdout.readline()
        return child

    def again(self) -> Leftovers:
        """Return what a daemon has that is started now."""
        later = Leftovers(reactor, self.directory)
        later.start()
        self.addCleanup(later.stop)
        return later

    async def all_ended(self) -> None:
        """Wait until nothing is left."""
        while os.listdir(self.directory):
            await _turn()

    def change(self, **fields: Any) -> None:
        """Have the files say something else."""
        for path in self.directory.iterdir():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines:
                line.update({name: fields[name] for name in line if name in fields})
            path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    async def test_ended(self) -> None:
        """Every program ends, with what it has started and whatever that does about SIGTERM."""
        plain = self.left()
        stubborn = self.left("trap '' TERM; sleep 98768 & sleep 98768; :")
        self.again()
        await self.all_ended()
        self.assertEqual(plain.wait(), -15)
        # Or 0, where what it waits for is killed an instant before itself.
        self.assertIn(stubborn.wait(), (-9, 0))
        stubborn.stdout.read()  # which ends with the last that could write

    async def test_group_without_leader(self) -> None:
        """What a program that has ended has left in its group is known by the mark."""
        child = self.left("sleep 98768 & exit 0")
        child.wait()
        os.killpg(child.pid, 0)
        self.again()
        await self.all_ended()
        child.stdout.read()

    async def test_hardly_started(self) -> None:
        """The daemon was killed before it could put the process down: the mark is enough."""
        note = self.earlier.note(_GONE, "a migration")
        child = self.start("exec sleep 98768", note.environment)
        self.again()
        await self.all_ended()
        self.assertEqual(child.wait(), -15)

    async def test_needed(self) -> None:
        """One whose connection somebody has open is left until that is closed.

        So are others of its migration, which it may go through.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            child = self.left(connection=os.fstat(ours.fileno()).st_ino)
            first = self.left()
            other = self.left(owner="another migration")
            self.again()
            while other.poll() is None:
                await _turn()
            self.assertEqual([None, None], [child.poll(), first.poll()])
            ours.close()
            await self.all_ended()
        self.assertEqual([-15, -15], [child.wait(), first.wait()])

    async def test_migration_over(self) -> None:
        """Nor is one left whose migration is over, whoever has its connection."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            child = self.left(connection=os.fstat(ours.fileno()).st_ino)
            later = self.again()
            await later.end_for("another migration")
            self.assertIsNone(child.poll())
            await later.end_for("a migration")
        self.assertEqual(child.wait(), -15)

    async def test_somebody_else(self) -> None:
        """A process that only has got the number, or that of another place, is left alone."""
        for changed in (
            {"started": 1, "mark": "another"},
            {"here": {"boot": "another", "pid": "pid:[1]", "net": "net:[1]"}},
        ):
            child = self.left()
            self.change(**changed)
            self.again()
            await self.all_ended()
            self.assertIsNone(child.poll())

    async def test_damaged(self) -> None:
        """A file that says nothing is removed; half a line is as good as none."""
        (self.directory / "empty").touch()
        (self.directory / "other").write_text('["here"]\n')
        child = self.left()
        (noted,) = self.directory.glob("*.jsonl")
        noted.write_text(noted.read_text()[:-5])
        self.again()
        await self.all_ended()
        self.assertEqual(child.wait(), -15)

    async def test_mark(self) -> None:
        """Each program has a mark of its own."""
        marks = {self.earlier.note(_GONE, "a migration").environment[MARK] for _ in range(2)}
        self.assertEqual(len(marks), 2)


def _turn() -> Deferred[None]:
    """Let the reactor do something else for a moment."""
    return deferLater(cast(Any, reactor), 0.01)
