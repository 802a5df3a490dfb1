"""The choice of features and path: :mod:`qmigd.negotiation`."""

from __future__ import annotations

import contextlib
import itertools

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import FeatureError, ProtocolError
from qmigd.interfaces import DIRECT, GUEST, HANDOVER, HOST, PATHS, PLACES, RELAY, No, Role
from qmigd.negotiation.obstacles import Obstacle
from qmigd.negotiation.plan import Plan
from qmigd.negotiation.policy import Policy
from qmigd.negotiation.select import Choice, choose
from qmigd.negotiation.terms import Conflict, Terms, Traits

SECURITY, CERTAINTY, SPEED, THRIFT = 4, 3, 2, 1
MANY = frozenset({DIRECT, RELAY})

TRAITS = {
    "many": Traits(SPEED, paths=MANY),
    "sure": Traits(CERTAINTY),
    "urgent": Traits(SPEED, requires=frozenset({"sure"}), paths=MANY),
    "secret": Traits(SECURITY, excludes=frozenset({"wild"}), paths=frozenset({HANDOVER, RELAY})),
    "wild": Traits(SPEED, paths=frozenset({DIRECT})),
    "packed": Traits(SPEED, paths=frozenset({RELAY})),
    "thrifty": Traits(THRIFT, paths=frozenset({RELAY})),
    "asked": Traits(0, excludes=frozenset({"many"})),
    "more": Traits(SPEED, requires=frozenset({"asked"})),
    "sealed": Traits(
        SECURITY,
        paths=frozenset({DIRECT, RELAY}),
        paths_with={"kernel": frozenset({HANDOVER})},
        avoids=frozenset({DIRECT}),
    ),
    "kernel": Traits(SECURITY, requires=frozenset({"sealed"})),
}


def terms(**said: object) -> Terms:
    return Terms(TRAITS, **said)  # type: ignore[arg-type]


def said(choice: Choice) -> dict[str, str]:
    """What users are told of those that were left out."""
    return {name: str(obstacle) for name, obstacle in choice.left_out.items()}


class SecurityTests(SynchronousTestCase):
    """What is there for security goes first, and only a demand turns that round."""

    def test_preference(self) -> None:
        """A preference for what excludes it does not switch it off."""
        choice = choose(["secret", "wild"], terms(prefer=("wild",)), terms())
        self.assertEqual(choice.features, ("secret",))
        self.assertEqual(said(choice), {"wild": "conflict: it cannot be combined with secret"})

    def test_preferred_path(self) -> None:
        """Nor does one for a path that cannot carry it."""
        choice = choose(["secret"], terms(prefer=(DIRECT,)), terms())
        self.assertEqual((choice.features, choice.path), (("secret",), HANDOVER))

    def test_requirement(self) -> None:
        """A requirement does."""
        choice = choose(["secret", "wild"], terms(require=("wild",)), terms())
        self.assertEqual(choice.features, ("wild",))


class HelpedPathTests(SynchronousTestCase):
    """Paths that a feature takes only with another one's help, or only if it must."""

    def test_alone(self) -> None:
        """Without the other one it cannot take that path."""
        choice = choose(["sealed"], terms(), terms())
        self.assertEqual((choice.features, choice.path), (("sealed",), RELAY))
        self.assertIn("not handover: it cannot carry sealed", choice.path_reason)

    def test_together(self) -> None:
        """With it, it can."""
        choice = choose(["sealed", "kernel"], terms(), terms())
        self.assertEqual((choice.features, choice.path), (("kernel", "sealed"), HANDOVER))

    def test_one_side_knows_no_help(self) -> None:
        """Both sides have to know of it."""
        older = Terms({**TRAITS, "sealed": Traits(SECURITY, paths=frozenset({RELAY}))})
        for here, there in ((terms(), older), (older, terms())):
            self.assertEqual(choose(["sealed", "kernel"], here, there).path, RELAY)

    def test_avoided(self) -> None:
        """A path that it avoids is taken where no other one carries everything."""
        closed = {RELAY: "no", HANDOVER: "no"}
        self.assertEqual(choose(["sealed"], terms(closed=closed), terms()).path, DIRECT)

    def test_avoided_but_wanted(self) -> None:
        """Or where somebody wants it."""
        for wish in ({"prefer": (DIRECT,)}, {"require": (DIRECT,)}):
            self.assertEqual(choose(["sealed"], terms(**wish), terms()).path, DIRECT)

    def test_required_path(self) -> None:
        """A path that is required and that it cannot take leaves it out, with the reason."""
        choice = choose(["sealed"], terms(require=(HANDOVER,)), terms())
        self.assertEqual(choice.features, ())
        self.assertIn("path: it needs another path (direct, relay)", said(choice)["sealed"])

    def test_wire(self) -> None:
        """The peer hears all of it."""
        heard = Terms.from_wire(terms().to_wire())
        self.assertEqual(heard, terms())


class FeatureChoiceTests(SynchronousTestCase):
    """Which features are chosen, and what is said of the others."""

    def test_everything_possible_is_chosen(self) -> None:
        """Features that do not get in each other's way are all chosen, unasked."""
        choice = choose(["urgent", "sure", "many"], terms(), terms())
        self.assertEqual(choice.features, ("many", "sure", "urgent"))
        self.assertEqual(choice.left_out, {})

    def test_conflict_goes_to_the_higher_rank(self) -> None:
        """Of two that the QEMUs cannot combine, certainty is taken before speed."""
        conflict = Conflict(frozenset({"many", "sure"}), "this QEMU crashes")
        choice = choose(["many", "sure"], terms(), terms(conflicts=(conflict,)))
        self.assertEqual(choice.features, ("sure",))
        self.assertEqual(
            said(choice), {"many": "conflict: not together with sure: this QEMU crashes"}
        )

    def test_preference_turns_the_order_round(self) -> None:
        """What the source prefers is taken first, whatever its rank."""
        conflict = Conflict(frozenset({"many", "sure"}), "this QEMU crashes")
        choice = choose(
            ["many", "sure", "urgent"], terms(prefer=("many",)), terms(conflicts=(conflict,))
        )
        self.assertEqual(choice.features, ("many",))
        self.assertIn("sure", choice.left_out)
        self.assertEqual(
            said(choice)["urgent"],
            "conflict: not together with many and sure: this QEMU crashes",
        )

    def test_conflict_of_three_needs_all_three(self) -> None:
        """A combination of three leaves any two of them possible."""
        conflict = Conflict(frozenset({"many", "sure", "urgent"}), "it hangs")
        choice = choose(["many", "sure", "urgent"], terms(), terms(conflicts=(conflict,)))
        self.assertEqual(choice.features, ("many", "sure"))

    def test_required_goes_before_preferred(self) -> None:
        """What is required comes first, and what contradicts it is left out."""
        choice = choose(["secret", "wild"], terms(prefer=("secret",)), terms(require=("wild",)))
        self.assertEqual(choice.features, ("wild",))
        self.assertEqual(said(choice), {"secret": "conflict: it cannot be combined with wild"})

    def test_required_that_cannot_be_had_refuses(self) -> None:
        """The error names the feature and the reason that is known for it."""
        error = self.assertRaises(
            FeatureError,
            choose,
            ["sure"],
            terms(require=("many",)),
            terms(),
            {"many": Obstacle("no CPU", HOST, "source")},
        )
        self.assertEqual(error.text, "many is required but cannot be had: source host: no CPU")

    def test_two_required_that_conflict_refuse(self) -> None:
        """Two required features that exclude each other are an error, not a choice."""
        self.assertRaises(
            FeatureError, choose, ["secret", "wild"], terms(require=("secret", "wild")), terms()
        )

    def test_feature_without_its_requirement(self) -> None:
        """A feature whose requirement one side has given up is left out with that reason."""
        choice = choose(["urgent"], terms(), terms())
        self.assertEqual(choice.features, ())
        self.assertEqual(said(choice), {"urgent": "conflict: it needs sure, which cannot be had"})

    def test_on_request(self) -> None:
        """What gains nothing by itself is taken only if it is named, by either side."""
        for source, destination in (
            (terms(), terms(prefer=("asked",))),
            (terms(require=("asked",)), terms()),
        ):
            choice = choose(["asked", "many"], source, destination)
            self.assertEqual(choice.features, ("asked",))
            self.assertEqual(said(choice), {"many": "conflict: it cannot be combined with asked"})
        choice = choose(["asked", "more"], terms(prefer=("asked",)), terms())
        self.assertEqual(choice.features, ("asked", "more"))
        choice = choose(["asked", "more"], terms(), terms())
        self.assertEqual(choice.features, ())
        self.assertIn(
            "policy: it needs asked, which is offered, and taken only", said(choice)["more"]
        )
        choice = choose(["asked", "many"], terms(), terms(prefer=("sure",)))
        self.assertEqual(choice.features, ("many",))
        self.assertIn(
            "policy: it is offered, and taken only with '--prefer asked'", said(choice)["asked"]
        )

    def test_traits_of_both_sides_count(self) -> None:
        """A feature excludes what either side's version of it excludes."""
        stricter = Terms({**TRAITS, "many": Traits(SPEED, excludes=frozenset({"sure"}))})
        choice = choose(["many", "sure"], terms(), stricter)
        self.assertEqual(choice.features, ("sure",))


class PathChoiceTests(SynchronousTestCase):
    """Which path is taken, and why."""

    def test_one_channel_is_handed_over(self) -> None:
        self.assertEqual(choose(["sure"], terms(), terms()).path, HANDOVER)

    def test_several_channels_go_directly(self) -> None:
        """The reason says what a handover could not carry."""
        choice = choose(["many"], terms(), terms())
        self.assertEqual(choice.path, DIRECT)
        self.assertIn("not handover: it cannot carry many", choice.path_reason)

    def test_closed_path(self) -> None:
        """Where the destination offers no ports, several channels take the relay."""
        choice = choose(["many"], terms(), terms(closed={DIRECT: "no ports here"}))
        self.assertEqual(choice.path, RELAY)
        self.assertIn("not direct: no ports here", choice.path_reason)

    def test_conflict_with_a_path(self) -> None:
        """What is for speed, and must not be had on its path, is no reason for a dearer one."""
        bad = terms(conflicts=(Conflict(frozenset({"many", DIRECT}), "this QEMU crashes"),))
        choice = choose(["many", "sure"], bad, terms())
        self.assertEqual((choice.path, choice.features), (HANDOVER, ("sure",)))
        reason = "conflict: not together with direct: this QEMU crashes"
        self.assertEqual(said(choice), {"many": f"{reason}; handover is better than the rest"})
        choice = choose(["many", "sure", "wild"], bad, terms())
        self.assertEqual((choice.path, choice.features), (DIRECT, ("sure", "wild")))
        choice = choose(["many", "sure", "packed"], terms(), bad)
        self.assertEqual((choice.path, choice.features), (RELAY, ("many", "packed", "sure")))

    def test_conflict_with_a_path_and_a_wish(self) -> None:
        """Whoever names such a feature gets the path that is left; whoever names the path, that."""
        bad = terms(conflicts=(Conflict(frozenset({"many", DIRECT}), "this QEMU crashes"),))
        for wish in ({"require": ("many",)}, {"prefer": ("many",)}, {"prefer": (DIRECT, "many")}):
            choice = choose(["many", "sure"], bad, terms(**wish))
            self.assertEqual((choice.path, choice.features), (RELAY, ("many", "sure")))
            self.assertIn(
                "not direct: not together with many: this QEMU crashes", choice.path_reason
            )
        for wish in ({"require": (DIRECT,)}, {"prefer": (DIRECT,)}):
            choice = choose(["many", "sure"], bad, terms(**wish))
            self.assertEqual((choice.path, choice.features), (DIRECT, ("sure",)))
            reason = "conflict: not together with direct: this QEMU crashes"
            self.assertEqual(said(choice), {"many": reason})
        choice = choose(["many", "sure"], bad, terms(prefer=(RELAY,)))
        self.assertEqual((choice.path, choice.features), (RELAY, ("many", "sure")))
        error = self.assertRaises(
            FeatureError, choose, ["many"], bad, terms(require=(DIRECT, "many"))
        )
        self.assertIn("not together with direct: this QEMU crashes", error.text)

    def test_features_decide_the_path(self) -> None:
        """A feature that only a relay can carry brings one about."""
        self.assertEqual(choose(["many", "packed"], terms(), terms()).path, RELAY)

    def test_thrift_decides_no_path(self) -> None:
        """What only saves CPU time comes along on its path, and is no reason to take it."""
        choice = choose(["many", "thrifty"], terms(), terms())
        self.assertEqual((choice.features, choice.path), (("many",), DIRECT))
        self.assertEqual(
            said(choice),
            {"thrifty": "path: it gains on the path relay only, and direct is better than that"},
        )
        for wish in ({"require": (RELAY,)}, {"prefer": (RELAY,)}, {"closed": {DIRECT: "no"}}):
            choice = choose(["many", "thrifty"], terms(**wish), terms())
            self.assertEqual((choice.features, choice.path), (("many", "thrifty"), RELAY))
        choice = choose(["many", "packed", "thrifty"], terms(), terms())
        self.assertEqual(choice.features, ("many", "packed", "thrifty"))

    def test_thrift_that_is_wanted(self) -> None:
        """Whoever prefers or requires it takes its path as well."""
        for wish in ({"prefer": ("thrifty",)}, {"require": ("thrifty",)}):
            choice = choose(["many", "thrifty"], terms(), terms(**wish))
            self.assertEqual((choice.features, choice.path), (("many", "thrifty"), RELAY))

    def test_no_common_path(self) -> None:
        """Two features without a common path: the lower one is left out and says so."""
        choice = choose(["packed", "wild"], terms(), terms())
        self.assertEqual(choice.features, ("packed",))
        self.assertEqual(
            said(choice), {"wild": "path: no open path carries it together with packed"}
        )

    def test_required_path_leaves_features_out(self) -> None:
        choice = choose(["many", "sure"], terms(require=(HANDOVER,)), terms())
        self.assertEqual((choice.path, choice.features), (HANDOVER, ("sure",)))
        self.assertIn("many", choice.left_out)

    def test_preferred_path_comes_before_what_nobody_asked_for(self) -> None:
        """A feature that the preferred path cannot carry is taken only if it is named."""
        choice = choose(["wild", "sure"], terms(prefer=(RELAY,)), terms())
        self.assertEqual((choice.path, choice.features), (RELAY, ("sure",)))
        self.assertEqual(
            said(choice),
            {"wild": "path: it needs another path (direct) than is open or preferred (relay)"},
        )
        choice = choose(["wild", "sure"], terms(prefer=(RELAY,)), terms(prefer=("wild",)))
        self.assertEqual((choice.path, choice.features), (DIRECT, ("sure", "wild")))

    def test_preferred_path(self) -> None:
        choice = choose(["sure"], terms(prefer=(RELAY,)), terms())
        self.assertEqual(choice.path, RELAY)
        self.assertIn("preferred", choice.path_reason)

    def test_required_path_that_is_closed(self) -> None:
        error = self.assertRaises(
            FeatureError, choose, [], terms(require=(DIRECT,)), terms(closed={DIRECT: "no ports"})
        )
        self.assertIn("no ports", error.text)

    def test_two_required_paths(self) -> None:
        self.assertRaises(
            FeatureError, choose, [], terms(require=(DIRECT,)), terms(require=(RELAY,))
        )

    def test_all_closed(self) -> None:
        closed = dict.fromkeys(PATHS, "shut")
        self.assertRaises(FeatureError, choose, [], terms(closed=closed), terms())


names = st.sampled_from(["a", "b", "c", "d", "e"])
traits = st.builds(
    Traits,
    st.integers(1, 3),
    st.frozensets(names, max_size=2),
    st.frozensets(names, max_size=1),
    st.frozensets(st.sampled_from(PATHS), min_size=1),
)
random_terms = st.builds(
    Terms,
    st.dictionaries(names, traits),
    st.lists(
        st.builds(
            Conflict,
            st.frozensets(st.one_of(names, st.sampled_from(PATHS)), min_size=2, max_size=3),
            st.text(),
        ),
        max_size=2,
    ).map(tuple),
    st.lists(st.one_of(names, st.sampled_from(PATHS)), max_size=3).map(tuple),
    st.lists(st.one_of(names, st.sampled_from(PATHS)), max_size=1).map(tuple),
    st.dictionaries(st.sampled_from(PATHS), st.text(min_size=1), max_size=2),
)


class ChoicePropertyTests(SynchronousTestCase):
    """What holds for any terms whatever."""

    @given(st.frozensets(names), random_terms, random_terms)
    def test_choice_is_sound(
        self, candidates: frozenset[str], source: Terms, destination: Terms
    ) -> None:
        """Nothing chosen contradicts anything else chosen; all others have a reason."""
        try:
            choice = choose(candidates, source, destination)
        except FeatureError:
            return
        chosen = set(choice.features)
        both = {
            name: source.traits[name] & destination.traits[name]
            for name in candidates & source.traits.keys() & destination.traits.keys()
        }
        self.assertTrue(chosen <= both.keys())
        self.assertEqual(chosen | choice.left_out.keys(), both.keys())
        self.assertFalse(chosen & choice.left_out.keys())
        for name in chosen:
            self.assertTrue(both[name].requires <= chosen)
            self.assertFalse(both[name].excludes & chosen - {name})
            self.assertIn(choice.path, both[name].paths)
        for conflict in (*source.conflicts, *destination.conflicts):
            self.assertFalse(conflict.features <= {*chosen, choice.path})
        self.assertNotIn(choice.path, {**source.closed, **destination.closed})
        for name in (*source.require, *destination.require):
            self.assertIn(name, {*chosen, choice.path})

    @given(st.lists(names), random_terms, random_terms)
    def test_order_of_candidates_is_of_no_account(
        self, candidates: list[str], source: Terms, destination: Terms
    ) -> None:
        """Both sides come to the same choice, in whatever order they put the names."""
        outcomes = []
        for order in itertools.islice(itertools.permutations(candidates), 4):
            try:
                outcomes.append(str(choose(order, source, destination)))
            except FeatureError as error:
                outcomes.append(error.text)
        self.assertEqual(len(set(outcomes)), 1)

    @given(random_terms)
    def test_terms_survive_the_wire(self, some: Terms) -> None:
        """What the peer reads is what was written."""
        self.assertEqual(Terms.from_wire(some.to_wire()), some)

    @given(
        st.recursive(
            st.one_of(st.none(), st.integers(), st.text(), st.booleans()),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(
                    st.sampled_from(["traits", "conflicts", "prefer", "closed", "rank", "x"]),
                    inner,
                ),
            ),
        ).filter(lambda value: isinstance(value, dict))
    )
    def test_hostile_terms(self, body: dict[str, object]) -> None:
        """Whatever JSON a peer sends as terms is read, or is a ProtocolError."""
        with contextlib.suppress(ProtocolError):
            Terms.from_wire(body)


class PolicyTests(SynchronousTestCase):
    """The operator's policy and the wishes of one migration."""

    def test_wishes_of_a_migration_come_first(self) -> None:
        policy = Policy(prefer=("a",), exclude=("x",)).narrowed(["b"], ["r"], ["y"])
        self.assertEqual(policy, Policy(("b", "a"), ("r",), ("x", "y")))

    def test_legacy(self) -> None:
        """What is done where nobody greets: the operator's default, and one migration's choice."""
        self.assertEqual("refuse", Policy().narrowed().legacy)
        self.assertEqual("allow", Policy(legacy="allow").narrowed().legacy)
        self.assertEqual("allow", Policy().narrowed(legacy="allow").legacy)
        self.assertEqual("refuse", Policy(legacy="allow").narrowed(legacy="refuse").legacy)

    def test_operator_has_the_last_word(self) -> None:
        """Requiring what the operator excludes, or the reverse, is refused by name."""
        self.assertIn(
            "x", self.assertRaises(FeatureError, Policy(exclude=("x",)).narrowed, (), ["x"]).text
        )
        self.assertIn(
            "x",
            self.assertRaises(FeatureError, Policy(require=("x",)).narrowed, (), (), ["x"]).text,
        )

    def test_contradiction_in_itself(self) -> None:
        self.assertRaises(FeatureError, Policy().narrowed, (), ["x"], ["x"])
        self.assertRaises(FeatureError, Policy().narrowed, ["x"], (), ["x"])

    def test_unknown_names(self) -> None:
        self.assertEqual(Policy(("a",), ("b",), ("c",)).unknown(["b"]), ("a", "c"))


class ObstacleTests(SynchronousTestCase):
    """The one form of all reasons."""

    def test_form(self) -> None:
        """Whose it is stands before where it is, and nobody's has no side."""
        sides: tuple[Role | None, ...] = ("source", None)
        shown = {
            (side, place): str(Obstacle("no", place, side)) for side in sides for place in PLACES
        }
        for place in ("host", "kernel", "process", "guest"):
            self.assertEqual(shown["source", place], f"source {place}: no")
        self.assertEqual(shown["source", "policy"], "policy of the source: no")
        for place in ("conflict", "path"):
            self.assertEqual(shown["source", place], f"{place}: no")
        for place in PLACES:
            self.assertEqual(shown[None, place], f"{place}: no")

    def test_place_of_an_answer(self) -> None:
        """A feature says where, or leaves it to the moment at which it was asked."""
        self.assertEqual(Obstacle.of(No("a", GUEST), HOST), Obstacle("a", GUEST))
        self.assertEqual(Obstacle.of(No("a"), HOST, "source"), Obstacle("a", HOST, "source"))

    def test_wire_form(self) -> None:
        """What comes over the wire is the peer's; a place of the future is its QEMU."""
        one = Obstacle("no", GUEST, "destination")
        self.assertEqual(Obstacle.from_wire(one.to_wire("why"), "why", "destination"), one)
        strange: tuple[object, ...] = ("future", 7, None, [])
        for where in strange:
            body = {"why": "no", "where": where}
            self.assertEqual(
                Obstacle.from_wire(body, "why", "source"), Obstacle("no", "process", "source")
            )
        self.assertRaises(ProtocolError, Obstacle.from_wire, {"why": 1}, "why", "source")


class PlanTests(SynchronousTestCase):
    """The plan that both sides must have alike."""

    def test_same_plan(self) -> None:
        """Reasons are each side's own words and are not compared."""
        plan = Plan(DIRECT, ("many",), {"many": {"n": 2}}, (("main", 0), ("many", 0)), "because")
        Plan(DIRECT, ("many",), {"many": {"n": 2}}, (("main", 0), ("many", 0))).verify(
            plan.to_wire()
        )

    def test_different_plan(self) -> None:
        """A difference is an error that names it, and never a guess."""
        error = self.assertRaises(ProtocolError, Plan(DIRECT).verify, Plan(RELAY).to_wire())
        self.assertEqual(error.code, "plan-differs")
        self.assertIn("path", error.text)
