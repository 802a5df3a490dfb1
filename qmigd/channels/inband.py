"""The handshake's in-band form on a connection: the first form's bytes, in QEMU's framing.

::

    the socket  <-- framed -->  InBand  <-- bytes -->  Secured  <-->  the machine

To whoever holds the connection it looks like what is inside.  The framing is for the
handshake, and for what is said on a control connection while the migration runs; where the
first form has payload, behind START or ATTACHED, so has this one, bare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qmigd.channels.secured import Secured
from qmigd.channels.tls import TlsSession
from qmigd.errors import ProtocolError
from qmigd.wire.inband import OPENING, Framing, frame

__all__ = ["InBand"]


class InBand:
    """One connection's handshake in its in-band form."""

    def __init__(self, inner: Secured, *, server: bool) -> None:
        """
        :param inner: the same connection's handshake in its first form.
        :param server: this side accepted the connection.
        """
        self._inner = inner
        self._server = server
        self._framing = Framing(by_source=server)
        self._begun = server

    @property
    def machine(self) -> Any:
        return self._inner.machine

    @property
    def session(self) -> TlsSession | None:
        return self._inner.session

    @property
    def closed(self) -> bool:
        return self._inner.closed

    @property
    def encrypted(self) -> bool:
        return self._inner.encrypted

    @property
    def wanted(self) -> int:
        """How many bytes may be read from the socket now, at most, leaving payload alone."""
        wanted = self._inner.wanted
        if not wanted:
            return 0
        return min(self._framing.left, wanted) or self._framing.wanted

    @property
    def may_read(self) -> int:
        """The same, and much more where no payload can come on this connection."""
        return max(self.wanted, self._inner.may_read) if self._in_bulk else self.wanted

    @property
    def _in_bulk(self) -> bool:
        return self._inner.may_read > self._inner.wanted

    def data_to_send(self) -> bytes:
        """Return what has to be sent, and forget it."""
        if not self._framing.opened:
            return b""  # there is no return path yet
        opening, self._begun = b"" if self._begun else OPENING, True
        return opening + frame(self._inner.data_to_send(), by_source=not self._server)

    def receive(self, data: bytes) -> Sequence[Any]:
        """Take bytes from the peer, cut anywhere; return what they mean."""
        framing, events = self._framing, list[Any]()
        try:
            # Where nothing more is wanted, what is left is payload, or comes too late.
            while data and self._inner.wanted:
                if not framing.left:
                    data = framing.take(data)
                    continue
                size = min(framing.left, len(data))
                if not self._in_bulk:
                    size = min(size, self._inner.wanted)
                framing.left -= size
                events += self._inner.receive(data[:size])
                data = data[size:]
        except ProtocolError as error:
            events += self.machine.refuse(error.code, error.text)
        return events

    def eof(self) -> Sequence[Any]:
        """The peer sends nothing more, or the connection is lost; return what that means."""
        return self._inner.eof()
