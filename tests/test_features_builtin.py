"""The features that come with qmigd, and the registry that finds features."""

from __future__ import annotations

from typing import Any

from twisted.logger import LogLevel, capturedLogs
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import classImplements

from qmigd.errors import ArgumentError
from qmigd.features import multifd, postcopy, preempt, registry, zero_copy_receive
from qmigd.interfaces import Feature, GuestFacts, Host, IFeature, No, Role, Withdraw, ZeroCopy

ROLES: tuple[Role, ...] = ("source", "destination")

CAPABILITIES = dict.fromkeys(
    ("multifd", "postcopy-ram", "postcopy-preempt", "xbzrle", "x-ignore-shared"), False
)


def guest(parameters: dict[str, Any] | None = None, **on: bool) -> GuestFacts:
    """A guest in a QEMU with these capabilities on."""
    capabilities = {**CAPABILITIES, **{name.replace("_", "-"): True for name in on}}
    if parameters is None:
        parameters = {"multifd-channels": 2, "multifd-compression": "none"}
    return GuestFacts("vm", "qemu", (10, 0, 2), "pc-q35-10.0", capabilities, parameters)


def old_guest() -> GuestFacts:
    """A guest in a QEMU that knows nothing."""
    return GuestFacts("vm", "qemu", (2, 5, 0), "pc-q35-2.5", {}, {})


def agree(source_cpus: int, destination_cpus: int, **tunables: Any) -> dict[str, Any]:
    """What the two sides come to."""
    one = multifd.feature
    named = {name.replace("_", "-"): value for name, value in tunables.items()}
    proposal = one.propose(guest(), Host(source_cpus), named)
    agreement = one.answer(guest(), Host(destination_cpus), proposal)
    one.accept(proposal, agreement)
    return agreement


class MultifdTests(SynchronousTestCase):
    """The number of channels, and what both sides set."""

    def test_channels_follow_the_smaller_host(self) -> None:
        self.assertEqual(agree(4, 16)["channels"], 4)
        self.assertEqual(agree(16, 4)["channels"], 4)

    def test_channels_have_bounds(self) -> None:
        """From 2 to 8, whatever the hosts have."""
        self.assertEqual(agree(1, 1)["channels"], 2)
        self.assertEqual(agree(128, 96)["channels"], 8)

    def test_tunable_overrides(self) -> None:
        """A user's number is taken as it is."""
        self.assertEqual(agree(2, 2, multifd_channels=13)["channels"], 13)
        for wrong in (0, 256):
            error = self.assertRaises(ArgumentError, agree, 2, 2, multifd_channels=wrong)
            self.assertIn("multifd-channels cannot be", error.text)

    def test_both_sides_set_the_same(self) -> None:
        agreement = agree(2, 2, multifd_compression="zstd")
        source = multifd.feature.settings(agreement, "source")
        self.assertEqual(source, multifd.feature.settings(agreement, "destination"))
        self.assertEqual(source.capabilities, {"multifd": True})
        self.assertEqual(source.parameters, {"multifd-channels": 2, "multifd-compression": "zstd"})

    def test_channels_of_the_plan(self) -> None:
        (channels,) = multifd.feature.channels(agree(4, 4))
        self.assertEqual((channels.name, channels.count), ("multifd", 4))

    def test_old_destination_without_compression(self) -> None:
        """No compression is no obstacle for a QEMU that has none; another one is."""
        one = multifd.feature
        old = guest(parameters={})
        self.assertNotIn(
            "compression", one.answer(old, Host(2), {"cpus": 2, "compression": "none"})
        )
        self.assertRaises(Withdraw, one.answer, old, Host(2), {"cpus": 2, "compression": "zstd"})

    def test_senseless_proposals(self) -> None:
        """What no multifd would propose ends the migration."""
        for proposal in ({}, {"cpus": "x"}, {"cpus": 0}, {"channels": 0}, {"channels": 256}):
            self.assertRaises(ValueError, multifd.feature.answer, guest(), Host(2), proposal)

    def test_senseless_answers(self) -> None:
        """The source takes no other number than it asked for, and no other compression."""
        one = multifd.feature
        for proposal, agreement in (
            ({"cpus": 2}, {}),
            ({"channels": 3}, {"channels": 4}),
            ({"cpus": 2, "compression": "zstd"}, {"channels": 2}),
        ):
            self.assertRaises(ValueError, one.accept, proposal, agreement)

    def test_probe(self) -> None:
        """An old QEMU, or one with xbzrle on, cannot; the reason says so."""
        self.assertTrue(multifd.feature.probe_guest(guest(), "source"))
        self.assertFalse(multifd.feature.probe_guest(old_guest(), "source"))
        answer = multifd.feature.probe_guest(guest(xbzrle=True), "source")
        self.assertIn("xbzrle", answer.reason)  # type: ignore[union-attr]


class PostcopyTests(SynchronousTestCase):
    """postcopy-ram and postcopy-preempt."""

    def test_probe(self) -> None:
        for feature in (postcopy.feature, preempt.feature):
            self.assertTrue(feature.probe_guest(guest(), "destination"))
            self.assertFalse(feature.probe_guest(old_guest(), "destination"))
        self.assertFalse(postcopy.feature.probe_guest(guest(x_ignore_shared=True), "source"))

    def test_settings(self) -> None:
        for feature in (postcopy.feature, preempt.feature):
            for role in ROLES:
                settings = feature.settings({}, role)
                self.assertEqual(settings.capabilities, {feature.name: True})

    def test_preempt_builds_on_postcopy(self) -> None:
        self.assertEqual(preempt.feature.requires, {postcopy.feature.name})
        self.assertEqual([c.name for c in preempt.feature.channels({})], ["preempt"])


class Named(Feature):
    """A feature of some name."""

    def __init__(self, name: Any) -> None:
        self.name = name
        self.summary = "nothing"


class Half:
    """A feature that misses most of what one has to have."""

    name = "half"


classImplements(Half, IFeature)  # type: ignore[misc]


class ZeroCopyReceiveTests(SynchronousTestCase):
    """Each side moves bytes as is cheapest there, and the agreement says how."""

    one = zero_copy_receive.feature

    def agree(self, send: str, receive: str) -> dict[str, Any]:
        """What a source that sends so and a destination that receives so come to."""
        source, destination = Host(1, zero_copy=ZeroCopy(send)), Host(1)
        destination = Host(1, zero_copy=ZeroCopy(receive=receive))
        proposal = self.one.propose(guest(), source, {})
        agreement = self.one.answer(guest(), destination, proposal)
        self.one.accept(proposal, agreement)
        return agreement

    def test_offered_by_who_gains(self) -> None:
        """In one direction at least; otherwise the host's own reason is given."""
        refusal = No("a copy is cheaper")
        self.assertIs(self.one.probe_host(Host(1, zero_copy=ZeroCopy(obstacle=refusal))), refusal)
        for gains in (ZeroCopy("splice"), ZeroCopy(receive="zerocopy")):
            self.assertTrue(self.one.probe_host(Host(1, zero_copy=gains)))

    def test_not_known_yet(self) -> None:
        """Before anything was measured it is not offered, and says so."""
        answer = self.one.probe_host(Host(1))
        assert isinstance(answer, No)
        self.assertIn("not known yet", answer.reason)

    def test_each_side_its_own(self) -> None:
        """A side for which a copy is the cheapest copies."""
        for send, receive in (("splice", "zerocopy"), ("copy", "splice"), ("zerocopy", "copy")):
            agreement = self.agree(send, receive)
            self.assertEqual(agreement, {"send": send, "receive": receive})
            self.assertEqual(self.one.mover(agreement, "source"), send)
            self.assertEqual(self.one.mover(agreement, "destination"), receive)

    def test_nobody_gains_in_this_direction(self) -> None:
        """Both hosts gain by it, but not this way round: it is withdrawn."""
        self.assertRaises(Withdraw, self.agree, "copy", "copy")

    def test_senseless(self) -> None:
        """What no daemon would say ends the migration."""
        for proposal in ({}, {"send": 1}):
            self.assertRaises(ValueError, self.one.answer, guest(), Host(1), proposal)
        for agreement in ({}, {"send": "splice"}, {"send": "copy", "receive": "splice"}):
            self.assertRaises(ValueError, self.one.accept, {"send": "splice"}, agreement)


class RegistryTests(SynchronousTestCase):
    """What is usable is there; the rest is logged by name and left out."""

    def errors(self, *found: object) -> tuple[list[str], str]:
        with capturedLogs() as logs:
            features = registry.collect([(f"origin-{n}", one) for n, one in enumerate(found)])
        said = [str(e) for e in logs if e["log_level"] is LogLevel.error]
        return list(features), " ".join(said)

    def test_built_in_features_are_found(self) -> None:
        """By their entry points, like everybody's."""
        found = registry.load_features()
        self.assertTrue({"multifd", "postcopy-ram", "postcopy-preempt"} <= found.keys())

    def test_incomplete_feature(self) -> None:
        names, said = self.errors(Half(), Named("good"))
        self.assertEqual(names, ["good"])
        self.assertIn("origin-0", said)
        self.assertIn("probe_host", said)

    def test_not_a_feature_at_all(self) -> None:
        names, said = self.errors(object(), Named("good"))
        self.assertEqual(names, ["good"])
        self.assertIn("origin-0", said)

    def test_name_taken(self) -> None:
        """The first one stays."""
        names, said = self.errors(Named("same"), Named("same"))
        self.assertEqual(names, ["same"])
        self.assertIn("origin-1", said)

    def test_impossible_names(self) -> None:
        """No name, one that does not fit the wire, or that of a path."""
        for name in (None, "", "x" * 256, "schön", "direct"):
            names, said = self.errors(Named(name))
            self.assertEqual(names, [])
            self.assertIn("origin-0", said)

    def test_impossible_paths(self) -> None:
        feature = Named("lost")
        feature.paths = frozenset({"pigeon"})
        self.assertEqual(self.errors(feature)[0], [])

    def test_impossible_transports(self) -> None:
        feature = Named("lost")
        feature.transports = frozenset({"pigeon"})
        self.assertEqual(self.errors(feature)[0], [])
