"""The management commands about descriptors: connections that the management app has made."""

from __future__ import annotations

import os
import socket

from ..errors import ArgumentError, QmigdError
from ..migration.listening import IncomingFactory
from ..migration.services import Services
from ..qmp.descriptors import Descriptors
from ..transports.adopting import adopt
from ..transports.descriptors import DescriptorAddress
from ..transports.handed_over import checked, is_local
from ..transports.uri import IN_BAND

__all__ = ["ChannelCommands"]


class ChannelCommands:
    """A part of :class:`qmigd.daemon.commands.Commands`."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def getfd(self, fdname: str, *, descriptors: Descriptors) -> None:
        descriptors.name(fdname)

    async def closefd(self, fdname: str, *, descriptors: Descriptors) -> None:
        os.close(descriptors.take(fdname))

    async def add_channel(
        self, id: str, channel: str, fdname: str, index: int = 0, *, descriptors: Descriptors
    ) -> None:
        sock = _socket(descriptors, fdname)
        try:
            taken = self._services.requests.answer(id, channel, index, sock)
        except QmigdError:
            sock.close()
            raise
        if not taken:
            self._take_in(sock, in_band=self._services.requests.in_band(id))

    async def incoming(self, uri: str, *, descriptors: Descriptors) -> None:
        inner = uri.removeprefix(IN_BAND)
        scheme, _, fdname = inner.partition(":")
        if scheme != "fd" or not fdname:
            raise ArgumentError(
                f'"{uri}" cannot be taken in: write fd:FDNAME, with a name that getfd has given. '
                f"What comes over tcp: and unix: is in 'listen' in the configuration."
            )
        self._take_in(_socket(descriptors, fdname), in_band=inner != uri)

    def _take_in(self, sock: socket.socket, *, in_band: bool) -> None:
        """Serve a connection as if it had been accepted on a port."""
        services = self._services
        required = not (services.security.insecure or is_local(sock))
        factory = IncomingFactory(services, tls_required=required, in_band=in_band)
        adopt(services.reactor, sock, factory, DescriptorAddress())


def _socket(descriptors: Descriptors, fdname: str) -> socket.socket:
    """Take what the client has given that name; what is no good for a channel is closed.

    :raises ArgumentError: there is no such descriptor, or it is no good.
    """
    descriptor = descriptors.take(fdname)
    try:
        return checked(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
