"""Why a connection, or a place to listen, could not be had: half a sentence for people.

Twisted's own texts are for programmers, and say most things twice.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from typing import Final

from twisted.internet import error

from qmigd.errors import QmigdError

__all__ = ["not_connected", "not_listening"]

_CONNECTING: Final[Mapping[int, str]] = {
    errno.ECONNREFUSED: "nobody listens there",
    errno.ENOENT: "there is no such socket",
    errno.EACCES: "this user may not connect to it",
    errno.ETIMEDOUT: "no answer came in time",
}
_LISTENING: Final[Mapping[int, str]] = {
    errno.EADDRINUSE: "another program has it",
    errno.EADDRNOTAVAIL: "this host does not have that address",
    errno.EACCES: "this user may not",
}


def not_connected(failed: Exception) -> str:
    """Return why a connection could not be made.

    :param failed: what an endpoint's ``connect`` has raised.
    """
    if isinstance(failed, QmigdError):
        return failed.text
    if isinstance(failed, error.DNSLookupError):
        return f"the name cannot be looked up: {' '.join(map(str, failed.args))}"
    if isinstance(failed, error.ConnectError) and isinstance(failed.osError, int):
        return _CONNECTING.get(failed.osError) or os.strerror(failed.osError)
    if isinstance(failed, error.TimeoutError):
        return _CONNECTING[errno.ETIMEDOUT]
    return str(failed)


def not_listening(failed: error.CannotListenError) -> str:
    """Return why nobody can listen there."""
    cause = failed.socketError
    if isinstance(cause, OSError) and cause.errno is not None:
        return _LISTENING.get(cause.errno) or os.strerror(cause.errno)
    return str(cause)
