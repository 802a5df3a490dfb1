"""A handshake machine and the TLS that its connection goes over to: bytes in, events out.

::

    the socket  <-- bytes -->  Secured  <-- bytes, in clear -->  the machine
                                  |
                               TlsSession

To whoever holds the connection it looks like the machine itself.  TLS begins where the
machine says so (:attr:`qmigd.handshake.exchange.Exchange.upgrade`), or, on the side that
accepted the connection, with a first byte that only TLS can begin with: so begin the
payload channels of a migration in TLS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qmigd.channels.credentials import Credentials
from qmigd.channels.tls import HANDSHAKE_RECORD, TlsSession
from qmigd.errors import LocalError, QmigdError, RemoteError, TlsError

__all__ = ["Secured", "TlsSide"]


@dataclass(frozen=True)
class TlsSide:
    """What this side does where a connection goes over to TLS.

    :ivar credentials: this host's.
    :ivar server: it accepted the connection.
    :ivar judge: gets the session once the peer's certificate was found good, and raises
        :class:`~qmigd.errors.LocalError` where it is not the right one.
    :ivar keep_keys: the keys of a payload channel may go to the kernel.
    """

    credentials: Credentials
    server: bool
    judge: Callable[[TlsSession], None]
    keep_keys: bool = False


class Secured:
    """One connection's handshake, in clear and in TLS.

    :ivar machine: what speaks and is spoken to.
    :ivar session: the TLS on the connection, once it has begun.
    """

    def __init__(self, machine: Any, tls: TlsSide | None) -> None:
        """
        :param machine: of :mod:`qmigd.handshake`.
        :param tls: ``None``: the machine will not ask for TLS.
        """
        self.session: TlsSession | None = None
        self.machine = machine
        self._tls = tls
        self._begun = False
        self._payload = False
        self._judged = False

    @property
    def closed(self) -> bool:
        return bool(self.machine.closed)

    @property
    def encrypted(self) -> bool:
        """Whether all that goes over the connection now is in TLS, with a peer found good."""
        return self._judged

    @property
    def wanted(self) -> int:
        """How many bytes may be read from the socket now, at most, leaving payload alone."""
        return self._allowed(self.machine.wanted)

    @property
    def may_read(self) -> int:
        """The same, and much more where no payload can come on this connection."""
        return self._allowed(self.machine.may_read)

    def _allowed(self, wanted: int) -> int:
        if self.session is None or not wanted:
            return wanted
        # Inside, the machine counts other bytes than those of the socket.
        exact = wanted == self.machine.wanted
        return self.session.wanted if exact else max(wanted, self.session.wanted)

    def data_to_send(self) -> bytes:
        """Return what has to be sent, and forget it."""
        data: bytes = self.machine.data_to_send()
        if self.session is None:
            if not self.machine.upgrade:
                return data
            return data + self._begin().data_to_send()
        if data:
            self.session.send(data)
        return self.session.data_to_send()

    def receive(self, data: bytes) -> Sequence[Any]:
        """Take bytes from the peer, cut anywhere; return what they mean."""
        tls = self._tls
        if tls is None:
            self._begun = True
            return list(self.machine.receive(data))
        events: list[Any] = []
        if not self._begun and data:
            self._begun = True
            if tls.server and data[0] == HANDSHAKE_RECORD:
                self._begin()
                self._payload = True
        while data and self.session is None:
            # Not a byte beyond the item, for TLS may begin behind it.
            size = self.machine.wanted or len(data)
            events += self.machine.receive(data[:size])
            data = data[size:]
            if self.machine.upgrade:
                self._begin()
        if data and self.session is not None:
            events += self._decrypt(self.session, data)
        return events

    def eof(self) -> Sequence[Any]:
        """The peer sends nothing more, or the connection is lost; return what that means."""
        if self.session is not None and not self.session.established:
            return list(
                self.machine.broken(
                    TlsError.code,
                    "The peer closed the connection in the middle of the TLS handshake; its "
                    "log may say why.",
                    False,
                )
            )
        return list(self.machine.eof())

    def _begin(self) -> TlsSession:
        tls = self._tls
        assert tls is not None  # or the machine would not have asked for it
        self.session = TlsSession(tls.credentials, server=tls.server, keep_keys=tls.keep_keys)
        return self.session

    def _decrypt(self, session: TlsSession, data: bytes) -> Sequence[Any]:
        assert self._tls is not None
        try:
            plain = session.receive(data)
        except QmigdError as error:
            return list(self.machine.broken(error.code, error.text, isinstance(error, RemoteError)))
        if session.established and not self._judged:
            try:
                self._tls.judge(session)
            except LocalError as error:
                return list(self.machine.refuse(error.code, error.text))
            self._judged = True
            if self._tls.server and not self._payload:
                session.forget_keys()
            self.machine.secured()
        return list(self.machine.receive(plain)) if plain else []
