"""The port that peers connect to: every connection is greeted, and then told apart.

What the other side says first decides what it is: a Reply makes it a control
connection, a role header a payload channel of a migration that was negotiated before.
"""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory

from ..errors import PeerGone, ProtocolError
from ..handshake.destination import DestinationHandshake
from ..handshake.events import Asked, ChannelOpened, Event, Selected
from .control import Control
from .destination import Incoming
from .services import Services

__all__ = ["IncomingConnection", "IncomingFactory", "offered"]


def offered(services: Services) -> list[str]:
    """The features that this host's greeting offers."""
    return [
        name
        for name, feature in services.features.items()
        if name not in services.policy.exclude and feature.probe_host(services.host)
    ]


class IncomingFactory(Factory):
    """What listens on the daemon's port."""

    noisy = False

    def __init__(self, services: Services) -> None:
        self._services = services
        self._offer = offered(services)

    def buildProtocol(self, addr: IAddress | None) -> IncomingConnection:
        return IncomingConnection(self._services, self._offer)


class IncomingConnection(Control):
    """One connection to the port; a control connection until it turns out otherwise."""

    def __init__(self, services: Services, offer: list[str]) -> None:
        super().__init__(DestinationHandshake(offer), services.reactor)
        self._services = services

    def connectionMade(self) -> None:
        self.expect_within(self._services.deadlines.handshake)
        super().connectionMade()

    def _take(self, event: Event) -> None:
        if isinstance(event, ChannelOpened):
            self._attach(event)
        elif isinstance(event, Selected):
            move = Incoming(self._services, self, event)
            Deferred.fromCoroutine(move.serve())
        elif isinstance(event, Asked):
            self._answer(event)
        else:
            super()._take(event)

    def _answer(self, event: Asked) -> None:
        try:
            self.machine.outcome(self._services.verdicts.answer(event))
        except ProtocolError as error:
            self.refuse(error)
            return
        self.flush()
        self.close()

    def _attach(self, event: ChannelOpened) -> None:
        self.expect_within(None)
        try:
            claim = self._services.attachments.claim(event.role)
        except ProtocolError as error:
            self.refuse(error)
            return
        self.machine.attached()
        self._detached = True
        handing = claim.hand_over(self.transport, self.machine.data_to_send())
        handing.addErrback(lambda failure: failure.trap(PeerGone))
