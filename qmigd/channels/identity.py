"""Who a certificate is for, and whether that is the host that was asked for.

Names are those of the extension subjectAltName, DNS names and IP addresses; the common
name in the subject counts for nothing (RFC 9525).  What a source connects to is compared
as follows:

- an IP address with the addresses only, a name with the names only;
- an IPv6 address without its scope (``fe80::1%eth0``), which has a meaning on this host
  alone, and an IPv4 address in IPv6's form (``::ffff:192.0.2.1``) as the one that it is;
- a name without the dot at its end, in any case of letters; one that is not ASCII in the
  form that DNS has for it (``xn--``, IDNA 2008);
- ``*`` as the whole first label of a certificate's name stands for one label.
"""

from __future__ import annotations

import ipaddress

from cryptography import x509
from service_identity import VerificationError
from service_identity.exceptions import CertificateError
from service_identity.hazmat import (
    DNS_ID,
    DNSPattern,
    IPAddress_ID,
    IPAddressPattern,
    verify_service_identity,
)

from qmigd.errors import TlsError
from qmigd.negotiation.allow import PeerNames

__all__ = ["check_host", "peer_names"]

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def peer_names(certificate: x509.Certificate) -> PeerNames:
    """Return the names and addresses that a certificate is for.

    :raises TlsError: they cannot be read.
    """
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return PeerNames(
            tuple(name.lower() for name in found.get_values_for_type(x509.DNSName)),
            tuple(
                _plain(address)
                for address in found.get_values_for_type(x509.IPAddress)
                if isinstance(address, _Address)
            ),
        )
    except x509.ExtensionNotFound:
        return PeerNames()
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise TlsError(f"the names in the peer's certificate cannot be read: {error}") from None


def check_host(certificate: x509.Certificate, host: str) -> None:
    """Check that a certificate is for the host that was connected to.

    :param certificate: one that has been verified.
    :param host: the name or the address, as in the URI.
    :raises TlsError: it is for another one; the text has both.
    """
    names = peer_names(certificate)
    host = host.removesuffix(".")
    try:
        wanted = _wanted(host)
    except ValueError:
        raise TlsError(
            f"'{host}' is not a name that a certificate could be for; connect to the peer by "
            f"its name or its address"
        ) from None
    try:
        # Not verify_certificate_hostname(): that one reads names of other kinds as well,
        # and fails with those that it does not understand ("urn:uuid:...").
        verify_service_identity(
            [
                *(DNSPattern.from_bytes(name.encode()) for name in names.dns),
                *map(IPAddressPattern, names.addresses),
            ],
            obligatory_ids=[wanted],
            optional_ids=[],
        )
    except (VerificationError, CertificateError):
        raise TlsError(
            f"the peer at {host} presented a certificate that is for {names}: either another "
            f"host answers there, or its certificate has to be made anew with {host} among its "
            f"names"
        ) from None


def _wanted(host: str) -> DNS_ID | IPAddress_ID:
    """:raises ValueError: it is neither a name nor an address."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        if host != host.strip():
            raise  # service-identity would take it without the spaces
        return DNS_ID(host)
    return IPAddress_ID(str(_plain(address)))


def _plain(address: _Address) -> _Address:
    """Return the IPv4 address that an address stands for, if it does."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
