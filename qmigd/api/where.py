"""Where the management socket is, and who greets there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

__all__ = ["SOCKET_VARIABLE", "default_socket", "is_qmigd", "package"]

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


def package(version: str) -> str:
    """Return what qmigd calls itself in its greeting, where a QEMU has its distributor's word."""
    return f"qmigd {version}"


def is_qmigd(greeting: Mapping[str, Any]) -> bool:
    """Whether it is a qmigd that greets so, and not a guest.

    :param greeting: what is in the greeting's ``QMP``, of whomever.
    """
    return str(greeting.get("version", {}).get("package", "")).startswith(package(""))
