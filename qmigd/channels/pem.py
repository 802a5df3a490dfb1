"""Certificates and keys in files, as PEM (RFC 7468)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from qmigd.errors import ConfigError

__all__ = ["fingerprint", "public_key", "read_certificates", "read_private_key"]

#: Of a mode: rights of the group and of others.
_OTHERS = 0o077


def read_certificates(path: Path, what: str) -> list[x509.Certificate]:
    """Return the certificates in a file, at least one.

    :param what: the file is, for errors: ``"'ca' in [tls]"``.
    :raises ConfigError: it cannot be read, or has none.
    """
    try:
        return x509.load_pem_x509_certificates(_read(path, what))
    except (ValueError, x509.InvalidVersion):
        raise ConfigError(
            f"{path} ({what}) has no certificate in PEM in it, or a damaged one: "
            f"'-----BEGIN CERTIFICATE-----' and what follows is needed."
        ) from None


def read_private_key(path: Path, what: str) -> Any:
    """Return the private key in a file that its owner alone can read.

    :param what: the file is, for errors.
    :raises ConfigError: it cannot be read, can be read by others, is encrypted, or has none.
    """
    data = _read(path, what, private=True)
    try:
        return load_pem_private_key(data, password=None)
    except TypeError:
        raise ConfigError(
            f"The key {path} ({what}) is encrypted, and nobody is asked for a password; decrypt "
            f"it with 'openssl pkey' and protect it by its mode, 600."
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(
            f"{path} ({what}) has no private key in PEM in it, or a damaged one: "
            f"'-----BEGIN PRIVATE KEY-----' and what follows is needed."
        ) from None


def public_key(owner: Any) -> bytes:
    """Return the public key of a private key or of a certificate: the same for a pair."""
    return bytes(owner.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def fingerprint(certificate: x509.Certificate) -> str:
    """Return a certificate's SHA-256, as ``openssl x509 -fingerprint -sha256`` shows it."""
    return certificate.fingerprint(SHA256()).hex(":").upper()


def _read(path: Path, what: str, *, private: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if private and mode & _OTHERS:
                raise ConfigError(
                    f"The key {path} ({what}) can be read or written by others than its owner "
                    f"(mode {mode & 0o777:04o}); say 'chmod 600 {path}'."
                )
            return file.read()
    except FileNotFoundError:
        raise ConfigError(
            f"There is no file {path} ({what}); 'qmigctl pki' makes certificates."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path} ({what}) cannot be read: {error.strerror}; its mode or its owner has to be "
            f"another one, or the name."
        ) from None
