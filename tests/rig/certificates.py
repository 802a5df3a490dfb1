"""Certificates for tests: good ones, and bad ones of every kind.

Made with ``cryptography`` alone and not with what ``qmigctl pki`` uses, so that qmigd is
not only tested with what it has made itself.  Keys are ECDSA on P-256: a quarter of a
millisecond for a certificate.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from qmigd.channels.credentials import Credentials, CredentialStore

__all__ = ["CLIENT", "SERVER", "Authority", "Files", "key_usage", "private_pem", "write"]

SERVER = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH

_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment",
    "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
)  # fmt: skip


@dataclass(frozen=True)
class Files:
    """A host's three files, as ``[tls]`` names them."""

    certificate: Path
    key: Path
    authority: Path

    def load(self) -> Credentials:
        """Read them as the daemon does."""
        return Credentials.load(self.certificate, self.key, self.authority)

    def store(self) -> CredentialStore:
        """Read them as the daemon does, to be read anew."""
        return CredentialStore(self.certificate, self.key, self.authority)

    def table(self) -> dict[str, str]:
        """Return the table ``[tls]``."""
        return {
            "certificate": str(self.certificate),
            "key": str(self.key),
            "ca": str(self.authority),
        }

    def trusting(self, *others: Authority) -> Files:
        """Return the same with other CAs trusted."""
        path = self.certificate.with_name(f"{self.certificate.stem}-trusts.pem")
        path.write_bytes(b"".join(other.path.read_bytes() for other in others))
        return replace(self, authority=path)


class Authority:
    """A CA in a directory, which is made.

    :ivar path: its certificate's file.
    """

    def __init__(
        self,
        directory: str | Path,
        name: str = "Test CA",
        *,
        days: tuple[float, float] = (-1, 3650),
        parent: Authority | None = None,
        ca: bool = True,
    ) -> None:
        """Make it.

        :param days: from when to when it is valid, in days from now.
        :param parent: the CA that signs it; by default it signs itself.
        :param ca: whether its certificate says that it is one.
        """
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(name)
        builder = _begun(self.name, self.key.public_key(), days).add_extension(
            x509.BasicConstraints(ca=ca, path_length=None), critical=True
        )
        signer = parent or self
        self.certificate = builder.issuer_name(signer.name).sign(signer.key, SHA256())
        self.path = self.directory / "ca-cert.pem"
        self.path.write_bytes(_pem(self.certificate))
        self._chain: list[x509.Certificate] = []
        if parent is not None:
            self._chain = [self.certificate, *parent._chain]
        self._count = 0

    def host(
        self,
        *names: str,
        days: tuple[float, float] = (-1, 365),
        purposes: Sequence[ObjectIdentifier] | None = (SERVER, CLIENT),
        usages: Sequence[str] | None = ("digital_signature", "key_encipherment"),
        others: Sequence[x509.GeneralName] = (),
        key: Any = None,
        algorithm: Any = None,
    ) -> Files:
        """Make a host's certificate and key.

        :param names: DNS names and IP addresses.
        :param days: from when to when it is valid, in days from now.
        :param purposes: its extendedKeyUsage; ``None``: it has no such extension.
        :param usages: its keyUsage; ``None``: it has no such extension.
        :param others: further names in its subjectAltName.
        :param key: instead of a new key on P-256.
        :param algorithm: the hash to sign with, instead of SHA-256.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        builder = _begun(_name(names[0] if names else "nobody"), key.public_key(), days)
        builder = builder.issuer_name(self.name)
        if alternatives := [*map(_general_name, names), *others]:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        if purposes is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        if usages is not None:
            builder = builder.add_extension(key_usage(*usages), critical=True)
        certificate = builder.sign(self.key, algorithm or SHA256())
        self._count += 1
        stem = f"host{self._count}"
        return Files(
            write(
                self.directory / f"{stem}-cert.pem",
                b"".join(map(_pem, [certificate, *self._chain])),
            ),
            write(self.directory / f"{stem}-key.pem", private_pem(key)),
            self.path,
        )

    def expired(self, *names: str) -> Files:
        """Make a certificate that ended yesterday."""
        return self.host(*names, days=(-30, -1))

    def not_yet_valid(self, *names: str) -> Files:
        """Make a certificate that begins tomorrow."""
        return self.host(*names, days=(1, 30))


def key_usage(*usages: str) -> x509.KeyUsage:
    """Return the extension with these usages, by ``cryptography``'s names."""
    return x509.KeyUsage(**{usage: usage in usages for usage in _USAGES})


def private_pem(key: Any, encryption: Any = None) -> bytes:
    """Return a private key as PEM."""
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption()))


def write(path: Path, data: bytes) -> Path:
    """Write a file that its owner alone can read, and return its path."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    return path


def _begun(subject: x509.Name, key: Any, days: tuple[float, float]) -> x509.CertificateBuilder:
    now = datetime.now(UTC).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days[0]))
        .not_valid_after(now + timedelta(days[1]))
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)
