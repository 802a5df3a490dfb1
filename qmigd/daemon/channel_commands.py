"""The management commands about descriptors that a client hands over."""

from __future__ import annotations

import os

from ..migration.services import Services
from ..qmp.descriptors import Descriptors

__all__ = ["ChannelCommands"]


class ChannelCommands:
    """A part of :class:`qmigd.daemon.commands.Commands`."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def getfd(self, fdname: str, *, descriptors: Descriptors) -> None:
        descriptors.name(fdname)

    async def closefd(self, fdname: str, *, descriptors: Descriptors) -> None:
        os.close(descriptors.take(fdname))
