"""A CA for the hosts of one site, and the certificates that it signs.

What is made here serves qmigd's own TLS and QEMU's (``tls-creds-x509``) alike.  QEMU looks
at its files more closely than TLS does (``crypto/tlscredsx509.c`` in its source):

==================  ==============================  ======================================
extension           of the CA                       of a host
==================  ==============================  ======================================
basicConstraints    must be there, and say CA       must not say CA
keyUsage, critical  needs keyCertSign               needs digitalSignature and, in most
                                                    versions, keyEncipherment
extendedKeyUsage    is not looked at                serverAuth for the destination,
                                                    clientAuth for the source
==================  ==============================  ======================================

keyEncipherment means nothing for a key on an elliptic curve, and does no harm.  Keys are
ECDSA on P-256, which every TLS library has; a signature takes microseconds.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from qmigd.errors import ArgumentError, ConfigError

from .pem import public_key, read_certificates, read_private_key

__all__ = ["Issued", "checked_names", "load_authority", "new_authority", "new_host"]

#: How long before now a certificate begins: hosts' clocks need not agree to the second.
_EARLIER = timedelta(hours=1)

#: Characters of a common name (RFC 5280: ub-common-name).
_COMMON_NAME = 64
#: Characters of a DNS name and, in the expression, of a label (RFC 1035).
_DNS_NAME = 253
_LABEL = re.compile("[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")

_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
    "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


@dataclass(frozen=True)
class Issued:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def checked_names(given: Sequence[str]) -> tuple[str, ...]:
    """Return DNS names and IP addresses in their usual form, each once.

    :raises ArgumentError: one of them is neither.
    """
    return tuple(dict.fromkeys(_checked(name) for name in given))


def new_authority(now: datetime, days: int) -> Issued:
    """Make a CA that signs hosts' certificates, and no other CA's.

    :param now: an aware datetime.
    :param days: that it is good for.
    :raises ArgumentError: there are no such days.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    # A number in it, so that two CAs can be told apart where one is said not to be known.
    name = _name(f"qmigd CA {serial:040x}"[:17])
    certificate = (
        _begun(name, key, serial, now, _end(now, days))
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign"), critical=True)
        .sign(key, SHA256())
    )
    return Issued(certificate, key)


def new_host(authority: Issued, names: Sequence[str], now: datetime, days: int) -> Issued:
    """Make a host's certificate, for both of TLS's roles.

    It ends with its CA at the latest.

    :param names: what :func:`checked_names` has returned, at least one.
    :param now: an aware datetime.
    :param days: that it is good for.
    :raises ArgumentError: there are no such days.
    :raises ConfigError: the CA has expired.
    """
    last = authority.certificate.not_valid_after_utc
    if now >= last:
        raise ConfigError(
            f"This CA expired on {last:%Y-%m-%d}, and nothing that it signs now is good; make a "
            f"new one with 'qmigctl pki init'."
        )
    key = ec.generate_private_key(ec.SECP256R1())
    end = min(_end(now, days), last)
    certificate = (
        _begun(_name(names[0][:_COMMON_NAME]), key, x509.random_serial_number(), now, end)
        .issuer_name(authority.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature", "key_encipherment"), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            ),
            critical=False,
        )
        .add_extension(
            x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()),
            critical=False,
        )
        .sign(authority.key, SHA256())
    )
    return Issued(certificate, key)


def load_authority(certificate: Path, key: Path) -> Issued:
    """Read a CA; of several certificates in its file the first is the one that signs.

    :raises ConfigError: a file cannot be used.
    """
    found = read_certificates(certificate, "the CA's certificate")[0]
    private = read_private_key(key, "the CA's key")
    if public_key(private) != public_key(found):
        raise ConfigError(f"The key {key} is not the one of the CA's certificate {certificate}.")
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"The CA's key {key} was not made by 'qmigctl pki init'.")
    return Issued(found, private)


def _checked(name: str) -> str:
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        address = None
    if address is not None:
        if address.is_unspecified or "%" in name:
            raise ArgumentError(
                f"'{name}' is not an address that one host could be known by everywhere."
            )
        return str(address)
    plain = name.removesuffix(".").lower()
    if "*" in plain:
        raise ArgumentError(
            f"'{name}' has a wildcard, and whoever had that certificate could pass for any host "
            f"of that domain; make one for each host."
        )
    labels = plain.split(".")
    if (
        len(plain) > _DNS_NAME
        or not all(map(_LABEL.fullmatch, labels))
        or labels[-1].isdecimal()  # "192.0.2", "10": an address with something missing
    ):
        raise ArgumentError(
            f"'{name}' is neither a DNS name nor an IP address; a name that is not ASCII is "
            f"written as DNS has it, 'xn--...'."
        )
    return plain


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _begun(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    serial: int,
    now: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public)
        .serial_number(serial)
        .not_valid_before((now - _EARLIER).replace(microsecond=0))
        .not_valid_after(end.replace(microsecond=0))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _end(now: datetime, days: int) -> datetime:
    try:
        if days < 1:
            raise OverflowError
        return now + timedelta(days)
    except OverflowError:
        raise ArgumentError(f"A certificate cannot be good for {days} days.") from None


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(*usages: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{usage: usage in usages for usage in _USAGES})
