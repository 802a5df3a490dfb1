"""The certificate of this host, its key, and the CAs that it trusts.

One certificate serves in both roles: a destination is TLS's server and a source its
client, each shows its certificate, and each checks the other's.  :meth:`Credentials.load`
finds all that is wrong with the files when the daemon starts, and not when the first
guest is to be moved; the last of its checks is a handshake with itself.

What :meth:`Credentials.context` makes is for one connection: TLS 1.3 and nothing older,
both certificates demanded, no session that could be taken up again.  Who the peer is, and
whether it is the one that was asked for, is the business of
:mod:`qmigd.channels.identity` once the handshake is through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import OpenSSL
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL, crypto

from qmigd.errors import ConfigError, TlsError

from .identity import peer_names
from .pem import fingerprint, public_key, read_certificates, read_private_key
from .tls_reasons import alert_text, moment, refusal, subject

__all__ = ["WARN_BEFORE", "CredentialStore", "Credentials", "peer_certificate"]

#: How long before the end of a certificate there are warnings.
WARN_BEFORE = timedelta(days=30)

#: The fastest first: AES, which nearly every hypervisor's CPU has instructions for, at 12.8
#: GiB/s with 128 bits and 11.7 with 256, and ChaCha20 at 4.1 (records of 16 KiB, one core).
_CIPHERS = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"

#: SSL_MODE_ENABLE_PARTIAL_WRITE of openssl/ssl.h, which pyOpenSSL sets and does not name.
_PARTIAL_WRITE = 1

#: Since 24.3 pyOpenSSL takes cryptography's objects, and warns of its own.
_TAKES_CRYPTOGRAPHY = tuple(map(int, OpenSSL.__version__.split(".")[:2])) >= (24, 3)


@dataclass(frozen=True)
class Credentials:
    """What this host proves itself with, and whom it believes.

    :ivar names: DNS names and IP addresses that the certificate is for.
    :ivar expires: when it ends.
    :ivar fingerprint: its SHA-256, as ``openssl x509 -fingerprint -sha256`` shows it.
    :ivar chain: the certificate, those in between, and the CA that is trusted.
    """

    names: tuple[str, ...]
    expires: datetime
    fingerprint: str
    chain: tuple[x509.Certificate, ...] = field(repr=False)
    _path: Path = field(repr=False)
    _key: Any = field(repr=False)
    _presented: tuple[x509.Certificate, ...] = field(repr=False)
    _trusted: tuple[crypto.X509, ...] = field(repr=False)

    @classmethod
    def load(cls, certificate: Path, key: Path, authority: Path) -> Credentials:
        """Read and check the files that ``[tls]`` names.

        :param certificate: PEM; those of CAs in between may follow it.
        :param key: PEM, not encrypted, readable by its owner alone.
        :param authority: PEM, the CAs that are trusted.
        :raises ConfigError: something is wrong with one of them.
        """
        presented = read_certificates(certificate, "'certificate' in [tls]")
        own = presented[0]
        private = read_private_key(key, "'key' in [tls]")
        if public_key(private) != public_key(own):
            raise ConfigError(
                f"The key {key} is not the one of the certificate {certificate}; 'certificate' "
                f"and 'key' in [tls] have to be made together."
            )
        names = _check(own, certificate)
        trusted = _authorities(authority)
        self = cls(
            names=names,
            expires=own.not_valid_after_utc,
            fingerprint=fingerprint(own),
            chain=_verified(presented, trusted, certificate, authority),
            _path=certificate,
            _key=private,
            _presented=tuple(presented),
            _trusted=tuple(map(crypto.X509.from_cryptography, trusted)),
        )
        self._rehearse()
        return self

    def warnings(self, now: datetime) -> list[str]:
        """Say which of the certificates end soon, from :data:`WARN_BEFORE` on.

        :param now: an aware datetime.
        """
        said = []
        for number, one in enumerate(self.chain):
            if now < one.not_valid_after_utc - WARN_BEFORE:
                continue
            end = _end(one.not_valid_after_utc, now)
            if number == 0:
                said.append(
                    f"the certificate {self._path} {end}; make a new one with 'qmigctl pki host "
                    f"--force {' '.join(self.names)}', put it there, and send the daemon SIGHUP"
                )
            else:
                said.append(
                    f"the CA's certificate ({subject(one)}), which {self._path} hangs on, {end}; "
                    f"no certificate of that CA is good any more then: make a new CA, and new "
                    f"certificates with it"
                )
        return said

    def context(
        self,
        *,
        server: bool,
        on_refused: Callable[[str], None],
        on_keys: Callable[[bytes], None] | None = None,
    ) -> SSL.Context:
        """Make what a connection needs; every connection has to have one of its own.

        :param server: this side waits for the other's first message.
        :param on_refused: gets half a sentence when the peer's certificate is refused; the
            handshake then fails.
        :param on_keys: gets the traffic secrets as they are made, as lines of an
            ``SSLKEYLOGFILE``; they are as secret as the key.
        """
        context = SSL.Context(SSL.TLS_SERVER_METHOD if server else SSL.TLS_CLIENT_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_max_proto_version(SSL.TLS1_3_VERSION)
        # Since pyOpenSSL 25.2; before it is OpenSSL's own order, in which AES-256 is first.
        if hasattr(context, "set_tls13_ciphersuites"):
            context.set_tls13_ciphersuites(_CIPHERS)
        # Since 25.2 as well; before it OpenSSL comes back to Python after each record.
        if hasattr(context, "clear_mode"):
            context.clear_mode(_PARTIAL_WRITE)
        # Two tickets are sent all the same, but lead to no session without a cache.
        context.set_options(SSL.OP_NO_TICKET | SSL.OP_CIPHER_SERVER_PREFERENCE)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.use_certificate(_native(self._presented[0]))
        for one in self._presented[1:]:
            context.add_extra_chain_cert(_native(one))
        context.use_privatekey(_native(self._key))
        store = context.get_cert_store()
        assert store is not None
        _fill(store, self._trusted)

        def check(
            connection: SSL.Connection, certificate: crypto.X509, number: int, depth: int, ok: int
        ) -> bool:
            if not ok:
                on_refused(_refusal(number, depth, certificate))
            return bool(ok)

        # The purpose, serverAuth here and clientAuth there, is part of OpenSSL's check.
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, check)
        if on_keys is not None:
            context.set_keylog_callback(lambda connection, line: on_keys(line))
        return context

    def _rehearse(self) -> None:
        """Shake hands with itself, so that whatever else is wrong is found now.

        That is: a kind of key or signature that TLS 1.3 does not know, a key that is too
        short, a purpose that is missing in the CA's certificate.

        :raises ConfigError: OpenSSL does not like it.
        """
        refused: list[str] = []
        try:
            ends = [
                SSL.Connection(self.context(server=server, on_refused=refused.append))
                for server in (False, True)
            ]
            ends[0].set_connect_state()
            ends[1].set_accept_state()
            _talk(*ends)
        except SSL.Error as error:
            reason = refused[0] if refused else alert_text(error)[0]
            raise ConfigError(
                f"The certificate {self._path} cannot be used, as a handshake with itself "
                f"shows: {reason}. 'qmigctl pki host' makes one that can."
            ) from None


class CredentialStore:
    """The credentials that new connections use; those that there are keep what they have.

    :ivar current: the last that were good.
    """

    def __init__(self, certificate: Path, key: Path, authority: Path) -> None:
        """Read them for the first time.

        :raises ConfigError: they are not good.
        """
        self._files = certificate, key, authority
        self.current = Credentials.load(*self._files)

    def reload(self) -> Credentials:
        """Read the files anew.

        :raises ConfigError: they are not good; then :attr:`current` stays.
        """
        self.current = Credentials.load(*self._files)
        return self.current


def peer_certificate(connection: SSL.Connection) -> x509.Certificate:
    """Return the certificate that the peer has shown, once the handshake is through.

    :raises TlsError: there is none.
    """
    found = connection.get_peer_certificate()
    if found is None:
        raise TlsError("the peer has not presented a certificate yet")
    return found.to_cryptography()


def _talk(client: SSL.Connection, server: SSL.Connection) -> None:
    """Carry two ends through the handshake.

    :raises SSL.Error: it failed.
    """
    for _ in range(4):
        for one, other in ((client, server), (server, client)):
            with contextlib.suppress(SSL.WantReadError):
                one.do_handshake()
            with contextlib.suppress(SSL.WantReadError):
                other.bio_write(one.bio_read(65536))


def _native(thing: Any) -> Any:
    """Return a certificate or a key in the form that this pyOpenSSL takes."""
    if _TAKES_CRYPTOGRAPHY:
        return thing
    if isinstance(thing, x509.Certificate):
        return crypto.X509.from_cryptography(thing)
    return crypto.PKey.from_cryptography_key(thing)


def _check(own: x509.Certificate, path: Path) -> tuple[str, ...]:
    """Check what can be said of the certificate by itself; returns its names."""
    now = datetime.now(UTC)
    again = "make a new one with 'qmigctl pki host'"
    if now > own.not_valid_after_utc:
        raise ConfigError(
            f"The certificate {path} expired on {moment(own.not_valid_after_utc)}; {again}."
        )
    if now < own.not_valid_before_utc:
        raise ConfigError(
            f"The certificate {path} is not valid before {moment(own.not_valid_before_utc)}, and "
            f"by the clock of this host it is {moment(now)}; if that is right, {again}."
        )
    try:
        names = tuple(peer_names(own))
        purposes = _extension(own, x509.ExtendedKeyUsage)
        usage = _extension(own, x509.KeyUsage)
    except (TlsError, ValueError, x509.DuplicateExtension):
        raise ConfigError(f"The certificate {path} has broken extensions; {again}.") from None
    if not names:
        raise ConfigError(
            f"The certificate {path} has no DNS name and no IP address in its subjectAltName, so "
            f"that no peer could know it; {again}."
        )
    wanted = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    if purposes is not None and not wanted <= set(purposes):
        raise ConfigError(
            f"The certificate {path} is not for both of TLS's roles: a host that takes guests is "
            f"a server and one that sends them a client. It needs serverAuth and clientAuth in "
            f"its extendedKeyUsage; {again}."
        )
    if usage is not None and not usage.digital_signature:
        raise ConfigError(
            f"The certificate {path} has a keyUsage without digitalSignature, which TLS 1.3 "
            f"needs; {again}."
        )
    return names


def _extension(certificate: x509.Certificate, kind: Any) -> Any:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _authorities(path: Path) -> list[x509.Certificate]:
    found = read_certificates(path, "'ca' in [tls]")
    for one in found:
        try:
            constraints = _extension(one, x509.BasicConstraints)
        except (ValueError, x509.DuplicateExtension):
            constraints = None
        if constraints is None or not constraints.ca:
            raise ConfigError(
                f"{path} ('ca' in [tls]) has a certificate in it that is not one of a CA: "
                f"{subject(one)}. It must have those of the CAs that sign hosts' certificates, "
                f"and nothing else."
            )
    return found


def _verified(
    presented: Sequence[x509.Certificate],
    trusted: Sequence[x509.Certificate],
    path: Path,
    authority: Path,
) -> tuple[x509.Certificate, ...]:
    """Return the chain from the certificate to a CA that is trusted."""
    store = crypto.X509Store()
    _fill(store, [crypto.X509.from_cryptography(one) for one in trusted])
    own, *between = map(crypto.X509.from_cryptography, presented)
    try:
        chain = crypto.X509StoreContext(store, own, between).get_verified_chain()
    except crypto.X509StoreContextError as error:
        number, depth, _ = error.errors
        reason = _refusal(number, depth, error.certificate)
        raise ConfigError(
            f"The certificate {path} does not go with {authority} ('ca' in [tls]): {reason}."
        ) from None
    return tuple(one.to_cryptography() for one in chain)


def _fill(store: crypto.X509Store, trusted: Sequence[crypto.X509]) -> None:
    for one in trusted:
        store.add_cert(one)
    # A CA that is trusted need not be a root: so it is with QEMU's own TLS as well.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)


def _refusal(number: int, depth: int, certificate: crypto.X509) -> str:
    try:
        return refusal(number, depth, certificate.to_cryptography())
    except Exception:  # a stranger's certificate can be malformed in every way there is
        return f"its certificate is malformed, or does not pass OpenSSL's check ({number})"


def _end(end: datetime, now: datetime) -> str:
    if now >= end:
        return f"ended on {moment(end)}"
    days = (end - now).days
    left = f"{days} days" if days > 1 else "one day" if days else "less than a day"
    return f"ends in {left}, on {moment(end)}"
