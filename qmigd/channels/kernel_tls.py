"""Kernel TLS: a TLS 1.3 session that user space has begun goes on in the kernel.

The handshake is done in user space.  Then the kernel is given, for each direction, the
key, the iv and the number of the next record (``setsockopt`` with TLS_TX and TLS_RX), and
from there on whoever owns the socket writes and reads plain bytes: a QEMU that was handed
it, or a relay's threads.  On the wire nothing changes, so that the peer may have the same
or may do all of it in user space; it cannot tell.

**Numbers.**  A TLS 1.3 record is encrypted with ``iv xor number`` for its nonce, and its
header for the additional data (RFC 8446, 5.2 and 5.3).  Numbers are not on the wire, and how
many records there have been depends on what the other side's library sends by itself: an
OpenSSL server sends two session tickets before its first data.  So the number of the last
record seen in a direction is found by trying which one decrypts it.  The next one
is the kernel's.

**What has to be true of the socket.**  Not one byte may have been read of the records that
are to be the kernel's: read record by record.  Those that have arrived already are
decrypted as well.  Nothing may be left in user space to be written.

**Records that are no data.**  The kernel hands an alert or a handshake message to a reader
that has room for control data and names the type there.  To a plain ``recv`` it is EIO,
now and for ever after (from 6.14 on EKEYEXPIRED once a KeyUpdate has come).  QEMU has
room, does not look at the type, and would take the record's content for the guest's
stream.  So there must be none:

- tickets come right behind the server's handshake: whoever has read one record of data from
  the server has read them before;
- a KeyUpdate is sent only by an application that asks for it, and neither OpenSSL
  nor a kernel does so by itself.  One key then lasts for the whole channel.  For AES-GCM
  RFC 8446 (5.5) wants a new one after 2**24.5 full records, 388 GiB; a channel that carries
  more keeps less than the margin of 2**-57 that this is to ensure, eight times
  as much 2**-51.  ChaCha20-Poly1305 has no such limit;
- an alert is sent for a record that does not decrypt, which is the end in any case, or as
  close_notify.  **Nobody may send close_notify on a payload channel**: the peer may be a QEMU.

**The end.**  ``shutdown(SHUT_WR)`` and ``close`` send what TCP sends, a FIN, and no
close_notify; the reader gets the end of the stream, just as without TLS, and the other
direction goes on.  Somebody in between can therefore cut a stream off between two records,
unnoticed by TLS.  It is noticed by QEMU, whose stream says itself where it ends, and by
qmigd, whose control connection says how it went.  A stream that is cut off inside a
record ends before that record.

**Faults.**  A record that was changed on its way, or that is under another key or number,
is EBADMSG for the reader, for good; the writer learns of it only when the reader closes.
Two things are unlike TCP, and :func:`lost` is there for the first:

- a connection that is lost is told of once: when a reader has had the error, writes are said
  to have gone well ever after.  A writer that was waiting for room just then has had it
  itself, and may be told that what it wrote has gone, and so may all that it writes next;
- a *non-blocking* writer can cut its own stream: the kernel takes a record and says so
  although only a part of it fits into TCP's buffer; ``shutdown(SHUT_WR)`` or ``close``
  before the rest has gone loses it.  Blocking writes are safe.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from qmigd.errors import LocalError, PeerGone
from qmigd.transports.sockets import tcp_pair

__all__ = ["CIPHERS", "TCP_ULP", "KernelTls", "TrafficKeys", "install", "lost", "probe"]

#: TCP_ULP of linux/tcp.h: the protocol on top of TCP within the kernel, such as "tls".
TCP_ULP: Final = 31

# linux/tls.h, which the socket module does not name either.
_SOL_TLS: Final = 282
_TLS_TX: Final = 1
_TLS_RX: Final = 2
_TLS_1_3: Final = 0x0304

#: Bytes of a nonce, the same for all three ciphers (RFC 8446, 5.3).
_IV_SIZE: Final = 12

#: Bytes in front of every record: type, version, length (RFC 8446, 5.1).
_HEADER_SIZE: Final = 5

#: How many numbers are tried for a record.  A channel's handshake has a few; this many
#: take some 15 ms.
_NUMBERS: Final = 4096

#: Seconds within which a byte must have come through the kernel's loopback.
_PROBE_DEADLINE: Final = 5.0


@dataclass(frozen=True)
class _Cipher:
    """One of TLS 1.3's ciphers, as the kernel wants it.

    :ivar number: TLS_CIPHER_... in linux/tls.h.
    :ivar key_size: in bytes.
    :ivar salt_size: how many bytes of the iv the kernel wants apart, behind the key.
    """

    number: int
    key_size: int
    salt_size: int
    hash: type[hashes.SHA256] | type[hashes.SHA384]
    aead: type[AESGCM] | type[ChaCha20Poly1305]


_CIPHERS: Final = {
    "TLS_AES_128_GCM_SHA256": _Cipher(51, 16, 4, hashes.SHA256, AESGCM),
    "TLS_AES_256_GCM_SHA384": _Cipher(52, 32, 4, hashes.SHA384, AESGCM),
    "TLS_CHACHA20_POLY1305_SHA256": _Cipher(54, 32, 0, hashes.SHA256, ChaCha20Poly1305),
}

#: The ciphers that a kernel may have, by OpenSSL's names.
CIPHERS: Final = tuple(_CIPHERS)


@dataclass(frozen=True)
class KernelTls:
    """What this host's kernel can do.

    :ivar ciphers: those of :data:`CIPHERS` that work.
    :ivar reason: why there is none, half a sentence for people; empty if there is one.
    """

    ciphers: tuple[str, ...]
    reason: str = ""

    def __bool__(self) -> bool:
        return bool(self.ciphers)


@dataclass(frozen=True, repr=False, eq=False)
class TrafficKeys:
    """What a TLS 1.3 session leaves to whoever goes on with it.

    :ivar cipher: OpenSSL's name for it, one of :data:`CIPHERS`.
    :ivar sending: the traffic secret for what this side sends: a client's
        CLIENT_TRAFFIC_SECRET_0, a server's SERVER_TRAFFIC_SECRET_0.
    :ivar receiving: the other one.
    :ivar last_sent: the last record sent under that secret, whole, with its header; empty if
        there was none.
    :ivar last_received: the last record received under the other one.
    """

    cipher: str
    sending: bytearray
    receiving: bytearray
    last_sent: bytes
    last_received: bytes

    def __repr__(self) -> str:
        return "<TrafficKeys>"

    def wipe(self) -> None:
        """Overwrite the secrets; :func:`install` has done so."""
        _wipe(self.sending, self.receiving)


def install(sock: socket.socket, keys: TrafficKeys) -> None:
    """Have the kernel go on with a session, in both directions.

    The secrets in ``keys`` are overwritten, whatever happens.

    :param sock: a connected TCP socket, nothing of which is read or written meanwhile.
    :raises PeerGone: the connection is closed, or one half of it, by whichever side.
    :raises LocalError: it cannot be done.  The socket is in between then, and of no use
        but to be closed.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(keys.wipe)
        cipher = _CIPHERS.get(keys.cipher)
        if cipher is None:
            raise LocalError(f"There is no kernel TLS for the cipher {keys.cipher}.")
        sending = stack.enter_context(_crypto_info(cipher, keys.sending, keys.last_sent, "sent"))
        receiving = stack.enter_context(
            _crypto_info(cipher, keys.receiving, keys.last_received, "received")
        )
        try:
            sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
            sock.setsockopt(_SOL_TLS, _TLS_TX, sending)
            # Last, since it has the kernel look at what has arrived already.
            sock.setsockopt(_SOL_TLS, _TLS_RX, receiving)
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                # TLS is for a connection that is open both ways (tls_init in tls_main.c).
                raise PeerGone(
                    "The connection was closed before its TLS session went to the kernel."
                ) from None
            raise LocalError(
                f"The kernel does not take over a TLS session: {_why(error, keys.cipher)}."
            ) from None


def lost(sock: socket.socket) -> bool:
    """Whether a connection is gone, both ways: what a writer has to ask, since writes do not say.

    A reader's end of stream is a real one as long as it is not.

    :param sock: one that :func:`install` was used on, and that this side has not shut.
    """
    poll = select.poll()
    poll.register(sock, 0)
    return bool(poll.poll(0))


def probe() -> KernelTls:
    """Find out what this host's kernel can do, by trying on loopback connections.

    It takes milliseconds.  Where this process has CAP_NET_ADMIN the kernel loads its module
    ``tls`` by itself.
    """
    works = []
    reason = ""
    for name, cipher in _CIPHERS.items():
        try:
            _try(cipher)
        except OSError as error:
            reason = reason or _why(error, name)
        else:
            works.append(name)
    return KernelTls(tuple(works), "" if works else reason)


def _try(cipher: _Cipher) -> None:
    """Send a byte each way through the kernel, under a key that is for nothing else.

    :raises OSError: it does not work.
    """
    secrets = bytearray(os.urandom(32)), bytearray(os.urandom(32))
    one, other = tcp_pair()
    with one, other:
        for sock, (tx, rx) in ((one, secrets), (other, secrets[::-1])):
            sock.settimeout(_PROBE_DEADLINE)
            sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
            for option, secret in ((_TLS_TX, tx), (_TLS_RX, rx)):
                with _crypto_info(cipher, secret, b"", "") as info:
                    sock.setsockopt(_SOL_TLS, option, info)
        for sender, receiver in ((one, other), (other, one)):
            sender.sendall(b"?")
            if receiver.recv(2) != b"?":
                raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))


def _why(error: OSError, cipher: str) -> str:
    """Return why a step failed, half a sentence for people."""
    if error.errno == errno.ENOENT:
        return "this kernel has no kernel TLS, or its module tls is not loaded (modprobe tls)"
    return f"{error.strerror or error} ({cipher})"


# Keys and numbers.


@contextlib.contextmanager
def _crypto_info(cipher: _Cipher, secret: bytearray, last: bytes, what: str) -> Iterator[bytearray]:
    """Have what the kernel wants to know of a direction, until the block ends.

    That is the structure of the cipher in linux/tls.h, all of whose parts lie side by
    side: version, cipher, iv, key, salt, number of the next record.

    :param last: the last record under this secret; empty if there was none.
    :param what: whether it was sent or received, for the error.
    :raises LocalError: that record is not under this secret.
    """
    key, iv = bytearray(cipher.key_size), bytearray(_IV_SIZE)
    info = bytearray()
    try:
        _expand_label(cipher, secret, b"key", key)
        _expand_label(cipher, secret, b"iv", iv)
        number = _find_number(cipher.aead(key), iv, last) + 1 if last else 0
        # Its size is set before anything secret is in it: growing would leave a copy behind.
        info.extend(bytes(struct.calcsize("=HH") + _IV_SIZE + cipher.key_size + 8))
        struct.pack_into("=HH", info, 0, _TLS_1_3, cipher.number)
        at = 4
        for part in (
            memoryview(iv)[cipher.salt_size :],
            memoryview(key),
            memoryview(iv)[: cipher.salt_size],
        ):
            info[at : at + len(part)] = part
            at += len(part)
        struct.pack_into(">Q", info, at, number)
        yield info
    except InvalidTag:
        raise LocalError(
            f"Kernel TLS cannot go on with a session: the last record {what} is not one of "
            f"the first {_NUMBERS} under its key."
        ) from None
    finally:
        _wipe(key, iv, info)


def _expand_label(cipher: _Cipher, secret: bytearray, label: bytes, into: bytearray) -> None:
    """Derive a key or an iv: HKDF-Expand-Label with an empty context (RFC 8446, 7.1 and 7.3)."""
    label = b"tls13 " + label
    info = struct.pack(">HB", len(into), len(label)) + label + b"\0"
    HKDFExpand(cipher.hash(), len(into), info).derive_into(secret, into)


def _find_number(aead: AESGCM | ChaCha20Poly1305, iv: bytearray, record: bytes) -> int:
    """Return the number of a record.

    :raises InvalidTag: it is not one of the first :data:`_NUMBERS` under this key.
    """
    header, body = record[:_HEADER_SIZE], record[_HEADER_SIZE:]
    start = int.from_bytes(iv, "big")
    for number in range(_NUMBERS):
        nonce = (start ^ number).to_bytes(_IV_SIZE, "big")
        with contextlib.suppress(InvalidTag):
            aead.decrypt(nonce, body, header)
            return number
    raise InvalidTag


def _wipe(*secrets: bytearray) -> None:
    for secret in secrets:
        secret[:] = bytes(len(secret))
