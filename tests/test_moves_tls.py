"""Whole moves in TLS, done by qmigd: what is on the wire, and who gets nowhere."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from twisted.internet import reactor

from qmigd.channels.secured import TlsSide
from qmigd.errors import RemoteError
from qmigd.migration.security import Security
from qmigd.migration.verdicts import ask
from qmigd.transports.uri import Reachable, TcpAddress, parse_uri
from tests.rig.certificates import Authority, Files
from tests.rig.daemons import Daemon
from tests.rig.pair import NAME, SLOW, Pair, PairCase, settings_of, source_noise
from tests.rig.proxy import Recorder, Tamperer

#: What would be on the wire otherwise: of the handshake, of QEMU's stream, of the guest's RAM.
_READABLE = (
    b"QEMU-CHANNEL",
    b"ram-blocks",
    b"QEVM\0\0",
    b"pc-i440fx",
    b"pc.ram",
    source_noise()[:16],
)


class TlsCase(PairCase):
    """Two daemons with certificates of one CA."""

    def setUp(self) -> None:
        self.authority = Authority(self.mktemp())

    def host(self, *names: str) -> Files:
        return self.authority.host(*(names or ("host.example", "127.0.0.1")))

    def secure_pair(
        self,
        source: str = "7.2",
        destination: str | None = None,
        *,
        here: Files | None = None,
        there: Files | None = None,
        allow: Any = None,
        there_daemon: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Pair:
        """Prepare a pair whose daemons have certificates.

        :param there_daemon: further settings in ``[daemon]`` of the destination's.
        """
        pair = self.pair(source, destination, there=there_daemon, **options)
        pair.here.config["tls"] = (here or self.host()).table()
        pair.there.config["tls"] = (there or self.host()).table()
        if allow is not None:
            pair.there.config["tls"]["allow"] = allow
        return pair


class RecordedCase(TlsCase):
    """Guests that are moved, with every byte between the two daemons written down."""

    def check(
        self, label: str, other: str, mode: str, *, channels: int, path: str = "relay"
    ) -> None:
        """Move a guest, and read along."""
        pair = self.secure_pair(label, other).start()
        wire = Recorder(pair.there.uri)
        self.addCleanup(wire.close)
        entry = pair.move(path, mode, uri=wire.uri)
        plan = entry["plan"]
        self.assertIn("tls", plan["features"])
        self.assertEqual(plan["path"], path)
        pair.prove_moved()
        # The control connection, and the channels; preempt's may never have been opened.
        self.assertIn(len(wire.connections) - 1, (len(plan["channels"]), channels))
        for there, back in wire.connections:
            self.assertEqual(back[:12], b"QEMU-MIGRATE")
            for readable in _READABLE:
                self.assertFalse(readable in there or readable in back, readable)
        # It has gone this way: the random part of the guest's RAM, and more.
        self.assertGreater(sum(len(there) for there, _ in wire.connections), 4 << 20)


class MovedTests(RecordedCase):
    """By TLS in user space."""

    def test_precopy(self) -> None:
        """One channel."""
        self.check("7.2", "10.0", "precopy", channels=1)

    def test_multifd(self) -> None:
        """Several channels at once."""
        self.check("10.0", "11", "multifd", channels=3)

    def test_postcopy(self) -> None:
        """Pages that are asked for, on the way back."""
        self.check("7.2", "7.2", "postcopy", channels=1)

    def test_preempt(self) -> None:
        """The channel of pages that come first."""
        self.check("11", "11", "preempt", channels=2)

    def test_by_itself(self) -> None:
        """With nothing configured but certificates, it is in TLS."""
        pair = self.secure_pair("7.2").start()
        promised = pair.here.execute("query-features", guest=NAME, uri=pair.there.uri)
        pair.begin("", require=[], exclude=[])
        plan = pair.completed()["plan"]
        for daemon in (pair.here, pair.there):
            self.assertEqual(pair.entry(daemon)["peer-names"], ["host.example", "127.0.0.1"])
        self.assertIn("tls", plan["features"])
        self.assertIn("postcopy-ram", plan["features"])
        self.assertIn("not direct", plan["path-reason"])
        chosen = {one["name"] for one in promised["features"] if one["selected"]}
        self.assertEqual(chosen, {*plan["features"]})
        pair.prove_moved()


class TamperedCase(TlsCase):
    """Somebody on the way changes what goes over a payload channel."""

    def check(self, path: str, mode: str = "precopy") -> None:
        """Change a bit of the stream; the guest goes on, and a second try succeeds."""
        pair = self.secure_pair("7.2").start_registering()
        wire = Tamperer(pair.there.uri, after=1 << 20)
        self.addCleanup(wire.close)
        pair.begin(path, mode, uri=wire.uri)
        pair.failed(pair.here)
        self.assertTrue(wire.done)
        pair.wait_settings(pair.source)
        if mode == "multifd":
            # It hangs where one of several channels breaks, and answers nobody.
            pair.destination.kill()
        pair.prove_stayed()
        # It was left to fail by itself: QEMU 7.2 may end itself if it is told to cancel then.
        statuses = [
            event.data["status"]
            for event in pair.source.monitor.events
            if event.name == "MIGRATION"
        ]
        self.assertEqual(statuses[-1], "failed")
        self.assertNotIn("cancelling", statuses)
        self.try_again(pair, path, mode)


class TamperedTests(TamperedCase):
    """In user space."""

    def test_relay(self) -> None:
        """One channel."""
        self.check("relay")

    def test_multifd(self) -> None:
        """One of several."""
        self.check("relay", "multifd")


class DirectTests(TlsCase):
    """Between the QEMUs, which do TLS themselves with the daemons' certificates."""

    def check(self, label: str, other: str, *ways: str) -> None:
        """Move a guest in each way."""
        for way in ways:
            pair = self.secure_pair(label, other).start()
            entry = pair.move("direct", way)
            self.assertEqual(entry["plan"]["path"], "direct")
            self.assertIn("tls", entry["plan"]["features"])
            pair.prove_moved()
            for guest in (pair.source, pair.destination):
                objects = {one["name"] for one in guest.qmp("qom-list", path="/objects")}
                self.assertFalse({name for name in objects if "qmigd" in name}, objects)

    def test_7_2(self) -> None:
        """QEMU 7.2."""
        self.check("7.2", "7.2", "precopy", "multifd", "postcopy")

    def test_10_0(self) -> None:
        """QEMU 10.0, out of and into 7.2."""
        self.check("10.0", "7.2", "multifd")
        self.check("7.2", "10.0", "postcopy")

    def test_11(self) -> None:
        """QEMU 11."""
        self.check("11", "11", "precopy", "multifd")

    def test_encrypted(self) -> None:
        """What the QEMUs say to each other is TLS."""
        pair = self.secure_pair("7.2").start()
        pair.begin("direct", "precopy", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        for guest, endpoint in ((pair.source, "client"), (pair.destination, "server")):
            self.assertEqual(settings_of(guest)["tls-creds"], "qmigd-tls")
            found = guest.qmp("qom-get", path="/objects/qmigd-tls", property="endpoint")
            self.assertEqual(found, endpoint)
            self.assertTrue(guest.qmp("qom-get", path="/objects/qmigd-tls", property="verify-peer"))
        pair.set(max_bandwidth=1 << 30)
        pair.completed()
        pair.prove_moved()

    def test_relay_comes_first(self) -> None:
        """By itself the plan takes the relay, which costs less, and says so."""
        pair = self.secure_pair("7.2").start()
        answer = pair.here.execute("query-features", guest=NAME, uri=pair.there.uri)
        self.assertEqual(answer["path"], "relay")
        self.assertIn("not direct: tls costs more there", answer["path-reason"])

    def test_identity(self) -> None:
        """The destination's QEMU is told to let in the source's certificate and no other."""
        pair = self.secure_pair("7.2").start()
        pair.begin("direct", "precopy", bandwidth=SLOW)
        pair.wait(pair.here, "active")
        identity = pair.destination.qmp(
            "qom-get", path="/objects/qmigd-tls-peer", property="identity"
        )
        self.assertEqual(identity, "CN=host.example")
        pair.cancel()
        self.assertIn("cancelled", pair.failed(pair.here))
        pair.prove_stayed()


def _reachable(uri: str) -> Reachable:
    address = parse_uri(uri)
    assert isinstance(address, TcpAddress)
    return address


class AskTests(TlsCase):
    """The question of a source that lost the connection, and does not know what became."""

    async def asked(self, daemon: Daemon, tls: TlsSide | None) -> str:
        """Ask about a migration that nobody knows; returns the code of the refusal."""
        try:
            await ask(reactor, _reachable(daemon.uri), str(uuid.uuid4()), bytes(32), 10, tls)
        except RemoteError as error:
            return error.code
        raise AssertionError("It was answered.")

    async def test_in_tls(self) -> None:
        """It is asked in TLS, if the migration was in TLS, and answered there."""
        pair = self.secure_pair(policy={"tls": "require"})
        pair.there.start()
        side = Security(self.host().store()).calling("127.0.0.1")
        self.assertEqual(await self.asked(pair.there, side), "unknown-migration")
        self.assertEqual(await self.asked(pair.there, None), "unknown-migration")


class RefusedCase(TlsCase):
    """What is refused; the guest goes on, and both sides say why."""

    def refused(self, pair: Pair, here: str, there: str, **options: Any) -> None:
        """Try it; the words are in the source's reason and in the destination's log."""
        options.setdefault("path", "relay")
        pair.begin(**options)
        self.assertIn(here, pair.failed(pair.here))
        self.assertIn(there, pair.there.log)
        pair.prove_stayed()
        self.assertEqual(pair.destination.status(), "inmigrate")

    def foreign(self) -> None:
        """A source of another CA."""
        other = Authority(self.mktemp(), "Other CA")
        files = other.host("host.example").trusting(self.authority, other)
        self.refused(
            self.secure_pair(here=files).start(),
            "not signed by a CA that the peer knows",
            "not signed by a CA that is trusted here",
        )


class RefusedTests(RefusedCase):
    def test_foreign(self) -> None:
        """A source of another CA."""
        self.foreign()

    def test_wrong_name(self) -> None:
        """A destination that has another host's certificate."""
        self.refused(
            self.secure_pair(there=self.host("other.example")).start(),
            "other.example",
            "other.example",
        )

    def test_hostname(self) -> None:
        """Unless the user says that this is the host that is meant."""
        pair = self.secure_pair(there=self.host("other.example")).start()
        named: dict[str, Any] = {"tls-hostname": "other.example"}
        pair.begin("relay", **named)
        pair.completed()
        pair.prove_moved()

    def test_not_allowed(self) -> None:
        """A source that the destination's ``allow`` does not name."""
        pair = self.secure_pair(allow=["elsewhere.example"]).start()
        self.refused(pair, "host.example", "host.example")

    def test_guest_not_allowed(self) -> None:
        """A guest that the source may not send."""
        pair = self.secure_pair(allow={"host.example": ["web*"]}).start()
        self.refused(pair, f"'{NAME}'", f"'{NAME}'")

    def test_guest_allowed(self) -> None:
        """A guest that it may."""
        pair = self.secure_pair(allow={"host.example": [f"{NAME[0]}*"]}).start()
        pair.move("relay")
        pair.prove_moved()

    def test_plain_source(self) -> None:
        """A source without certificates, where the destination requires TLS."""
        pair = self.secure_pair()
        del pair.here.config["tls"]
        pair.there.config["policy"] = {"tls": "require"}
        pair.start()
        self.refused(pair, "requires tls", "requires tls")

    def test_plain_destination(self) -> None:
        """A destination without certificates, where the source requires TLS."""
        pair = self.secure_pair(policy={"tls": "require"})
        del pair.there.config["tls"]
        pair.start()
        self.refused(pair, "tls is required but cannot be had", "")

    def test_plain_is_served(self) -> None:
        """Where neither requires it, a source without certificates is served as ever."""
        pair = self.secure_pair()
        del pair.here.config["tls"]
        pair.start()
        entry = pair.move("handover")
        self.assertNotIn("tls", entry["plan"]["features"])
        pair.prove_moved()

    def test_plain_beyond_loopback(self) -> None:
        """Where other hosts can reach it, a daemon with certificates serves nobody in clear."""
        link = self.link()
        files = self.host("there.example", link.right.address)
        pair = self.secure_pair(there=files, link=link, there_daemon={"insecure": False})
        tls = pair.here.config.pop("tls")
        pair.start()
        self.refused(pair, "requires tls", "requires tls")
        pair.here.stop()
        pair.here.config["tls"] = tls
        pair.here.start()
        pair.move("relay")
        pair.prove_moved()

    def test_switched_off(self) -> None:
        """``tls = "off"`` switches it off, whatever certificates there are."""
        pair = self.secure_pair(policy={"tls": "off"}).start()
        entry = pair.move("handover")
        left_out = {one["name"]: one["reason"] for one in entry["plan"]["left-out"]}
        self.assertIn("switched off", left_out["tls"])
        pair.prove_moved()
