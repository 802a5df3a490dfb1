"""Who may send which guests: :mod:`qmigd.negotiation.allow`."""

from __future__ import annotations

import fnmatch
import ipaddress

from hypothesis import assume, given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.negotiation.allow import Allow, PeerNames

HOSTA = PeerNames(("hosta.example",))
HOSTB = PeerNames(("hostb.dc1.example",))
ADDRESS = PeerNames((), (ipaddress.ip_address("192.0.2.7"),))

labels = st.from_regex("[a-z][a-z0-9]{0,3}", fullmatch=True)
hosts = st.lists(labels, min_size=1, max_size=4).map(".".join)


class PeerTests(SynchronousTestCase):
    def assert_permitted(self, pattern: str, names: PeerNames) -> None:
        self.assertIsNone(Allow.of([pattern]).permits_peer(names))

    def assert_refused(self, pattern: str, names: PeerNames) -> None:
        self.assertIsNotNone(Allow.of([pattern]).permits_peer(names))

    def test_absent(self) -> None:
        """Without 'allow' every peer may send every guest."""
        self.assertIsNone(Allow().permits_peer(PeerNames()))
        self.assertIsNone(Allow().permits_guest(HOSTA, "web1"))

    def test_empty(self) -> None:
        """With an empty one nobody may."""
        for allow in (Allow.of([]), Allow.of({}), Allow.of({"*": []})):
            self.assertIsNotNone(allow.permits_peer(HOSTA))
            self.assertIsNotNone(allow.permits_guest(HOSTA, "web1"))

    def test_names(self) -> None:
        """A name is for that peer, in any case of letters."""
        self.assert_permitted("HostA.Example.", HOSTA)
        self.assert_permitted("hosta.example", PeerNames(("HOSTA.example.",)))
        self.assert_refused("hosta.example", HOSTB)
        self.assert_refused("hosta.example", PeerNames())

    def test_wildcards(self) -> None:
        """A wildcard stands for something within one label, and alone for every peer."""
        self.assert_permitted("*.dc1.example", HOSTB)
        self.assert_permitted("host*.dc1.example", HOSTB)
        self.assert_permitted("*.*.example", HOSTB)
        self.assert_permitted("*", HOSTA)
        self.assert_permitted("*", PeerNames())
        for name in ("dc1.example", "a.b.dc1.example", "a.dc2.example"):
            self.assert_refused("*.dc1.example", PeerNames((name,)))

    def test_wildcard_in_a_certificate(self) -> None:
        """A certificate for a whole domain is not the one host that is allowed."""
        names = PeerNames(("*.dc1.example",))
        self.assert_refused("hosta.dc1.example", names)
        self.assert_permitted("*.dc1.example", names)

    def test_addresses(self) -> None:
        """An address is for itself, a network for all in it, and neither for a name."""
        for pattern in ("192.0.2.7", "192.0.2.0/24", "0.0.0.0/0"):
            self.assert_permitted(pattern, ADDRESS)
        for pattern in ("192.0.2.8", "198.51.100.0/24", "2001:db8::/32", "192.0.2.7.example"):
            self.assert_refused(pattern, ADDRESS)
        self.assert_permitted(
            "2001:db8::/32", PeerNames((), (ipaddress.ip_address("2001:db8::7"),))
        )
        self.assert_refused("192.0.2.7", PeerNames(("192.0.2.7",)))

    def test_any_name_will_do(self) -> None:
        """Of several names in a certificate one has to be allowed."""
        self.assert_permitted("b.example", PeerNames(("a.example", "b.example")))

    def test_sentence(self) -> None:
        """A refusal has the names in the certificate and what is in the way, but not the list."""
        self.assertEqual(
            "the source's certificate is for hostb.dc1.example, which the destination's "
            "'allow' does not have",
            Allow.of(["hosta.example"]).permits_peer(HOSTB),
        )

    def test_bad_patterns(self) -> None:
        """A pattern that could never be for any peer is refused with the reason."""
        for pattern, sentence in (
            ("", "'' is no name"),
            ("a..b", "'a..b' is no name"),
            ("a b", "is no name"),
            ("-a", "is no name"),
            ("a/b", "is no name"),
            ("x" * 64, "is no name"),
            (".".join(["x" * 50] * 6), "is no name"),
            ("bücher.example", "as in the certificate, 'xn--...'"),
            ("192.0.2.7/24", "is not a network; did you mean '192.0.2.0/24'?"),
            ("fe80::1%eth0", "has a scope"),
            ("192.0.2.0/33", "is no name"),
        ):
            error = self.assertRaises(ValueError, Allow.of, [pattern])
            self.assertIn(sentence, str(error))

    @given(hosts, hosts)
    def test_plain_names(self, one: str, other: str) -> None:
        """A pattern without wildcards is for that very name and for no other."""
        self.assert_permitted(one, PeerNames((one,)))
        assume(one != other)
        self.assert_refused(one, PeerNames((other,)))

    @given(hosts, st.data())
    def test_label_for_label(self, host: str, data: st.DataObject) -> None:
        """Whichever labels are replaced by wildcards, it is allowed still; a longer is not."""
        parts = host.split(".")
        pattern = ".".join(data.draw(st.sampled_from([part, "*", f"{part[0]}*"])) for part in parts)
        self.assert_permitted(pattern, PeerNames((host,)))
        if pattern != "*":
            self.assert_refused(pattern, PeerNames((f"x.{host}",)))

    @given(st.ip_addresses(), st.data())
    def test_networks(self, address: ipaddress.IPv4Address, data: st.DataObject) -> None:
        """An address is in each of its networks."""
        bits = data.draw(st.integers(0, address.max_prefixlen))
        network = ipaddress.ip_network((address, bits), strict=False)
        self.assert_permitted(str(network), PeerNames((), (address,)))

    @given(st.lists(st.text(max_size=20), max_size=8), st.lists(st.ip_addresses(), max_size=3))
    def test_anything(self, dns: list[str], addresses: list[ipaddress.IPv4Address]) -> None:
        """Whatever a certificate has for names, there is an answer, in one printable line."""
        reason = Allow.of(["hosta.example"]).permits_peer(PeerNames(tuple(dns), tuple(addresses)))
        self.assertTrue(reason is None or reason.isprintable())


class GuestTests(SynchronousTestCase):
    ALLOW = Allow.of(
        {"hosta.example": ["web*", "db1"], "*.dc1.example": ["*"], "*": ["test-*-x", "Big"]}
    )

    def test_lists(self) -> None:
        """A peer may send what is listed for it, and what is listed for all."""
        for names, good, bad in (
            (HOSTA, ("web1", "web", "db1", "test-1-x"), ("db2", "aweb", "", "test--", "big")),
            (HOSTB, ("anything", "web*", "\n"), ()),
            (ADDRESS, ("test-1-x", "test--x", "Big"), ("web1", "test-x", "big")),
        ):
            self.assertIsNone(self.ALLOW.permits_peer(names))
            for guest in good:
                self.assertIsNone(self.ALLOW.permits_guest(names, guest), guest)
            for guest in bad:
                self.assertIsNotNone(self.ALLOW.permits_guest(names, guest), guest)

    def test_list_of_peers(self) -> None:
        """A list of peers without guests lets them send every guest, and others none."""
        allow = Allow.of(["hosta.example"])
        self.assertIsNone(allow.permits_guest(HOSTA, "web1"))
        self.assertIsNotNone(allow.permits_guest(HOSTB, "web1"))

    def test_only_a_star_is_special(self) -> None:
        """A question mark or a bracket in a guest's name is just that."""
        allow = Allow.of({"*": ["a?", "b[1]"]})
        self.assertIsNone(allow.permits_guest(HOSTA, "a?"))
        self.assertIsNone(allow.permits_guest(HOSTA, "b[1]"))
        self.assertIsNotNone(allow.permits_guest(HOSTA, "ab"))
        self.assertIsNotNone(allow.permits_guest(HOSTA, "b1"))

    def test_sentence(self) -> None:
        """A refusal names the guest, the peer, and where to look."""
        self.assertEqual(
            "the destination's 'allow' does not let hosta.example send the guest 'db2'",
            self.ALLOW.permits_guest(HOSTA, "db2"),
        )

    @given(st.text("ab*", max_size=6), st.text("ab", max_size=8))
    def test_like_a_shell(self, pattern: str, guest: str) -> None:
        """A star means what it means in a shell."""
        allow = Allow.of({"*": [pattern]})
        self.assertEqual(
            fnmatch.fnmatchcase(guest, pattern), allow.permits_guest(HOSTA, guest) is None
        )

    @given(st.lists(hosts, max_size=3), hosts, st.lists(st.text("ab", max_size=2), max_size=3))
    def test_more_entries_never_take_away(
        self, others: list[str], host: str, guests: list[str]
    ) -> None:
        """Whoever may send a guest still may when other entries are added."""
        entries: dict[str, list[str]] = {host: guests}
        names = PeerNames((host,))
        more = Allow.of({**{key: ["x"] for key in others}, **entries})
        for guest in guests:
            self.assertIsNone(Allow.of(entries).permits_guest(names, guest))
            self.assertIsNone(more.permits_guest(names, guest))
