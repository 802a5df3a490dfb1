"""Where the management socket is."""

from __future__ import annotations

import os
from collections.abc import Mapping

__all__ = ["SOCKET_VARIABLE", "default_socket"]

#: The environment variable that tells ``qmigctl`` where the daemon listens.
SOCKET_VARIABLE = "QMIGD_SOCKET"


def default_socket(environ: Mapping[str, str], uid: int) -> str:
    """Return the URI of the management socket where nothing else was said.

    It is ``/run/qmigd/qmigd.sock`` for root; for an ordinary user it lies in
    the directory that the system made for that user's sockets, so that a
    daemon of one's own needs no configuration.
    """
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if uid != 0 and os.path.isabs(runtime):
        return f"unix:{runtime}/qmigd/qmigd.sock"
    return "unix:/run/qmigd/qmigd.sock"
