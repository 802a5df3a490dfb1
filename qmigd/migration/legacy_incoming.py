"""Guests that come in from a QEMU that no qmigd drives: ``migrate tcp:HOST:PORT`` by hand.

Each guest for which that is wanted has a port of its own (``legacy-listen``), since nothing
in QEMU's stream says which guest is meant.  Nobody is greeted there.  A connection has to
begin as QEMU's stream does before the guest's QEMU hears of it: that one takes a single
stream, and whatever else it were given would be its end.

Whether the guest runs here is decided by the two QEMUs: the source's stops it, this one
lets it run as soon as it is loaded, and qmigd only looks on.
"""

from __future__ import annotations

import socket
import uuid

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger

from ..channels.tls import HANDSHAKE_RECORD
from ..errors import GuestError, GuestGone, ProtocolError, QmigdError
from ..interfaces import Settings
from ..transports.arriving import peek
from ..transports.sockets import caller, detach, tune_stream
from ..wire.greeting import STREAM_MAGIC
from .legacy import plain_plan
from .move import OVER, Move
from .services import Services

__all__ = ["LegacyFactory", "LegacyIncoming"]

log = Logger()

#: How the further connections begin of a migration with several (``MULTIFD_MAGIC`` in QEMU's
#: migration/multifd.c).
_CHANNEL_MAGIC = b"\x11\x22\x33\x44"


class LegacyFactory(Factory):
    """What listens on a guest's port for plain streams."""

    noisy = False

    def __init__(self, services: Services, guest: str) -> None:
        """:param guest: the name of the guest that comes in there."""
        self._services = services
        self._guest = guest

    def buildProtocol(self, addr: IAddress | None) -> Protocol:
        return _Connection(self._services, self._guest)


class _Connection(Protocol):
    """Gives its socket away as soon as it has one."""

    def __init__(self, services: Services, guest: str) -> None:
        self._services = services
        self._guest = guest

    def connectionMade(self) -> None:
        peer = caller(self.transport)
        sock = detach(self.transport)
        tune_stream(sock)
        move = LegacyIncoming(self._services, self._guest, sock, peer)
        Deferred.fromCoroutine(move.begin())


class LegacyIncoming(Move):
    """One guest on its way in by a plain stream."""

    def __init__(self, services: Services, guest: str, sock: socket.socket, peer: str) -> None:
        """
        :param sock: the stream; closed whatever comes of it.
        :param peer: who has connected.
        """
        record = services.records.new(str(uuid.uuid4()), guest, "destination", peer)
        super().__init__(services, record)
        self._name = guest
        self._sock = sock
        self._receiving = False

    async def carry_out(self) -> None:
        await self._check()
        await self._prepare()
        await self._receive()

    async def _check(self) -> None:
        """See that it is a plain stream, before anything is done for it."""
        deadlines = self.services.deadlines
        # A source that waits for a greeting for as long as this daemon would has its time.
        begins = await peek(
            self.services.reactor, self._sock, len(STREAM_MAGIC), 3 * deadlines.handshake
        )
        if begins == STREAM_MAGIC:
            return
        if begins == _CHANNEL_MAGIC:
            raise ProtocolError(
                "it is a further channel of a migration with several; switch the capability "
                "for that off at the source"
            )
        if begins[0] == HANDSHAKE_RECORD:
            raise ProtocolError("it begins with TLS; unset tls-creds at the source")
        raise ProtocolError(f"it does not begin as QEMU's stream does, but with {ascii(begins)}")

    async def _prepare(self) -> None:
        """Have the guest's QEMU ready for a stream that brings nothing but the guest."""
        services = self.services
        examined = await self.take_from_peer(self._name)
        if examined.facts.parameters.get("tls-creds"):
            raise GuestError(
                f"the process of guest {self._name} has tls-creds set, and a plain stream has "
                "no TLS"
            )
        services.records.add(self.record)
        self.record.plan = plan = plain_plan(services.features, "source")
        await self.set_up_plan(
            plan,
            examined.facts,
            "destination",
            lambda: self.note_arrival("prepared", baseline=True),
            alone=True,
        )

    async def _receive(self) -> None:
        assert self.guest is not None
        log.info(
            "guest {guest} comes in from {peer} as QEMU's plain stream: no qmigd is there, and no "
            "feature is used",
            guest=self.guest.name,
            peer=self.record.peer,
        )
        self.record.update(step="receiving RAM")
        self._receiving = True
        self.note_arrival("receiving", baseline=True)
        await self.guest.incoming(self._sock)
        await self.until_completed()

    async def settle(self, error: QmigdError | None) -> None:
        if error is not None:
            await self._recover()
        self._sock.close()
        await self.put_back()
        self.leave()
        if error is None:
            log.info(
                "guest {guest} has arrived from {peer}", guest=self._name, peer=self.record.peer
            )
            self.record.owner = "destination"
            self.record.end("arrived")
            return
        log.warn(
            "a plain stream for guest {guest} from {peer} {ended}: {error}",
            guest=self._name,
            peer=self.record.peer,
            ended="failed" if self._receiving else "was refused",
            error=error.text,
        )
        self.record.end("not here", error)

    async def _recover(self) -> None:
        """After a failure: end a QEMU that is of no use any more, and no other."""
        guest = self.guest
        if guest is None:
            return
        try:
            if self._receiving:
                # Only if QEMU itself has said so: the guest may run here.
                spent = (await guest.query_migrate())["status"] in OVER - {"completed"}
            else:
                spent = self.services.guests.launched_for(guest, self.record.id)
            if spent:
                self.saved = Settings()
                await guest.quit()
        except GuestGone:
            # It ended by itself, as QEMU does when a load fails.
            self.saved = Settings()
        except QmigdError as second:
            log.warn("guest {guest}: {error}", guest=guest.name, error=second.text)
