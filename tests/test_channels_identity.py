"""Who a certificate is for, compared with the host that was asked for."""

from __future__ import annotations

import ipaddress
import uuid
from pathlib import Path

from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.channels.identity import check_host, peer_names
from qmigd.errors import LocalError
from tests.rig.certificates import Authority


class IdentityCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.ca = Authority(Path(self.mktemp()))

    def certificate(self, *names: str, **options: object) -> x509.Certificate:
        files = self.ca.host(*names, **options)  # type: ignore[arg-type]
        return x509.load_pem_x509_certificate(files.certificate.read_bytes())

    def assert_is(self, certificate: x509.Certificate, *hosts: str) -> None:
        for host in hosts:
            check_host(certificate, host)

    def assert_is_not(self, certificate: x509.Certificate, *hosts: str) -> None:
        for host in hosts:
            error = self.assertRaises(LocalError, check_host, certificate, host)
            self.assertEqual("tls", error.code)


class NameTests(IdentityCase):
    def test_names(self) -> None:
        """A name has to be one of those in the certificate, in any case, dot at its end or not."""
        certificate = self.certificate("hosta.example", "a.Other.example")
        self.assert_is(certificate, "hosta.example", "HOSTA.Example", "hosta.example.")
        self.assert_is(certificate, "a.other.example")
        self.assert_is_not(certificate, "hostb.example", "example", "x.hosta.example", "hosta")

    def test_sentence(self) -> None:
        """A refusal has what was asked for, what the certificate is for, and what to do."""
        certificate = self.certificate("hosta.example", "192.0.2.7")
        error = self.assertRaises(LocalError, check_host, certificate, "hostb.example")
        self.assertEqual(
            "the peer at hostb.example presented a certificate that is for hosta.example, "
            "192.0.2.7: either another host answers there, or its certificate has to be made anew "
            "with hostb.example among its names",
            error.text,
        )

    def test_common_name(self) -> None:
        """The common name in the subject is no name."""
        certificate = self.certificate(others=[x509.DNSName("hosta.example")])
        self.assertIn("CN=nobody", certificate.subject.rfc4514_string())
        self.assert_is(certificate, "hosta.example")
        self.assert_is_not(certificate, "nobody")

    def test_wildcard(self) -> None:
        """A wildcard stands for one whole first label."""
        certificate = self.certificate("*.dc1.example")
        self.assert_is(certificate, "hosta.dc1.example")
        self.assert_is_not(certificate, "dc1.example", "a.b.dc1.example")

    def test_international(self) -> None:
        """A name that is not ASCII is compared in DNS's form for it."""
        certificate = self.certificate("xn--bcher-kva.example")
        self.assert_is(certificate, "bücher.example", "xn--bcher-kva.example")
        self.assert_is_not(certificate, "bucher.example")

    def test_no_name(self) -> None:
        """What could not be any host's name is refused as such."""
        certificate = self.certificate("hosta.example")
        for host in ("", ".", "a b", "hosta.example\n", "b\0", "1234", "\u2603" * 80):
            error = self.assertRaises(LocalError, check_host, certificate, host)
            self.assertIn("is not a name that a certificate could be for", error.text)

    def test_other_kinds_of_names(self) -> None:
        """Names of other kinds in the certificate count for nothing, and do no harm."""
        certificate = self.certificate(
            "hosta.example",
            others=[
                x509.UniformResourceIdentifier(f"urn:uuid:{uuid.UUID(int=1)}"),
                x509.UniformResourceIdentifier("spiffe://hostb.example/qmigd"),
                x509.RFC822Name("root@hostc.example"),
            ],
        )
        self.assert_is(certificate, "hosta.example")
        self.assert_is_not(certificate, "hostb.example", "hostc.example")


class AddressTests(IdentityCase):
    def test_addresses(self) -> None:
        """An address has to be one of the addresses, and not the text of a name."""
        certificate = self.certificate("192.0.2.7", "2001:db8::7")
        self.assert_is(certificate, "192.0.2.7", "2001:db8::7", "2001:DB8:0::7")
        self.assert_is_not(certificate, "192.0.2.8", "2001:db8::8", "hosta.example")
        named = self.certificate("a", others=[x509.DNSName("192.0.2.7")])
        self.assert_is_not(named, "192.0.2.7")

    def test_forms(self) -> None:
        """A scope is left out, and IPv4 in IPv6's form is IPv4."""
        certificate = self.certificate("fe80::7", "192.0.2.7")
        self.assert_is(certificate, "fe80::7%eth0", "::ffff:192.0.2.7")


class PeerNamesTests(IdentityCase):
    def test_names(self) -> None:
        """All names and addresses are there, names in lower case."""
        names = peer_names(self.certificate("HostA.example", "192.0.2.7", "2001:db8::7"))
        self.assertEqual(("hosta.example",), names.dns)
        self.assertEqual(
            (ipaddress.ip_address("192.0.2.7"), ipaddress.ip_address("2001:db8::7")),
            names.addresses,
        )

    def test_none(self) -> None:
        """A certificate may have none."""
        self.assertEqual("no name", str(peer_names(self.ca.certificate)))

    @given(st.lists(st.ip_addresses(), max_size=5))
    def test_addresses_are_themselves(self, addresses: list[object]) -> None:
        """A certificate is for each of the addresses that it was made for."""
        certificate = self.certificate("a", *map(str, addresses))
        for address in addresses:
            check_host(certificate, str(address))
