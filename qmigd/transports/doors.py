"""Unix sockets that the daemon listens on: whom they let in, and what was left of earlier ones.

The socket is its owner's alone before anybody can connect; a group is let in afterwards.
"""

from __future__ import annotations

import errno
import grp
import os
import socket
import stat
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort, IProtocolFactory, IStreamServerEndpoint
from twisted.logger import Logger
from zope.interface import implementer

from qmigd.errors import ConfigError

__all__ = ["UnixServerEndpoint", "listen_unix"]

log = Logger()


def listen_unix(
    reactor: Any,
    path: str,
    factory: IProtocolFactory,
    *,
    what: str,
    key: str,
    backlog: int = 50,
    group: str | None = None,
) -> IListeningPort:
    """Listen on a unix socket, in a directory that is made if it is not there.

    :param what: what people call the socket.
    :param key: where in the configuration its path is.
    :param group: the group that may connect besides its owner; ``None``: nobody may.
    :raises ConfigError: that is not possible; the text says why.
    """
    _make_directory(os.path.dirname(path), what, key, 0o700 if group is None else 0o711)
    _remove_stale(path, what, key)
    try:
        # Twisted sets the mode between bind and listen: nobody gets in before.
        port: IListeningPort = reactor.listenUNIX(path, factory, backlog, 0o600)
    except CannotListenError as error:
        raise ConfigError(f"{what} {path} cannot be opened: {error.socketError}.") from None
    if group is not None:
        try:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
            os.chmod(path, 0o660)
        except (KeyError, OSError) as error:
            port.stopListening()
            why = getattr(error, "strerror", "there is no such group")
            raise ConfigError(
                f"{what} {path} cannot be given to the group '{group}': {why}."
            ) from None
    return port


@implementer(IStreamServerEndpoint)
class UnixServerEndpoint:
    """What listens for peers on a unix socket."""

    def __init__(self, reactor: Any, path: str, backlog: int, group: str | None) -> None:
        self._reactor = reactor
        self._path = path
        self._backlog = backlog
        self._group = group

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[IListeningPort]:
        async def listen() -> IListeningPort:
            return listen_unix(
                self._reactor,
                self._path,
                protocolFactory,
                what="The socket",
                key="listen",
                backlog=self._backlog,
                group=self._group,
            )

        return Deferred.fromCoroutine(listen())


def _make_directory(directory: str, what: str, key: str, mode: int) -> None:
    if not directory or os.path.isdir(directory):
        return
    try:
        Path(directory).parent.mkdir(parents=True, exist_ok=True)
        Path(directory).mkdir(mode=mode, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{what}'s directory {directory} cannot be made: {error.strerror}. "
            f"Name a place of your own as '{key}' in [daemon], or run qmigd as root."
        ) from None


def _remove_stale(path: str, what: str, key: str) -> None:
    """Remove the socket that a daemon left behind; refuse where one still answers."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be used: {error}.") from None
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"{path} is no socket, and is left alone; name another path as '{key}' in [daemon]."
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # On a unix socket connecting never waits, except for a full queue: EAGAIN here.
        probe.setblocking(False)
        code = probe.connect_ex(path)
    if code == errno.ECONNREFUSED:
        try:
            os.unlink(path)
        except OSError as error:
            raise ConfigError(
                f"{path} is left from a daemon that has ended and cannot be removed: "
                f"{error.strerror}."
            ) from None
        log.info("removed {path}, which a daemon had left behind", path=path)
    elif code in (0, errno.EAGAIN):
        raise ConfigError(
            f"Another daemon answers on {path}. Stop it first, or name another path as "
            f"'{key}' in [daemon]."
        )
    elif code != errno.ENOENT:
        raise ConfigError(f"{what} {path} cannot be used: {os.strerror(code)}.")
