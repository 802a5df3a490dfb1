"""The port that peers connect to: every connection is greeted, and then told apart.

What the other side says first decides what it is: a Reply makes it a control
connection, a role header a payload channel of a migration that was negotiated before.
"""

from __future__ import annotations

from twisted.internet.address import IPv4Address, IPv6Address
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory
from twisted.logger import Logger

from ..channels.secured import TlsSide
from ..errors import PeerGone, ProtocolError
from ..handshake.destination import DestinationHandshake
from ..handshake.events import Asked, ChannelOpened, Event, Failed, Selected
from ..transports.sockets import caller
from .control import Control
from .destination import Incoming
from .offer import kernel_does_tls, offered
from .services import Services

__all__ = ["IncomingConnection", "IncomingFactory"]

log = Logger()


class IncomingFactory(Factory):
    """What listens on the daemon's port."""

    noisy = False

    def __init__(
        self, services: Services, *, tls_required: bool = False, in_band: bool = False
    ) -> None:
        """
        :param tls_required: who comes in here has to go over to TLS.
        :param in_band: the handshake has its in-band form here.
        """
        self._services = services
        self._in_band = in_band
        self._tls_required = tls_required
        self._keep_keys = kernel_does_tls(services)

    def buildProtocol(self, addr: IAddress | None) -> IncomingConnection:
        # The kernel does the TLS of TCP alone.
        keep_keys = self._keep_keys and isinstance(addr, IPv4Address | IPv6Address)
        tls = self._services.security.called(keep_keys=keep_keys)
        # Anew each time: what is known of this host may have become more.
        connection = IncomingConnection(self._services, offered(self._services), tls)
        connection.tls_required = self._tls_required
        if self._in_band:
            connection.go_in_band(server=True)
        return connection


class IncomingConnection(Control):
    """One connection to the port; a control connection until it turns out otherwise."""

    def __init__(self, services: Services, offer: list[str], tls: TlsSide | None) -> None:
        super().__init__(DestinationHandshake(offer), services.reactor, tls)
        self._services = services
        self._served = False

    def connectionMade(self) -> None:
        self.expect_within(self._services.deadlines.handshake)
        super().connectionMade()

    def _take(self, event: Event) -> None:
        untold = self.bytes.session is not None or self.in_band
        if isinstance(event, Failed) and untold and not self._served:
            # Nobody else will tell it here: no migration has come of it.
            log.info(
                "a connection from {peer} came to nothing: {reason}",
                peer=caller(self.transport),
                reason=event.text,
            )
        if isinstance(event, ChannelOpened):
            self._attach(event)
        elif isinstance(event, Selected):
            self._served = True
            move = Incoming(self._services, self, event)
            Deferred.fromCoroutine(move.begin())
        elif isinstance(event, Asked):
            self._answer(event)
        else:
            super()._take(event)

    def _answer(self, event: Asked) -> None:
        try:
            self.machine.outcome(self._services.verdicts.answer(event, self.peer))
        except ProtocolError as error:
            self.refuse(error)
            return
        self.flush()
        self.close()

    def _attach(self, event: ChannelOpened) -> None:
        self.expect_within(None)
        try:
            claim = self._services.attachments.claim(event.role, self.peer)
        except ProtocolError as error:
            self.refuse(error)
            return
        self.machine.attached()
        self._detached = True
        handing = claim.hand_over(self.transport, self.bytes.data_to_send(), self.bytes.session)
        handing.addErrback(lambda failure: failure.trap(PeerGone))
