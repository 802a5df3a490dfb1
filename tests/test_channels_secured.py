"""A connection goes over to TLS, in memory: both machines and sessions, and who is refused."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from twisted.trial.unittest import SynchronousTestCase

from qmigd.channels.secured import Secured, TlsSide
from qmigd.channels.tls import TlsSession
from qmigd.errors import LocalError
from qmigd.handshake import ChannelHandshake, DestinationHandshake, SourceHandshake
from qmigd.handshake.events import (
    Asked,
    ChannelAttached,
    ChannelOpened,
    Event,
    Failed,
    Greeted,
    GuestDescribed,
    Outcome,
    Selected,
)
from qmigd.handshake.events import Secured as SecuredEvent
from qmigd.migration.security import Security
from qmigd.negotiation.allow import Allow
from qmigd.wire.greeting import TLS, Greeting, Reply
from qmigd.wire.messages import read_message
from qmigd.wire.reading import Decoder
from qmigd.wire.role import RoleHeader
from tests.rig.certificates import Authority, Files
from tests.test_wire_reading import admit_all

OFFER = ("multifd", TLS)
ROLE = RoleHeader(uuid.UUID(int=7), "main", 0)
SECRET = bytes(range(32))

#: The names of both hosts, for a certificate that either can show.
_BOTH = ("source.example", "destination.example")


class End:
    """One end of a connection: what it has been told, and what it has sent."""

    def __init__(self, secured: Any) -> None:
        """:param secured: a :class:`Secured`, or what looks like one."""
        self.secured = secured
        self.machine: Any = secured.machine
        self.told: list[Event] = []
        self.sent = b""

    def send(self) -> bytes:
        data = bytes(self.secured.data_to_send())
        self.sent += data
        return data

    @property
    def failure(self) -> Failed:
        (failed,) = (event for event in self.told if isinstance(event, Failed))
        return failed


Change = Callable[[bytes], bytes]


def talk(
    source: End, destination: End, *, size: int = 1 << 20, on_way: Change = lambda data: data
) -> None:
    """Carry bytes to and fro until nobody has any, never more at a time than may be read.

    :param size: of the pieces that the bytes come in.
    :param on_way: changes what goes from the destination to the source.
    """
    there, back = b"", b""
    while True:
        there += source.send()
        back += on_way(destination.send())
        moved = False
        for data, end in ((there, destination), (back, source)):
            piece = data[: min(size, end.secured.wanted)]
            if piece:
                moved = True
                end.told += end.secured.receive(piece)
                if end is destination:
                    there = there[len(piece) :]
                else:
                    back = back[len(piece) :]
        if not moved and not (source.send() or destination.send()):
            return


class SecuredCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.authority = Authority(self.mktemp())
        self.here = self.authority.host("source.example", "192.0.2.1")
        self.there = self.authority.host("destination.example", "192.0.2.2")

    def ends(
        self,
        *,
        here: Files | None = None,
        there: Files | None = None,
        host: str = "destination.example",
        allow: Allow | None = None,
        source: Any = None,
        offer: tuple[str, ...] = OFFER,
        keep_keys: bool = False,
    ) -> tuple[End, End]:
        """Return a source and a destination."""
        calling = Security((here or self.here).store()).calling(host, keep_keys=keep_keys)
        called = Security((there or self.there).store(), allow or Allow()).called(
            keep_keys=keep_keys
        )
        return (
            self.end(Secured(source or SourceHandshake(), calling), server=False),
            self.end(Secured(DestinationHandshake(offer), called), server=True),
        )

    # The form that the handshake has: tests/test_channels_inband.py has them in the other.

    def end(self, secured: Secured, *, server: bool) -> End:
        """Return one end."""
        return End(secured)

    def said(self, end: End) -> bytes:
        """Return what an end has said."""
        return end.sent

    def form(self, data: bytes, *, by_source: bool) -> bytes:
        """Return what has to be sent to say this."""
        return data

    def select(self, source: End, destination: End, **options: Any) -> None:
        """Take them to the Reply that selects TLS, and on to where they get by themselves."""
        talk(source, destination)
        source.machine.reply((TLS,))
        talk(source, destination, **options)


class ControlTests(SecuredCase):
    """The control connection."""

    def test_upgrade(self) -> None:
        """Behind the Reply all is in TLS, and each side knows the other's names."""
        source, destination = self.ends()
        self.select(source, destination)
        self.assertEqual(source.told, [Greeted((1,), OFFER), SecuredEvent()])
        self.assertEqual(destination.told, [Selected(1, (TLS,))])
        clear = Reply(1, (TLS,)).encode()
        self.assertTrue(self.said(source).startswith(clear + b"\x16\x03"))
        source.machine.guest({"name": "a secret name"})
        talk(source, destination)
        self.assertEqual(destination.told[1:], [GuestDescribed({"name": "a secret name"})])
        self.assertNotIn(b"a secret name", source.sent)
        for end, name in ((source, "destination.example"), (destination, "source.example")):
            self.assertTrue(end.secured.encrypted)
            assert end.secured.session is not None
            self.assertIn(name, tuple(end.secured.session.peer))

    # The other form of the handshake has this test as well.
    @settings(
        max_examples=10, deadline=None, suppress_health_check=[HealthCheck.differing_executors]
    )
    @given(st.integers(1, 700))
    def test_pieces(self, size: int) -> None:
        """It makes no difference in what pieces the bytes come."""
        source, destination = self.ends()
        self.select(source, destination, size=size)
        source.machine.guest({"padding": "x" * 40_000})
        talk(source, destination, size=size)
        self.assertIsInstance(destination.told[-1], GuestDescribed)

    def test_all_that_may_be_read(self) -> None:
        """Bytes that come together with the Reply, all at once, are TLS's."""
        source, destination = self.ends()
        talk(source, destination)
        source.machine.reply((TLS,))
        first = source.send()
        self.assertGreater(len(first), len(Reply(1, (TLS,)).encode()))
        self.assertGreaterEqual(destination.secured.may_read, 5)
        destination.told += destination.secured.receive(first)
        talk(source, destination)
        self.assertEqual(destination.told, [Selected(1, (TLS,))])

    def test_ask(self) -> None:
        """A question about an earlier migration can be asked in TLS as well."""
        source, destination = self.ends()
        self.select(source, destination)
        source.machine.ask({"migration": "m"})
        talk(source, destination)
        self.assertEqual(destination.told[1:], [Asked({"migration": "m"})])
        destination.machine.outcome({"ran": True})
        talk(source, destination)
        self.assertEqual(source.told[2:], [Outcome({"ran": True})])

    def test_without(self) -> None:
        """A Reply without TLS leaves all in clear, though both could do it."""
        source, destination = self.ends()
        talk(source, destination)
        source.machine.reply(("multifd",))
        source.machine.guest({"name": "a"})
        talk(source, destination)
        self.assertEqual(
            destination.told, [Selected(1, ("multifd",)), GuestDescribed({"name": "a"})]
        )
        self.assertFalse(source.secured.encrypted or destination.secured.encrypted)

    def stripped(self, before: bytes, after: bytes) -> tuple[End, End]:
        """Change the Greeting on its way."""
        source, destination = self.ends()
        destination.told += destination.secured.receive(source.send())
        self.assertIn(before, destination.send())
        # It has been taken out of the way; what was changed comes instead.
        source.told += source.secured.receive(self.form(after, by_source=False))
        source.machine.reply((TLS,))
        talk(source, destination)
        return source, destination

    def test_stripped_greeting(self) -> None:
        """A feature that was taken out of the Greeting ends it, on both sides."""
        whole = Greeting((1,), OFFER).encode()
        source, destination = self.stripped(whole, Greeting((1,), (TLS,)).encode())
        self.assertEqual(destination.failure.code, "opening-differs")
        self.assertFalse(destination.failure.remote)
        self.assertEqual(
            source.failure, Failed("opening-differs", destination.failure.text, remote=True)
        )
        self.assertNotIn(Selected, map(type, destination.told))

    def test_widened_greeting(self) -> None:
        """So does one that was put in."""
        whole = Greeting((1,), OFFER).encode()
        source, destination = self.stripped(whole, Greeting((1,), (*OFFER, "more")).encode())
        self.assertEqual(destination.failure.code, "opening-differs")
        self.assertEqual(source.failure.code, "opening-differs")

    def test_changed_reply(self) -> None:
        """A Reply that was changed on its way ends it as well."""
        source, destination = self.ends()
        talk(source, destination)
        source.machine.reply((TLS, "multifd"))
        source.send()
        sent, said = self.said(source), Reply(1, (TLS, "multifd")).encode()
        self.assertTrue(sent.startswith(said))
        changed = Reply(1, (TLS,)).encode() + sent[len(said) :]
        destination.told += destination.secured.receive(self.form(changed, by_source=True))
        talk(source, destination)
        self.assertEqual(destination.failure.code, "opening-differs")
        self.assertEqual(source.failure.code, "opening-differs")


class RefusedTests(SecuredCase):
    """Who is refused, and that both sides learn why."""

    def refused(
        self, source: End, destination: End, here: str, there: str, *, by_source: bool = False
    ) -> None:
        """Let them try; the sentences at the source and at the destination have these words."""
        self.select(source, destination)
        for end, words in ((source, here), (destination, there)):
            self.assertIn(words, end.failure.text)
            self.assertTrue(end.machine.closed)
        self.assertEqual(source.failure.remote, not by_source)
        self.assertEqual(destination.failure.remote, by_source)
        self.assertNotIn(Selected, map(type, destination.told))
        self.assertNotIn(SecuredEvent, map(type, source.told))

    def test_foreign_source(self) -> None:
        """A source with the certificate of another CA."""
        other = Authority(self.mktemp(), "Other CA")
        files = other.host("source.example").trusting(self.authority, other)
        self.refused(
            *self.ends(here=files),
            "not signed by a CA that the peer knows",
            "not signed by a CA that is trusted here",
        )

    def test_foreign_destination(self) -> None:
        """A destination with the certificate of another CA."""
        other = Authority(self.mktemp(), "Other CA")
        files = other.host("destination.example").trusting(self.authority, other)
        self.refused(
            *self.ends(there=files),
            "not signed by a CA that is trusted here",
            "not signed by a CA that the peer knows",
            by_source=True,
        )

    def stranger(self, context: SSL.Context) -> tuple[End, str]:
        """Have a client of its own kind go over to TLS; returns the destination, and its error."""
        _, destination = self.ends()
        destination.send()
        destination.told += destination.secured.receive(Reply(1, (TLS,)).encode())
        client = SSL.Connection(context, None)
        client.set_connect_state()
        error = ""
        for _ in range(4):
            try:
                client.do_handshake()
                client.recv(1)
            except SSL.WantReadError:
                pass
            except SSL.Error as failure:
                error = error or str(failure)
            with contextlib.suppress(SSL.WantReadError):
                destination.told += destination.secured.receive(client.bio_read(1 << 16))
            if data := destination.send():
                client.bio_write(data)
        self.assertFalse(destination.failure.remote)
        self.assertNotIn(Selected, map(type, destination.told))
        return destination, error

    def test_no_certificate(self) -> None:
        """A source that shows no certificate."""
        destination, error = self.stranger(SSL.Context(SSL.TLS_CLIENT_METHOD))
        self.assertIn("presented no certificate", destination.failure.text)
        self.assertIn("certificate required", error)

    def test_older_tls(self) -> None:
        """A source that speaks TLS 1.2 at the most."""
        context = SSL.Context(SSL.TLS_CLIENT_METHOD)
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
        destination, error = self.stranger(context)
        self.assertIn("does not speak TLS 1.3", destination.failure.text)
        self.assertIn("protocol version", error)

    def out_of_time(self, files: Files, owner: str, other: str) -> None:
        """Let either side try with a certificate that no honest daemon could load.

        :param owner: words in the sentence at the side that has it.
        :param other: the same at the other side.
        """
        credentials = _presenting(self.authority.host(*_BOTH).load(), files)
        source, destination = self.ends()
        source.secured._tls = _with(source, credentials)
        self.refused(source, destination, owner, other)
        source, destination = self.ends()
        destination.secured._tls = _with(destination, credentials)
        self.refused(source, destination, other, owner, by_source=True)

    def test_expired(self) -> None:
        """A certificate that has ended, on either side."""
        self.out_of_time(self.authority.expired(*_BOTH), "it has expired", "expired on")

    def test_not_yet_valid(self) -> None:
        """A certificate that has not begun yet, on either side."""
        files = self.authority.not_yet_valid(*_BOTH)
        self.out_of_time(files, "not yet valid", "is not valid before")

    def test_wrong_name(self) -> None:
        """A destination whose certificate is for another host than was called."""
        for host in ("other.example", "192.0.2.77"):
            self.refused(*self.ends(host=host), host, host, by_source=True)

    def test_right_address(self) -> None:
        """An address is a name like another."""
        source, destination = self.ends(host="192.0.2.2")
        self.select(source, destination)
        self.assertEqual(source.told[-1], SecuredEvent())

    def test_not_allowed(self) -> None:
        """A source that ``allow`` does not name; it learns its own names, and not the list."""
        allow = Allow.of(["other.example"])
        source, destination = self.ends(allow=allow)
        self.refused(source, destination, "source.example", "source.example")
        self.assertNotIn("other.example", source.failure.text)
        self.assertEqual(source.failure.code, "peer")


def _with(end: End, credentials: Any) -> TlsSide:
    side = end.secured._tls
    assert side is not None
    return replace(side, credentials=credentials)


def _presenting(good: Any, files: Files) -> Any:
    """Return credentials that show another certificate than they were checked with."""
    return replace(
        good,
        _presented=tuple(x509.load_pem_x509_certificates(files.certificate.read_bytes())),
        _key=load_pem_private_key(files.key.read_bytes(), None),
    )


class ChannelTests(SecuredCase):
    """A payload channel of a migration in TLS."""

    def channel(self, **options: Any) -> tuple[End, End]:
        """Open one, as far as the role header."""
        source, destination = self.ends(source=ChannelHandshake(ROLE, SECRET, tls=True), **options)
        talk(source, destination)
        return source, destination

    def attached(self, **options: Any) -> tuple[TlsSession, TlsSession]:
        """Open one; returns both sessions."""
        source, destination = self.channel(**options)
        self.assertEqual(destination.told, [ChannelOpened(ROLE.prove(SECRET))])
        destination.machine.attached()
        talk(source, destination)
        self.assertEqual(source.told, [ChannelAttached()])
        self.assertEqual((source.secured.wanted, destination.secured.wanted), (0, 0))
        self.assertNotIn(ROLE.prove(SECRET).encode(), source.sent)
        assert source.secured.session is not None and destination.secured.session is not None
        return source.secured.session, destination.secured.session

    def test_attached(self) -> None:
        """The role header goes in TLS; behind ATTACHED the session carries payload."""
        near, far = self.attached()
        for one, other in ((near, far), (far, near)):
            payload = os.urandom(100_000)
            one.send(payload)
            self.assertEqual(other.receive(one.data_to_send()), payload)

    def test_nothing_is_read_beyond(self) -> None:
        """Payload in the same segment as ATTACHED is left where it is."""
        source, destination = self.channel()
        destination.machine.attached()
        attached = destination.send()
        assert destination.secured.session is not None
        destination.secured.session.send(b"payload")
        both = attached + destination.secured.session.data_to_send()
        while size := source.secured.wanted:
            source.told += source.secured.receive(both[:size])
            both = both[size:]
        self.assertEqual(source.told, [ChannelAttached()])
        assert source.secured.session is not None
        self.assertEqual(source.secured.session.receive(both), b"payload")

    def test_reply_in_tls(self) -> None:
        """Who begins with TLS may not become a control connection."""
        source, destination = self.ends(source=_Replying())
        talk(source, destination)
        self.assertEqual(destination.failure.code, "unexpected-message")
        self.assertIn("in TLS", destination.failure.text)

    def test_clear_to_a_host_without_tls(self) -> None:
        """A destination without certificates takes TLS's first byte for garbage, and says so."""
        source, _ = self.ends(source=ChannelHandshake(ROLE, SECRET, tls=True))
        destination = self.end(Secured(DestinationHandshake(("multifd",)), None), server=True)
        talk(source, destination)
        self.assertEqual(destination.failure.code, "bad-magic")

    def test_wrong_name(self) -> None:
        """The peer's name is checked on each connection; no ERROR is said on a channel."""
        source, destination = self.channel(host="other.example")
        self.assertIn("other.example", source.failure.text)
        said: Decoder[Any] = Decoder(read_message(admit_all))
        self.assertEqual(destination.told, [])
        self.assertEqual(said.taken, 0)

    def test_keys(self) -> None:
        """Both ends have the same keys to give to their kernels, once."""
        near, far = self.attached(keep_keys=True)
        here, there = near.take_keys(), far.take_keys()
        self.assertEqual(here.cipher, there.cipher)
        self.assertEqual(here.sending, there.receiving)
        self.assertEqual(here.receiving, there.sending)
        self.assertNotEqual(here.sending, here.receiving)
        self.assertEqual(here.last_sent, there.last_received)
        self.assertEqual(here.last_received, there.last_sent)
        for record in (here.last_sent, here.last_received):
            self.assertEqual(record[:3], b"\x17\x03\x03")
            self.assertEqual(len(record), 5 + int.from_bytes(record[3:5], "big"))
        for session in (near, far):
            self.assertRaises(LocalError, session.take_keys)

    def test_no_keys(self) -> None:
        """A session that was not told to keep them has none, nor one on a control connection."""
        near, _ = self.attached()
        self.assertRaises(LocalError, near.take_keys)
        source, destination = self.ends(keep_keys=True)
        self.select(source, destination)
        assert destination.secured.session is not None
        self.assertRaises(LocalError, destination.secured.session.take_keys)


class _Replying:
    """A peer that begins with TLS and then says a Reply, which nobody's machine does."""

    closed = False

    def __init__(self) -> None:
        self.upgrade = False
        self.wanted = len(Greeting((1,), OFFER).encode())
        self._out = b""

    @property
    def may_read(self) -> int:
        return self.wanted

    def receive(self, data: bytes) -> list[Event]:
        self.upgrade = True
        self.wanted = 1
        return []

    def secured(self) -> None:
        self.upgrade = False
        self._out = Reply(1, (TLS,)).encode()

    def data_to_send(self) -> bytes:
        data, self._out = self._out, b""
        return data
