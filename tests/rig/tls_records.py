"""A TLS 1.3 session in user space, read record by record, that can go on in the kernel.

It is pyOpenSSL's, over memory BIOs, and independent of qmigd's own on purpose.
"""

from __future__ import annotations

import datetime
import functools
import socket
from concurrent.futures import ThreadPoolExecutor

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from OpenSSL import SSL

from qmigd.channels.kernel_tls import TrafficKeys

__all__ = ["Session", "read_exactly", "read_record", "sessions"]

_HEADER_SIZE = 5


@functools.cache
def _identity() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    """Return a key and a certificate that nobody checks."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    return key, builder.sign(key, hashes.SHA256())


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """Return that many bytes.

    :raises EOFError: there are fewer.
    """
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError(f"{len(data)} of {size} bytes have come.")
        data += more
    return data


def read_record(sock: socket.socket) -> bytes:
    """Return the next TLS record, whole, and read nothing of what is behind it."""
    header = read_exactly(sock, _HEADER_SIZE)
    return header + read_exactly(sock, int.from_bytes(header[3:], "big"))


class Session:
    """One end of a session.

    :ivar sock: the socket under it.
    """

    def __init__(self, sock: socket.socket, *, server: bool, cipher: str) -> None:
        """Prepare; :func:`sessions` makes two ends and joins them."""
        self.sock = sock
        self._server = server
        self._cipher = cipher
        self._secrets: dict[str, bytearray] = {}
        self._last_sent = b""
        self._last_received = b""
        context = SSL.Context(SSL.TLS_SERVER_METHOD if server else SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_tls13_ciphersuites(cipher.encode())
        if server:
            key, certificate = _identity()
            context.use_privatekey(key)
            context.use_certificate(certificate)
        context.set_keylog_callback(self._on_key)
        self._tls = SSL.Connection(context)
        (self._tls.set_accept_state if server else self._tls.set_connect_state)()

    def _on_key(self, _connection: SSL.Connection, line: bytes) -> None:
        name, _random, secret = line.decode().split()
        self._secrets[name] = bytearray.fromhex(secret)

    def handshake(self) -> None:
        """Do this end's part of the handshake, until it is done."""
        while True:
            try:
                self._tls.do_handshake()
            except SSL.WantReadError:
                self._flush()
                self._tls.bio_write(read_record(self.sock))
            else:
                break
        self._flush()
        if not self._server:
            # That was under another key; behind a server's handshake there are tickets.
            self._last_sent = b""

    def send(self, data: bytes) -> None:
        """Send data from user space."""
        view = memoryview(data)
        while view:
            view = view[self._tls.send(view[: 1 << 14]) :]
            self._flush()

    def receive(self) -> bytes:
        """Return the next data, read in user space."""
        while True:
            try:
                return self._tls.recv(1 << 14)
            except SSL.WantReadError:
                self._last_received = read_record(self.sock)
                self._tls.bio_write(self._last_received)

    def close_notify(self) -> None:
        """Send what ends a session as TLS has it."""
        self._tls.shutdown()
        self._flush()

    def keys(self) -> TrafficKeys:
        """Return what the kernel needs to go on; not to be used in user space any more."""
        client, server = (
            self._secrets[f"{role}_TRAFFIC_SECRET_0"][:] for role in ("CLIENT", "SERVER")
        )
        sending, receiving = (server, client) if self._server else (client, server)
        return TrafficKeys(self._cipher, sending, receiving, self._last_sent, self._last_received)

    def _flush(self) -> None:
        """Send the records that OpenSSL has made, and remember the last one."""
        data = b""
        while True:
            try:
                data += self._tls.bio_read(1 << 16)
            except SSL.WantReadError:
                break
        self.sock.sendall(data)
        while data:
            size = _HEADER_SIZE + int.from_bytes(data[3:_HEADER_SIZE], "big")
            self._last_sent, data = data[:size], data[size:]


def sessions(
    cipher: str, client: socket.socket, server: socket.socket, *, greet: bool = True
) -> tuple[Session, Session]:
    """Return a client and a server between which the handshake is done.

    :param greet: they have also said something to each other: so the server's tickets
        have been read.
    """
    ends = (
        Session(client, server=False, cipher=cipher),
        Session(server, server=True, cipher=cipher),
    )
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(ends[1].handshake)
        ends[0].handshake()
        done.result()
    if greet:
        for one, other in (ends, ends[::-1]):
            one.send(b"hello")
            assert other.receive() == b"hello"
    return ends
