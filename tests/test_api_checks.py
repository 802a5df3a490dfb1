"""Arguments and values against their declarations, and what is said when they do not fit."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.api import (
    ANY,
    BOOL,
    COMMANDS,
    DICT,
    INT,
    NUMBER,
    STR,
    Enum,
    ListOf,
    Member,
    Struct,
    check_arguments,
    command,
    mismatch,
    nearest,
)
from qmigd.errors import ArgumentError, CommandNotFound

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


class ArgumentTests(SynchronousTestCase):
    def refused(self, name: str, arguments: dict[str, Any]) -> str:
        error = self.assertRaises(ArgumentError, check_arguments, COMMANDS[name], arguments)
        return str(error.text)

    def test_good(self) -> None:
        """What is declared passes, with and without the optional ones."""
        check_arguments(COMMANDS["query-version"], {})
        check_arguments(COMMANDS["migrate"], {"guest": "g", "uri": "tcp:h:1"})
        check_arguments(
            COMMANDS["migrate"],
            {"guest": "g", "uri": "u", "tunables": {"max-bandwidth": "1G"}, "prefer": ["tls"]},
        )

    def test_unknown(self) -> None:
        """An unknown argument is named, with the nearest one."""
        self.assertEqual(
            "migrate has no argument 'tunable'; did you mean 'tunables'?",
            self.refused("migrate", {"guest": "g", "uri": "u", "tunable": {}}),
        )

    def test_unknown_and_far_away(self) -> None:
        """An argument that resembles none is answered with those that there are."""
        self.assertEqual(
            "query-migrate has no argument 'zzz'; it takes 'guest', 'id'.",
            self.refused("query-migrate", {"zzz": 1}),
        )
        self.assertEqual(
            "query-version has no argument 'zzz'; it takes none.",
            self.refused("query-version", {"zzz": 1}),
        )

    def test_missing(self) -> None:
        """A missing argument is named, with what it is for."""
        self.assertEqual(
            "migrate needs the argument 'uri': where the destination's qmigd listens: "
            "`tcp:host:port`, `unix:/path`, `vsock:cid:port`, or `exec:command`.",
            self.refused("migrate", {"guest": "g"}),
        )

    def test_wrong_type(self) -> None:
        """A wrong type is named with the argument, what it should be and what it is."""
        for arguments, sentence in (
            ({"guest": 1}, "migrate: 'guest' must be a string, not an integer."),
            ({"guest": None}, "migrate: 'guest' must be a string, not null."),
            ({"tunables": []}, "migrate: 'tunables' must be an object, not a list."),
            ({"prefer": "tls"}, "migrate: 'prefer' must be a list, not a string."),
            (
                {"prefer": ["a", 1.5]},
                "migrate: 'prefer'[1] must be a string, not a number with a fraction.",
            ),
        ):
            self.assertEqual(sentence, self.refused("migrate", arguments))

    @given(st.sampled_from(sorted(COMMANDS)), st.dictionaries(st.text(), JSON))
    def test_any_input(self, name: str, arguments: dict[str, Any]) -> None:
        """Whatever arguments come, they pass or are refused with an ArgumentError."""
        try:
            check_arguments(COMMANDS[name], arguments)
        except ArgumentError as error:
            self.assertTrue(error.text)


class MismatchTests(SynchronousTestCase):
    def test_bool_is_no_number(self) -> None:
        """True is neither an integer nor a number, and 1 is not a bool."""
        self.assertEqual("x must be an integer, not true", mismatch(INT, True, "x"))
        self.assertEqual("x must be a number, not false", mismatch(NUMBER, False, "x"))
        self.assertEqual("x must be true or false, not an integer", mismatch(BOOL, 1, "x"))

    def test_scalars(self) -> None:
        """Values of the declared types fit."""
        for type, value in (
            (STR, ""),
            (INT, -1),
            (NUMBER, 1),
            (NUMBER, 1.5),
            (BOOL, True),
            (DICT, {"a": 1}),
            (ANY, None),
            (ANY, True),
            (ANY, [1]),
        ):
            self.assertIsNone(mismatch(type, value, "x"))

    def test_enum(self) -> None:
        """A value outside an enum is shown with those that there are."""
        colour = Enum("Colour", ("red", "blue"))
        self.assertIsNone(mismatch(colour, "red", "x"))
        self.assertEqual(
            "x must be one of 'red', 'blue', not 'green'", mismatch(colour, "green", "x")
        )
        self.assertEqual("x must be one of 'red', 'blue', not null", mismatch(colour, None, "x"))

    def test_struct(self) -> None:
        """Members are checked all the way down; only an open object may have others."""
        inner = Struct("Inner", "", (Member("n", INT, ""),))
        outer = Struct("Outer", "", (Member("list", ListOf(inner), "", optional=True),))
        self.assertIsNone(mismatch(outer, {}, "x"))
        self.assertIsNone(mismatch(outer, {"list": [{"n": 1}]}, "x"))
        self.assertEqual(
            "x.list[1].n must be an integer, not a string",
            mismatch(outer, {"list": [{"n": 1}, {"n": ""}]}, "x"),
        )
        self.assertEqual("x.list[0] lacks the member 'n'", mismatch(outer, {"list": [{}]}, "x"))
        self.assertEqual(
            "x has no member 'lists'; did you mean 'list'?", mismatch(outer, {"lists": 1}, "x")
        )
        anything = Struct("Open", "", (), open=True)
        self.assertIsNone(mismatch(anything, {"lists": 1}, "x"))


class LookupTests(SynchronousTestCase):
    def test_unknown_command(self) -> None:
        """An unknown command is answered with the nearest ones."""
        error = self.assertRaises(CommandNotFound, command, "migrate-start-poscopy")
        self.assertEqual(
            "There is no command 'migrate-start-poscopy'; did you mean 'migrate-start-postcopy'?",
            error.text,
        )
        self.assertEqual(
            "There is no command 'zzz'.", self.assertRaises(CommandNotFound, command, "zzz").text
        )

    def test_nearest(self) -> None:
        """Names that resemble nothing get no suggestion."""
        self.assertEqual("; did you mean 'multifd'?", nearest("multfd", ["multifd", "tls"]))
        self.assertEqual("", nearest("x", ["multifd", "tls"]))
