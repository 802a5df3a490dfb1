"""The ports that a destination offers for the ``direct`` path."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

from ..errors import LocalError

__all__ = ["PortRange"]


class PortRange:
    """Ports out of a range, each given to one QEMU at a time.

    Whoever connects to such a port first is taken for the peer by QEMU, so they are
    given out in no foreseeable order and are open for as short as can be.
    """

    def __init__(self, ports: range) -> None:
        self._ports = ports
        self._taken: set[int] = set()

    def candidates(self, host: str) -> Iterator[int]:
        """Give the ports of ``host`` that nobody has, in random order.

        :raises LocalError: (at the end) there is none left.
        """
        ports = [port for port in self._ports if port not in self._taken]
        random.shuffle(ports)
        for port in ports:
            if _is_free(host, port):
                yield port
        raise LocalError(
            f"no port of direct-ports {self._ports.start}-{self._ports.stop - 1} is free on {host}",
            code="no-port",
        )

    def take(self, port: int) -> None:
        self._taken.add(port)

    def free(self, port: int) -> None:
        self._taken.discard(port)


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As QEMU does: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
