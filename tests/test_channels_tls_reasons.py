"""What each side says of a TLS handshake that fails: real ones, between real contexts."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from OpenSSL import SSL
from twisted.trial.unittest import SynchronousTestCase

from qmigd.channels.tls_reasons import alert_text
from tests.rig.certificates import CLIENT, SERVER, Authority, Files
from tests.rig.tls import End, bare_context, shake


class HandshakeCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(self.mktemp())
        self.ca = Authority(self.directory)
        self.credentials = self.ca.host("hosta.example").load()
        self.refused: list[str] = []

    def ours(self, *, server: bool) -> SSL.Context:
        return self.credentials.context(server=server, on_refused=self.refused.append)

    def said(self, end: End) -> tuple[str, bool]:
        assert end.error is not None
        return alert_text(end.error)

    def assert_refused(self, other: Files | None, found: str, told: str) -> None:
        """Have a peer with those files in either role.

        :param found: what this side says, or what OpenSSL's check told it.
        :param told: what the peer's side makes of the alert.
        """
        for server in (True, False) if other else (True,):
            ours = self.ours(server=server)
            theirs = bare_context(server=not server, files=other)
            if server:
                there, here = shake(theirs, ours)
            else:
                here, there = shake(ours, theirs)
            text, by_peer = self.said(here)
            self.assertFalse(by_peer)
            self.assertFalse(here.done)
            if self.refused:
                self.assertEqual("the peer's certificate is refused", text)
                text = self.refused.pop()
            self.assertRegex(text, f"^{found}$")
            text, by_peer = self.said(there)
            self.assertTrue(by_peer)
            self.assertRegex(text, told)
            self.assertEqual([], self.refused)


class RefusedTests(HandshakeCase):
    """Both sides' sentences, where one presents what the other does not take."""

    def test_no_certificate(self) -> None:
        """A client without a certificate is refused, and told that it needs one."""
        self.assert_refused(
            None,
            "the peer presented no certificate; it needs one that is signed by a CA that is "
            "trusted here",
            "the peer demands a certificate, and this side presented none",
        )

    def test_foreign(self) -> None:
        """One of another CA is refused, and the CA named; so is one of a namesake of the CA."""
        foreign = Authority(self.directory / "foreign", "Foreign CA")
        self.assert_refused(
            foreign.host("hosta.example"),
            r"its certificate is not signed by a CA that is trusted here \(issuer CN=Foreign CA\)",
            "the peer does not trust this host's certificate: .* that the peer knows",
        )
        namesake = Authority(self.directory / "namesake")
        self.assert_refused(
            namesake.host("hosta.example"),
            "the signature of its certificate is wrong: it was not made with the trusted CA's key",
            "the peer found a signature of this side to be wrong",
        )

    def test_expired(self) -> None:
        """One that has expired is refused with the moment when it did."""
        self.assert_refused(
            self.ca.expired("hosta.example"),
            r"its certificate expired on \d{4}-\d\d-\d\d at \d\d:\d\d UTC",
            "the peer refuses this host's certificate: it has expired by the peer's clock",
        )

    def test_not_yet_valid(self) -> None:
        """One whose time has not come is refused with the moment when it will."""
        self.assert_refused(
            self.ca.not_yet_valid("hosta.example"),
            r"its certificate is not valid before \d{4}-\d\d-\d\d at \d\d:\d\d UTC, which is "
            "still to come by the clock of this host",
            "not yet valid by the peer's clock; compare the clocks",
        )

    def test_purpose(self) -> None:
        """One that is only for the other role is refused, in either role."""
        sentence = "its certificate is not for this use: it needs serverAuth and clientAuth .*"
        told = "the peer refuses this host's certificate: it is not for this use"
        for server, purpose in ((True, SERVER), (False, CLIENT)):
            other = self.ca.host("hosta.example", purposes=(purpose,))
            ours = self.ours(server=server)
            theirs = bare_context(server=not server, files=other)
            client, end = shake(theirs, ours) if server else shake(ours, theirs)
            here, there = (end, client) if server else (client, end)
            self.assertEqual(("the peer's certificate is refused", False), self.said(here))
            self.assertRegex(self.refused.pop(), sentence)
            self.assertRegex(self.said(there)[0], told)

    def test_old_tls(self) -> None:
        """A peer that speaks TLS 1.2 at most is refused for that; as a server it refuses itself."""
        sentence = "the peer does not speak TLS 1.3, and this side speaks nothing older"
        files, newest = self.ca.host("hosta.example"), SSL.TLS1_2_VERSION
        old = bare_context(server=False, files=files, newest=newest)
        client, server = shake(old, self.ours(server=True))
        self.assertEqual((sentence, False), self.said(server))
        self.assertEqual((sentence, True), self.said(client))
        old = bare_context(server=True, files=files, newest=newest)
        client, server = shake(self.ours(server=False), old)
        self.assertEqual((sentence, True), self.said(client))
        self.assertFalse(client.done or server.done)

    def test_intermediate(self) -> None:
        """What is wrong with a CA in between is said of that one, by its name."""
        between = Authority(self.directory / "between", "Rack 2 CA", parent=self.ca, days=(-30, -1))
        self.assert_refused(
            between.host("hosta.example"),
            r"its CA's certificate \(CN=Rack 2 CA\) expired on .*",
            "it has expired by the peer's clock",
        )
        no_ca = Authority(self.directory / "no-ca", "A host", parent=self.ca, ca=False)
        self.assert_refused(
            no_ca.host("hosta.example"),
            r"its CA's certificate \(CN=A host\) is not one of a CA, and has signed .*",
            "the peer .*",
        )

    def test_name_for_a_terminal(self) -> None:
        """A stranger's name is shown in one line, without control characters, and not for ever."""
        foreign = Authority(self.directory / "foreign", "\x1b[2J\n" + "x" * 59)
        self.assert_refused(
            foreign.host("hosta.example"),
            r"its certificate is not signed by a CA that is trusted here "
            rf"\(issuer CN=\?\[2J\?{'x' * 59}\)",
            "the peer does not trust",
        )


class NotTlsTests(HandshakeCase):
    def heard(self, data: bytes, *, server: bool) -> tuple[str, bool]:
        """Have this side hear something that is not TLS; returns what it says."""
        end = End(SSL.Connection(self.ours(server=server)))
        if server:
            end.connection.set_accept_state()
        else:
            end.connection.set_connect_state()
            end.step()
        end.connection.bio_write(data)
        end.step()
        return self.said(end)

    def test_not_tls(self) -> None:
        """A peer that speaks something else is told apart from one that TLS fails with."""
        for data, sentence in (
            (b"GET / HTTP/1.1\r\n\r\n", "the peer speaks HTTP and not TLS"),
            (b"QEMU-MIGRATE\x01\x01" * 10, "what the peer sends is not TLS"),
            (b"QEVM\0\0\0\3" * 20, "what the peer sends is not TLS"),
            (b"\x80" * 100, "what the peer sends is not TLS"),
            (b"\x16\x03\x01\x00\x05abcde", "what the peer sends is not TLS"),
            (b"\x16\x03\x01\xff\xff" + b"a" * 70000, "what the peer sends is not TLS"),
        ):
            for server in (True, False):
                self.assertEqual((sentence, False), self.heard(data, server=server))

    def test_the_end(self) -> None:
        """A connection that ends in the midst of it is no news from the peer."""
        end = End(SSL.Connection(self.ours(server=True)))
        end.connection.set_accept_state()
        end.connection.bio_shutdown()
        end.step()
        self.assertEqual(
            ("the connection ended in the midst of the TLS handshake", False), self.said(end)
        )

    def test_closed(self) -> None:
        """A peer that says farewell instead of going on has ended the session."""
        client, server = shake(self.ours(server=False), self.ours(server=True))
        client.connection.shutdown()
        server.connection.bio_write(client.connection.bio_read(4096))
        server.step()
        self.assertEqual(("the peer ended the TLS session", True), self.said(server))

    def test_tampered(self) -> None:
        """A record that was changed on the way is said to be, on both sides."""
        client, server = shake(self.ours(server=False), self.ours(server=True))
        client.connection.send(b"hello")
        record = bytearray(client.connection.bio_read(4096))
        record[-1] ^= 1
        server.connection.bio_write(bytes(record))
        server.step()
        self.assertEqual(
            ("a record arrived damaged, or was tampered with on the way", False),
            self.said(server),
        )
        client.connection.bio_write(server.connection.bio_read(4096))
        client.step()
        self.assertEqual(
            ("a record reached the peer damaged, or was tampered with on the way", True),
            self.said(client),
        )

    @given(st.binary(min_size=1, max_size=300))
    def test_anything(self, data: bytes) -> None:
        """Whatever comes instead of TLS, there is a sentence, and it is this side's."""
        end = End(SSL.Connection(self.ours(server=True)))
        end.connection.set_accept_state()
        end.connection.bio_write(data)
        end.connection.bio_shutdown()
        end.step()
        text, by_peer = self.said(end)
        self.assertTrue(text)
        if data[:1] != b"\x15":  # an alert
            self.assertFalse(by_peer)


class UnknownTests(SynchronousTestCase):
    def test_openssl_has_the_word(self) -> None:
        """What there is no sentence for is said in OpenSSL's words."""
        self.assertEqual(
            ("the peer ended the TLS handshake: unrecognized name", True),
            alert_text(SSL.Error([("SSL routines", "", "tlsv1 alert unrecognized name")])),
        )
        self.assertEqual(
            ("the TLS handshake failed: length mismatch", False),
            alert_text(SSL.Error([("SSL routines", "", "length mismatch")])),
        )
        self.assertEqual(
            ("the TLS handshake failed: OpenSSL does not say why", False),
            alert_text(SSL.Error([])),
        )
