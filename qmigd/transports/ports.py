"""The ports that a destination offers for the ``direct`` path."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

from ..errors import LocalError
from .uri import Network, VsockAddress

__all__ = ["PortRange"]


class PortRange:
    """Ports out of a range, each given to one QEMU at a time.

    Whoever connects to such a port first is taken for the peer by QEMU, so they are
    given out in no foreseeable order and are open for as short as can be.
    """

    def __init__(self, ports: range) -> None:
        self._ports = ports
        self._taken: set[int] = set()

    def candidates(self, at: Network) -> Iterator[int]:
        """Give the ports of an address of this host that nobody has, in random order.

        :raises LocalError: (at the end) there is none left.
        """
        ports = [port for port in self._ports if port not in self._taken]
        random.shuffle(ports)
        for port in ports:
            if _is_free(at, port):
                yield port
        where = f"CID {at.cid}" if isinstance(at, VsockAddress) else at.host
        offered = f"{self._ports.start}-{self._ports.stop - 1}"
        raise LocalError(
            f"no port of direct-ports {offered} is free on {where}",
            code="no-port",
        )

    def take(self, port: int) -> None:
        self._taken.add(port)

    def free(self, port: int) -> None:
        self._taken.discard(port)


def _is_free(at: Network, port: int) -> bool:
    where: tuple[str | int | None, int]
    if isinstance(at, VsockAddress):
        family, where = socket.AF_VSOCK, (at.cid, port)
    else:
        family, where = socket.AF_INET6 if ":" in at.host else socket.AF_INET, (at.host, port)
    with socket.socket(family) as probe:
        # As QEMU does: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(where)
        except OSError:
            return False
    return True
