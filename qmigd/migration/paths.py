"""The three paths, from either side: how the payload gets from QEMU to QEMU.

====================  =====================================  ================================
path                  source                                 destination
====================  =====================================  ================================
``handover``          opens one payload channel, and hands    hands the channel that comes in
                      its socket to QEMU                      to QEMU
``direct``            tells QEMU host and port                has QEMU listen on a port
``relay``             a socket for QEMU's channels, each      a channel to QEMU's socket for
                      forwarded to the peer                   each that comes in
====================  =====================================  ================================

Where the plan has TLS, every payload channel is in TLS from its greeting on.  Behind
ATTACHED the kernel takes it over, where it can, and else the relay's threads do it.

What both sides have in common is here; each has a module of its own beside it,
:mod:`~qmigd.migration.source_path` and :mod:`~qmigd.migration.destination_path`.

In the baseline form none of them is needed: the control connection itself is handed
to QEMU.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from twisted.logger import Logger

from ..channels.codecs import chain
from ..channels.relay import DestinationRelay, SourceRelay
from ..channels.relay_channels import (
    ChannelEnded,
    ChannelHeld,
    ChannelLost,
    ChannelRefused,
    RelayEvent,
)
from ..channels.tls import PeerSocket, TlsSocket
from ..errors import (
    LocalError,
    MigrationError,
    PeerGone,
    QmigdError,
)
from ..interfaces import COPY, MOVERS, ICodec, Role
from ..negotiation.plan import MAIN, Plan
from ..transports.uri import Network, TcpAddress
from .services import Services

__all__ = ["Path", "for_qemu"]

log = Logger()


class Path:
    """What both sides have in common.

    :ivar failure: why the stream cannot go on, or ``None``.
    :ivar by: the feature that says what QEMU listens on and connects to, or ``None``.
    """

    def __init__(
        self, services: Services, plan: Plan, migration: str, secret: bytes, wake: Callable[[], Any]
    ) -> None:
        self.failure: QmigdError | None = None
        self.by: str | None = None
        self._services = services
        self._plan = plan
        self._migration = uuid.UUID(migration)
        self._secret = secret
        self._wake = wake
        self._relay: SourceRelay | DestinationRelay | None = None
        self._held: str | None = None

    @property
    def broken(self) -> str | None:
        """Why a relay has no stream any more, also where QEMU is not told; or ``None``."""
        return self.failure.text if self.failure is not None else self._held

    @property
    def busy(self) -> bool:
        """Whether a relay may still have bytes to pass on."""
        return self._relay is not None and any(
            channel.state in ("opening", "open") for channel in self._relay.channels()
        )

    def hold(self) -> None:
        """From here on QEMU's sockets stay open when the peer is lost (ownership)."""
        if self._relay is not None:
            self._relay.hold = True

    def close(self) -> None:
        """The migration is over: nothing of the path may be left."""
        if self._relay is not None:
            self._relay.stop().addErrback(
                lambda failure: log.failure("a relay did not end", failure=failure)
            )
            self._relay = None

    def _fail(self, error: QmigdError) -> None:
        if self.failure is None:
            self.failure = error
            self._wake()

    def _uri(self, at: Network, port: int) -> str:
        """What QEMU listens on and connects to on the path ``direct``."""
        host = at.host if isinstance(at, TcpAddress) else ""
        for name in self._plan.features:
            agreement = self._plan.agreements[name]
            uri = self._services.features[name].uri(agreement, host, port)
            if uri is not None:
                self.by = name
                return uri
        return str(replace(at, port=port))

    def _codec(self) -> Callable[[], ICodec] | None:
        makers = [
            self._services.features[name].codec(self._plan.agreements[name])
            for name in self._plan.features
        ]
        return chain([maker for maker in makers if maker is not None])

    def _mover(self, role: Role) -> str:
        for name in self._plan.features:
            mover = self._services.features[name].mover(self._plan.agreements[name], role)
            if mover is not None:
                if mover not in MOVERS:
                    raise MigrationError(
                        f"{name} wants bytes moved by '{mover}', but there are {', '.join(MOVERS)}"
                    )
                return mover
        return COPY

    def _heard(self, event: RelayEvent) -> None:
        name = "a channel" if event.channel is None else f"channel {event.channel[0]}"
        if isinstance(event, ChannelLost):
            self._fail(PeerGone(f"{name} to the peer broke: {event.reason}"))
        elif isinstance(event, ChannelRefused):
            self._fail(MigrationError(event.reason))
        elif isinstance(event, ChannelHeld) and event.channel == MAIN:
            self._held = f"{name}: {event.reason}"
        elif isinstance(event, ChannelEnded):
            self._wake()


def for_qemu(end: PeerSocket) -> socket.socket:
    """What QEMU can be given.

    :raises LocalError: the TLS on it is not in the kernel.
    """
    if isinstance(end, TlsSocket):
        end.close()
        raise LocalError(
            "The plan is to hand a connection in TLS to the guest, but this side's kernel does not "
            "do the TLS."
        )
    return end
