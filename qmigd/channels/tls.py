"""One end of a TLS 1.3 connection, in memory: records in, plain bytes out, and back.

The record layer of a connection that a handshake runs on has to give the socket up again:
to the kernel (:mod:`qmigd.channels.kernel_tls`), or to the threads of a relay
(:class:`TlsSocket`).  So OpenSSL works on buffers here and never on the socket, and
:attr:`TlsSession.wanted` says how many bytes may be read without touching the next record:
what has been read too far could not be given back.

A session judges nothing but certificates, and those by OpenSSL's own verification, which
is never overruled.  Whose certificate it is, and whether that one may, is its owner's
question.
"""

from __future__ import annotations

import socket
import threading
from typing import Any, Final, TypeAlias

from cryptography import x509
from OpenSSL import SSL

from qmigd.channels.credentials import Credentials, peer_certificate
from qmigd.channels.identity import peer_names
from qmigd.channels.kernel_tls import TrafficKeys
from qmigd.channels.tls_reasons import alert_text
from qmigd.errors import QmigdError, RemoteError, TlsError
from qmigd.negotiation.allow import PeerNames

__all__ = ["HANDSHAKE_RECORD", "PeerSocket", "TlsSession", "TlsSocket"]

#: The first byte of a TLS connection: a record of the type handshake (RFC 8446, 5.1).
HANDSHAKE_RECORD: Final = 0x16

#: Bytes before the body of a record: type, version, length (RFC 8446, 5.1).
_HEADER: Final = 5

#: Bytes of plain text in a record at the most (RFC 8446, 5.1).
_PLAIN: Final = 1 << 14

#: Bytes that are encrypted before they are sent.  With 128 KiB or less there are more calls,
#: with more nothing is gained.  This number and the next one come from tests/bench/tls.py.
_BATCH: Final = 256 << 10

#: Bytes of records that are read before they are decrypted, at the most: as many as a relay
#: has room for, so that there are few wake-ups on either side of it.
_READ: Final = 1 << 20

#: Room for the records of a batch: each has a header, and is at most 256 bytes longer than
#: what is in it (RFC 8446, 5.2).
_ROOM: Final = _BATCH + (_BATCH // _PLAIN + 1) * (_HEADER + 256)

#: OpenSSL's names of the traffic secrets in its key log, by whether the server sends with it.
_SECRETS: Final = {b"CLIENT_TRAFFIC_SECRET_0": False, b"SERVER_TRAFFIC_SECRET_0": True}


class _Records:
    """Follows where the records of one direction begin and end.

    :ivar wanted: bytes to the end of the header, or of the record, that has begun.
    :ivar last: the last whole record, if records are kept.
    """

    def __init__(self, keep: bool) -> None:
        self.wanted = _HEADER
        self.last = b""
        self._keep = keep
        self._in_body = False
        self._current = bytearray()

    def feed(self, data: bytes) -> None:
        offset = 0
        while offset < len(data):
            piece = data[offset : offset + self.wanted]
            offset += len(piece)
            self.wanted -= len(piece)
            if self._keep or not self._in_body:
                self._current += piece
            if not self.wanted and not self._in_body:
                self._in_body = True
                self.wanted = int.from_bytes(self._current[3:_HEADER], "big")
            if not self.wanted:
                self._in_body = False
                self.wanted = _HEADER
                self.last = bytes(self._current) if self._keep else b""
                self._current.clear()


class TlsSession:
    """One end of one connection.

    :ivar established: the handshake is done, and the peer's certificate was accepted.
    :ivar keeps_keys: :meth:`take_keys` can be called, once.
    """

    def __init__(self, credentials: Credentials, *, server: bool, keep_keys: bool = False) -> None:
        """
        :param server: this is the side that accepted the connection.
        :param keep_keys: :meth:`take_keys` will be called.
        """
        self.established = False
        self.keeps_keys = keep_keys
        self._server = server
        self._refusal = ""
        self._secrets: dict[bool, bytearray] = {}
        context = credentials.context(
            server=server,
            on_refused=self._refused,
            on_keys=self._key_line if keep_keys else None,
        )
        self._connection = SSL.Connection(context, None)
        if server:
            self._connection.set_accept_state()
        else:
            self._connection.set_connect_state()
        self._in = _Records(keep_keys)
        self._out = _Records(keep_keys)
        self._waiting = bytearray()
        if not server:
            self._advance()

    # bytes

    @property
    def wanted(self) -> int:
        """How many bytes may be read from the socket without touching the next record."""
        return self._in.wanted

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the peer, cut anywhere; return the plain bytes that they bring.

        :raises RemoteError: the peer ended it by an alert, with what that means.
        :raises TlsError: this side did, with the reason; an alert is to be sent.
        """
        self._in.feed(data)
        self._connection.bio_write(data)
        if not self.established:
            self._advance()
        plain = bytearray()
        while self.established:
            try:
                plain += self._connection.recv(_PLAIN)
            except (SSL.WantReadError, SSL.ZeroReturnError):
                break
            except SSL.Error as error:
                raise self._error(error) from None
        return bytes(plain)

    def send(self, data: bytes) -> None:
        """Encrypt; before the handshake is done the bytes wait for that."""
        self._waiting += data
        if self.established:
            with memoryview(bytes(self._waiting)) as view:
                self._connection.sendall(view)
            self._waiting.clear()

    def data_to_send(self) -> bytes:
        """Return the bytes for the peer, and forget them."""
        records = b""
        while True:
            try:
                more = self._connection.bio_read(_ROOM)
            except SSL.WantReadError:
                break
            # Hardly ever more than once, so that nothing is copied here.
            records = records + more if records else more
            if len(more) < _ROOM:
                break
        if self.keeps_keys:
            self._out.feed(records)
        return records

    # the handshake

    def _advance(self) -> None:
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return
        except SSL.Error as error:
            raise self._error(error) from None
        self.established = True
        if self._waiting:
            self.send(b"")

    def _refused(self, reason: str) -> None:
        self._refusal = self._refusal or reason

    def _error(self, error: SSL.Error) -> QmigdError:
        if self._refusal:
            return TlsError(f"TLS: the peer is refused: {self._refusal}")
        text, remote = alert_text(error)
        text = f"TLS: {text}"
        return RemoteError(text, code=TlsError.code) if remote else TlsError(text)

    # who it is with

    @property
    def certificate(self) -> x509.Certificate:
        """The peer's certificate, once ``established``."""
        return peer_certificate(self._connection)

    @property
    def peer(self) -> PeerNames:
        """Whom that certificate is for.

        :raises LocalError: its names cannot be read.
        """
        return peer_names(self.certificate)

    @property
    def cipher(self) -> str:
        """The cipher suite's name in OpenSSL, once ``established``."""
        return self._connection.get_cipher_name() or ""

    # what the kernel needs

    def _key_line(self, line: bytes) -> None:
        label, _, rest = line.partition(b" ")
        by_server = _SECRETS.get(label)
        if by_server is not None:
            self._secrets[by_server] = bytearray.fromhex(rest.rpartition(b" ")[2].decode())

    def forget_keys(self) -> None:
        """They will not be asked for."""
        self.keeps_keys = False
        for secret in self._secrets.values():
            secret[:] = bytes(len(secret))
        self._secrets.clear()

    def take_keys(self) -> TrafficKeys:
        """Return what this session encrypts and decrypts with, and forget it.

        Nothing may have been read beyond the last record, and nothing may be left to
        send.

        :raises TlsError: the session was not told to keep them, or is not established.
        """
        secrets, self._secrets = self._secrets, {}
        if not self.established or len(secrets) < len(_SECRETS):
            raise TlsError("This TLS session has no keys to give away.")
        return TrafficKeys(
            cipher=self.cipher,
            sending=secrets[self._server],
            receiving=secrets[not self._server],
            last_sent=self._out.last,
            last_received=self._in.last,
        )


class TlsSocket:
    """A connected socket with the session that was begun on it, for a relay's threads.

    One thread may send while another receives.  OpenSSL's session is not made for that:
    they take turns in it, which costs nothing as long as the bulk goes one way.

    The end of a direction is the end of the TCP stream, with no alert before it: on the
    other side QEMU itself may own the socket, and would take an alert for data.  QEMU's
    stream knows where it ends, so that one cut short on its way does not pass for whole.
    """

    def __init__(self, sock: socket.socket, session: TlsSession) -> None:
        """:param sock: nothing of it has been read beyond what the session was given."""
        self._sock = sock
        self._session = session
        self._connection = session._connection
        self._turn = threading.Lock()
        self._records = memoryview(bytearray(_READ))

    @property
    def family(self) -> int:
        return self._sock.family

    def recv_into(self, buffer: Any) -> int:
        """Wait for plain bytes, and take what there is of them; 0 is the end.

        :param buffer: of more than two records (32 KiB).
        :raises OSError: the socket failed, or the peer's records are no good.
        """
        view = memoryview(buffer)
        while True:
            if taken := self._decrypt(view):
                return taken
            # What there is, part of a record, and this have room in the buffer: nothing is
            # left for a read of its own.
            size = self._sock.recv_into(self._records, min(_READ, len(view) - 2 * _PLAIN))
            if not size:
                return 0
            with self._turn:
                self._connection.bio_write(self._records[:size])

    def _decrypt(self, view: memoryview) -> int:
        receive = self._connection.recv_into
        taken, last = 0, len(view) - _PLAIN
        with self._turn:
            try:
                while taken <= last:
                    taken += receive(view[taken : taken + _PLAIN])
            except (SSL.WantReadError, SSL.ZeroReturnError):
                pass
            except SSL.Error as error:
                raise OSError(alert_text(error)[0]) from None
        return taken

    def sendall(self, data: Any) -> None:
        """Send all of it.

        :raises OSError: the socket failed.
        """
        view = memoryview(data)
        for start in range(0, len(view), _BATCH):
            with self._turn:
                try:
                    self._connection.sendall(view[start : start + _BATCH])
                except SSL.Error as error:
                    raise OSError(alert_text(error)[0]) from None
                records = self._session.data_to_send()
            self._sock.sendall(records)

    def setblocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        self._sock.setsockopt(level, option, value)

    def shutdown(self, how: int) -> None:
        self._sock.shutdown(how)

    def close(self) -> None:
        self._sock.close()


#: What a relay has towards the peer: plain bytes on this side of it.
PeerSocket: TypeAlias = socket.socket | TlsSocket
