"""What a destination makes of a released guest that does not get to run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase

from qmigd.backend import Guest
from qmigd.errors import GuestGone, MigrationError, PeerGone
from qmigd.handshake.destination import DestinationHandshake
from qmigd.handshake.events import Released, Selected
from qmigd.migration.control import Control
from qmigd.migration.destination import Incoming
from qmigd.migration.destination_path import DestinationPath
from qmigd.migration.move import LOOK
from qmigd.migration.services import Deadlines, Services
from qmigd.migration.status import Records
from qmigd.migration.verdicts import Verdicts

_STALL = Deadlines().stall


class _Waiting:
    """A guest whose QEMU waits for its stream; ``loaded_by`` is what its load ends with."""

    name = "vm"

    def __init__(self) -> None:
        self.status = "postcopy-device"
        self.state = "inmigrate"
        self.done: list[str] = []
        self.gone = False
        self.told_to_run = False
        self.loaded_by = ""

    def _do(self, what: str) -> None:
        if self.gone:
            raise GuestGone("QEMU has closed the connection")
        self.done.append(what)
        if what == self.loaded_by:
            self.state = "paused"

    async def query_migrate(self) -> dict[str, Any]:
        return {"status": self.status}

    async def query_status(self) -> str:
        self._do("look")
        return self.state

    async def stop(self) -> None:
        self._do("stop")

    async def cont(self) -> None:
        self._do("cont")

    async def quit(self) -> None:
        self._do("quit")


class ArrivingTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.released(lambda *_: None)

    def released(self, write: Callable[..., None]) -> None:
        """The source gives the guest away, and is lost.

        :param write: puts down in the journal what there is to put down.
        """
        self.clock = Clock()
        self.guest = _Waiting()
        control = Control(DestinationHandshake([]), self.clock)
        control.makeConnection(StringTransport())
        control.failure = PeerGone("the source is lost")
        services = SimpleNamespace(
            reactor=self.clock,
            deadlines=Deadlines(),
            records=Records(lambda *_: None),
            verdicts=Verdicts(),
            journal=SimpleNamespace(write=write),
            guests=SimpleNamespace(where=lambda _: "unix:/qmp"),
        )
        self.incoming = Incoming(cast(Services, services), control, Selected(1, ("a",)))
        self.incoming.guest = cast(Guest, self.guest)
        self.incoming._receiving = True
        self.incoming._said(Released({"run": True, "postcopy": True}))

    def given_up(self, after: float) -> str:
        """Have it wait for the guest; returns why it gives up, which it does then."""
        waiting = Deferred.fromCoroutine(self.incoming._watch())
        self.clock.pump([LOOK] * int(after / LOOK))
        self.assertNoResult(waiting)
        self.clock.pump([LOOK] * 2)
        return str(self.failureResultOf(waiting, MigrationError).value.text)

    def recover(self) -> bool | None:
        """Have it leave its host in order; returns whether the guest has run."""
        self.guest.done.clear()
        self.successResultOf(Deferred.fromCoroutine(self.incoming._recover()))
        return self.incoming._ran

    def test_not_put_down(self) -> None:
        """What cannot be put down in the journal is not taken over, and so never runs here."""

        def full(*entry: object) -> None:
            raise MigrationError("no room")

        self.released(full)
        watching = Deferred.fromCoroutine(self.incoming._watch())
        self.assertIn("no room", str(self.failureResultOf(watching, MigrationError).value))
        self.assertIs(self.recover(), False)
        self.assertEqual(self.guest.done, ["quit"])

    def test_never_loaded(self) -> None:
        """Postcopy that has begun and is not loaded is given up, on whatever path."""
        self.assertIn("has not run here", self.given_up(_STALL))
        self.assertIs(self.recover(), False)
        self.assertEqual(self.guest.done, ["look", "stop", "look", "quit"])

    def test_broken_before_postcopy(self) -> None:
        """A relay that lost the peer is given up too, where the switch did not come about."""
        self.guest.status = "active"
        path = SimpleNamespace(failure=PeerGone("channel main broke"))
        self.incoming.path = cast(DestinationPath, path)
        self.assertIn("has not run here", self.given_up(_STALL))
        self.assertIs(self.recover(), False)

    def test_torn_while_it_runs(self) -> None:
        """A guest that runs already is left running, with a word about its missing RAM."""
        self.guest.state, self.guest.status = "running", "postcopy-paused"
        waiting = Deferred.fromCoroutine(self.incoming._watch())
        error = self.failureResultOf(waiting, MigrationError).value
        self.assertIn("the guest runs here", error.text)
        self.assertIs(self.recover(), True)
        self.assertEqual(self.guest.done, ["look"])

    def test_precopy_may_take_long(self) -> None:
        """Where the switch did not come about, precopy goes on with the guest released."""
        self.guest.status = "active"
        waiting = Deferred.fromCoroutine(self.incoming._watch())
        self.clock.pump([LOOK] * int(10 * _STALL / LOOK))
        self.assertNoResult(waiting)

    def test_loaded_at_the_last_moment(self) -> None:
        """A guest whose load ends while its QEMU is about to be ended runs here."""
        self.guest.loaded_by = "stop"
        self.assertIs(self.recover(), True)
        self.assertEqual(self.guest.done, ["look", "stop", "look", "cont"])

    def test_gone_before_it_was_told_to_run(self) -> None:
        """A QEMU that ended without having been told to run the guest has not run it."""
        self.guest.gone = True
        self.assertIs(self.recover(), False)

    def test_gone_after_it_was_told_to_run(self) -> None:
        """One that was told to may have run it: nobody can say any more."""
        self.guest.gone = self.guest.told_to_run = True
        self.assertIsNone(self.recover())
