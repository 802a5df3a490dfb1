"""The files that ``[tls]`` names: what is accepted, what is refused, what comes of them."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding
from OpenSSL import SSL
from twisted.trial.unittest import SynchronousTestCase

from qmigd.channels.credentials import Credentials, peer_certificate
from qmigd.channels.identity import peer_names
from qmigd.errors import ConfigError, LocalError
from tests.rig.certificates import CLIENT, SERVER, Authority, Files, private_pem, write
from tests.rig.tls import bare_context, shake


class FilesCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(self.mktemp())
        self.ca = Authority(self.directory)
        self.files = self.ca.host("hosta.example", "192.0.2.7")
        self.refusals: list[str] = []

    def context(self, credentials: Credentials, *, server: bool) -> SSL.Context:
        return credentials.context(server=server, on_refused=self.refusals.append)


class GoodTests(FilesCase):
    def test_what_is_known(self) -> None:
        """Names, end and fingerprint are those of the certificate."""
        credentials = self.files.load()
        self.assertEqual(("hosta.example", "192.0.2.7"), credentials.names)
        self.assertRegex(credentials.fingerprint, "^([0-9A-F]{2}:){31}[0-9A-F]{2}$")
        days = (credentials.expires - datetime.now(UTC)) / timedelta(days=1)
        self.assertAlmostEqual(365, days, places=2)

    def test_no_secret_is_shown(self) -> None:
        """Neither repr() nor str() of it says more than that."""
        shown = repr(credentials := self.files.load())
        self.assertRegex(
            shown, r"^Credentials\(names=.*, expires=datetime.*, fingerprint='[0-9A-F:]*'\)$"
        )
        self.assertEqual(shown, str(credentials))

    def test_kinds_of_keys(self) -> None:
        """Keys of every kind that TLS 1.3 signs with are good, whoever made the file."""
        for key in (
            rsa.generate_private_key(65537, 2048),
            ec.generate_private_key(ec.SECP384R1()),
            ed25519.Ed25519PrivateKey.generate(),
        ):
            self.ca.host("hosta.example", key=key).load()

    def test_parameters_before_the_key(self) -> None:
        """What 'openssl ecparam -genkey' writes before a key does no harm."""
        parameters = (
            b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
        )
        write(self.files.key, parameters + self.files.key.read_bytes())
        self.files.load()

    def test_without_extensions(self) -> None:
        """A certificate that does not say what it is for is for everything."""
        self.ca.host("hosta.example", purposes=None, usages=None).load()

    def test_chain(self) -> None:
        """CAs in between are presented with the certificate, and a peer can follow them."""
        between = Authority(self.directory / "rack2", "Rack 2 CA", parent=self.ca)
        ours = between.host("hostb.example").trusting(self.ca).load()
        self.assertEqual(3, len(ours.chain))
        client, server = shake(
            self.context(ours, server=False), self.context(self.files.load(), server=True)
        )
        self.assertEqual((None, None), (client.error, server.error))

    def test_trusting_an_intermediate(self) -> None:
        """A CA in between can be trusted by itself, as QEMU's own TLS can; its root is not then."""
        between = Authority(self.directory / "rack2", "Rack 2 CA", parent=self.ca)
        ours = between.host("hostb.example").load()
        self.assertEqual(2, len(ours.chain))
        theirs = self.files.trusting(self.ca, between).load()
        client, server = shake(self.context(theirs, server=False), self.context(ours, server=True))
        self.assertIsInstance(server.error or client.error, SSL.Error)
        self.assertEqual(
            ["its certificate is not signed by a CA that is trusted here (issuer CN=Test CA)"],
            self.refusals,
        )

    def test_several_authorities(self) -> None:
        """With two CAs trusted, as while one takes over from the other, both sides' are good."""
        other = Authority(self.directory / "new", "New CA")
        old = self.files.trusting(self.ca, other).load()
        new = other.host("hostb.example").trusting(other, self.ca).load()
        for pair in ((old, new), (new, old)):
            client, server = shake(
                self.context(pair[0], server=False), self.context(pair[1], server=True)
            )
            self.assertEqual((None, None), (client.error, server.error))


class BadTests(FilesCase):
    """Each problem is a sentence that names the file and says what to do."""

    def refused(self, files: Files, sentence: str) -> None:
        error = self.assertRaises(ConfigError, files.load)
        self.assertRegex(error.text, sentence)
        self.assertRegex(error.text, r"\.$")

    def test_missing(self) -> None:
        """A file that is not there is named, with the key that names it."""
        nowhere = Path("/nowhere/x.pem")
        for part, key in (("certificate", "certificate"), ("key", "key"), ("authority", "ca")):
            self.refused(
                replace(self.files, **{part: nowhere}),
                rf"^There is no file /nowhere/x.pem \('{key}' in .tls.\); 'qmigctl pki' makes",
            )

    def test_unreadable(self) -> None:
        """One that cannot be read is named with the reason."""
        self.refused(
            replace(self.files, certificate=self.directory),
            rf"^{self.directory} \('certificate' in .tls.\) cannot be read: Is a directory",
        )

    def test_not_pem(self) -> None:
        """One that is no PEM, or has something else in it, is named with what it should have."""
        der = self.directory / "der"
        der.write_bytes(self.ca.certificate.public_bytes(Encoding.DER))
        damaged = self.directory / "damaged"
        damaged.write_bytes(self.files.certificate.read_bytes().replace(b"MII", b"MIJ", 1))
        for path in (der, damaged, self.files.key):
            self.refused(
                replace(self.files, certificate=path),
                rf"^{path} \('certificate' in .tls.\) has no certificate in PEM",
            )
            self.refused(replace(self.files, authority=path), r"\('ca' in .tls.\) has no cert")
        for data in (b"", der.read_bytes(), self.files.certificate.read_bytes()):
            self.refused(
                replace(self.files, key=write(self.directory / "k", data)),
                r"\('key' in .tls.\) has no private key in PEM",
            )

    def test_encrypted_key(self) -> None:
        """An encrypted key is refused: nobody is there to type the password."""
        key = private_pem(ec.generate_private_key(ec.SECP256R1()), BestAvailableEncryption(b"x"))
        path = write(self.directory / "encrypted", key)
        self.refused(
            replace(self.files, key=path),
            rf"^The key {path} \('key' in .tls.\) is encrypted, .*'openssl pkey'",
        )

    def test_mode(self) -> None:
        """A key that others can read or write is refused with the command that mends it."""
        path = self.files.key
        for mode in (0o640, 0o604, 0o620, 0o644, 0o602):
            path.chmod(mode)
            self.refused(self.files, rf"{path} .* \(mode {mode:04o}\); say 'chmod 600 {path}'")
        link = self.directory / "link"
        os.symlink(path.resolve(), link)
        self.refused(replace(self.files, key=link), "say 'chmod 600")
        path.chmod(0o400)
        replace(self.files, key=link).load()

    def test_other_key(self) -> None:
        """The key has to be the certificate's."""
        other = self.ca.host("hostb.example")
        self.refused(
            replace(self.files, key=other.key),
            f"^The key {other.key} is not the one of the certificate {self.files.certificate}",
        )

    def test_time(self) -> None:
        """A certificate that has expired, or is not valid yet, is refused with the moment."""
        self.refused(self.ca.expired("a"), r"expired on \d{4}-\d\d-\d\d at .* make a new one")
        self.refused(self.ca.not_yet_valid("a"), r"not valid before .* by the clock of this host")

    def test_names(self) -> None:
        """A certificate without a name in its subjectAltName is refused."""
        self.refused(self.ca.host(), "has no DNS name and no IP address in its subjectAltName")

    def test_uses(self) -> None:
        """A certificate that is not for both roles, or not for signing, is refused."""
        for purpose in (SERVER, CLIENT):
            self.refused(
                self.ca.host("a", purposes=(purpose,)), "needs serverAuth and clientAuth in its"
            )
        self.refused(
            self.ca.host("a", usages=("key_encipherment",)), "keyUsage without digitalSignature"
        )

    def test_foreign(self) -> None:
        """A certificate that no CA here has signed is refused, and its CA named."""
        foreign = Authority(self.directory / "foreign", "Foreign CA").host("a").trusting(self.ca)
        self.refused(
            foreign,
            rf"does not go with {foreign.authority} \('ca' in .tls.\): its certificate is not "
            r"signed by a CA that is trusted here \(issuer CN=Foreign CA\)",
        )

    def test_expired_authority(self) -> None:
        """So is one whose CA has expired."""
        old = Authority(self.directory / "old", "Old CA", days=(-30, -1))
        self.refused(old.host("a"), r"its CA's certificate \(CN=Old CA\) expired on ")

    def test_no_authority(self) -> None:
        """Where the CA belongs, a host's certificate is refused: they are easily mixed up."""
        self.refused(
            replace(self.files, authority=self.files.certificate),
            "has a certificate in it that is not one of a CA: CN=hosta.example",
        )

    def test_what_openssl_does_not_like(self) -> None:
        """What only OpenSSL finds is found by a handshake with oneself, before any peer."""
        for options in (
            {"key": rsa.generate_private_key(65537, 1024)},
            {"key": ec.generate_private_key(ec.SECP256K1())},
            {"key": dsa.generate_private_key(1024)},
        ):
            with self.subTest(**options):
                self.refused(
                    self.ca.host("a", **options),
                    "cannot be used, as a handshake with itself shows: .*'qmigctl pki host' makes",
                )


class WarningTests(FilesCase):
    def test_far_away(self) -> None:
        """More than 30 days before the end there is no warning."""
        credentials = self.files.load()
        self.assertEqual([], credentials.warnings(credentials.expires - timedelta(30, seconds=1)))

    def test_near(self) -> None:
        """From 30 days before the end on there is one, with the days left and what to do."""
        credentials = self.files.load()
        for left, words in (
            (timedelta(days=30), "ends in 30 days, on"),
            (timedelta(days=2, hours=-1), "ends in one day, on"),
            (timedelta(hours=23), "ends in less than a day, on"),
            (timedelta(), "ended on"),
        ):
            (said,) = credentials.warnings(credentials.expires - left)
            self.assertRegex(
                said,
                rf"^the certificate {self.files.certificate} {words} \d{{4}}-\d\d-\d\d at .* "
                "'qmigctl pki host --force hosta.example 192.0.2.7'.*SIGHUP$",
            )

    def test_authority(self) -> None:
        """The end of the CA is the end of what it has signed, and is warned of as well."""
        old = Authority(self.directory / "old", "Old CA", days=(-30, 10))
        (said,) = old.host("a").load().warnings(datetime.now(UTC))
        self.assertRegex(said, r"^the CA's certificate \(CN=Old CA\), .* ends in 9 days, on .*")


class ContextTests(FilesCase):
    def test_handshake(self) -> None:
        """Two hosts of one CA shake hands in TLS 1.3, with AES-128-GCM, and know each other."""
        ours, theirs = self.files.load(), self.ca.host("hostb.example").load()
        client, server = shake(self.context(ours, server=False), self.context(theirs, server=True))
        self.assertEqual((True, True), (client.done, server.done))
        for end, name in ((client, "hostb.example"), (server, "hosta.example")):
            self.assertEqual("TLSv1.3", end.connection.get_protocol_version_name())
            self.assertIn(name, peer_names(peer_certificate(end.connection)))
            self.assertEqual("TLS_AES_128_GCM_SHA256", end.connection.get_cipher_name())
        self.assertEqual([], self.refusals)

    def test_nobody_yet(self) -> None:
        """Before the handshake there is no certificate of the peer."""
        connection = SSL.Connection(self.context(self.files.load(), server=True))
        error = self.assertRaises(LocalError, peer_certificate, connection)
        self.assertEqual("tls", error.code)

    def test_other_ciphers(self) -> None:
        """A peer that has only one of the three suites gets that one."""
        for suite in ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"):
            theirs = bare_context(server=False, files=self.files)
            theirs.set_tls13_ciphersuites(suite.encode())
            client, server = shake(theirs, self.context(self.files.load(), server=True))
            self.assertIsNone(server.error)
            self.assertEqual(suite, client.connection.get_cipher_name())

    def test_no_resumption(self) -> None:
        """A session cannot be taken up again: each connection proves itself anew."""
        self.assertTrue(self._resumed(bare_context(server=True, files=self.files)))
        self.assertFalse(self._resumed(self.context(self.files.load(), server=True)))

    def _resumed(self, server: SSL.Context) -> bool:
        """Whether a second handshake with that server needs no certificate of it."""
        client = bare_context(server=False, files=self.files)
        first, _ = shake(client, server)
        session = first.connection.get_session()
        assert session is not None
        lengths = []
        for again in (None, session):
            ends = SSL.Connection(client), SSL.Connection(server)
            ends[0].set_connect_state()
            ends[1].set_accept_state()
            if again is not None:
                ends[0].set_session(again)
            self.assertRaises(SSL.WantReadError, ends[0].do_handshake)
            ends[1].bio_write(ends[0].bio_read(1 << 20))
            self.assertRaises(SSL.WantReadError, ends[1].do_handshake)
            lengths.append(len(ends[1].bio_read(1 << 20)))
        return lengths[1] < lengths[0] - len(self.files.certificate.read_bytes()) // 2

    def test_keys(self) -> None:
        """Who asks for the traffic secrets gets them as lines of a key log, on both ends alike."""
        keys: dict[bool, list[bytes]] = {True: [], False: []}
        contexts = [
            self.files.load().context(
                server=server, on_refused=self.refusals.append, on_keys=keys[server].append
            )
            for server in (False, True)
        ]
        shake(*contexts)
        for label in (b"CLIENT_TRAFFIC_SECRET_0", b"SERVER_TRAFFIC_SECRET_0"):
            ours, theirs = (
                [line for line in lines if line.startswith(label + b" ")] for lines in keys.values()
            )
            self.assertEqual(1, len(ours))
            self.assertEqual(ours, theirs)
