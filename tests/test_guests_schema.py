"""Tunables out of QEMU's schema, and values for them."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.trial.unittest import SynchronousTestCase

from qmigd.backend import Tunable
from qmigd.errors import ArgumentError
from qmigd.guests import schema
from qmigd.qmp.connecting import connect
from tests.rig.case import RigCase
from tests.rig.qemus import LABELS, require

INT = Tunable("max-bandwidth", "int")
BOOL = Tunable("cpu-throttle-tailslow", "bool")
ENUM = Tunable("multifd-compression", "enum", ("none", "zlib", "zstd"))
TEXT = Tunable("tls-creds", schema.NULLABLE)
LIST = Tunable("block-bitmap-mapping", "array")

#: A schema like QEMU's, with what is special about each kind of type.
ENTITIES: list[dict[str, Any]] = [
    {"name": "migrate-set-parameters", "meta-type": "command", "arg-type": "1", "ret-type": "9"},
    {"name": "stop", "meta-type": "command", "arg-type": "9", "ret-type": "9"},
    {"name": "STOP", "meta-type": "event", "arg-type": "9"},
    {
        "name": "1",
        "meta-type": "object",
        "members": [
            {"name": "number", "type": "int", "default": None},
            {"name": "old", "type": "bool", "default": None, "features": ["deprecated"]},
            {"name": "x-new", "type": "number", "default": None, "features": ["unstable"]},
            {"name": "choice", "type": "2", "default": None},
            {"name": "older-choice", "type": "3", "default": None},
            {"name": "text", "type": "4", "default": None},
            {"name": "list", "type": "[9]", "default": None},
            {"name": "other", "type": "5", "default": None},
        ],
    },
    {
        "name": "2",
        "meta-type": "enum",
        "members": [{"name": "a"}, {"name": "b", "features": ["deprecated"]}],
        "values": ["a", "b"],
    },
    {"name": "3", "meta-type": "enum", "values": ["c"]},
    {"name": "4", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "null"}]},
    {"name": "5", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "int"}]},
    {"name": "[9]", "meta-type": "array", "element-type": "9"},
    {"name": "9", "meta-type": "object", "members": []},
    *({"name": name, "meta-type": "builtin", "json-type": name} for name in ("int", "number")),
    *({"name": name, "meta-type": "builtin", "json-type": name} for name in ("bool", "str")),
]


class ReadTests(SynchronousTestCase):
    def test_types(self) -> None:
        """Each type has a word, an enum its values, and each parameter its standing."""
        tunables = schema.read(ENTITIES).tunables({"number": 5, "unheard-of": 1})
        wanted = [
            Tunable("number", "int", value=5),
            Tunable("old", "bool", deprecated=True),
            Tunable("x-new", "number", unstable=True),
            Tunable("choice", "enum", ("a", "b")),
            Tunable("older-choice", "enum", ("c",)),
            Tunable("text", schema.NULLABLE),
            Tunable("list", "array"),
            Tunable("other", "alternate"),
        ]
        self.assertEqual(tunables, wanted)

    def test_nullable(self) -> None:
        """Which parameters can be unset."""
        known = schema.read(ENTITIES)
        self.assertTrue(known.nullable("text"))
        self.assertFalse(known.nullable("number"))

    def test_find(self) -> None:
        """A name that there is not is answered with the nearest ones."""
        self.assertIs(schema.find([INT, BOOL], "max-bandwidth"), INT)
        error = self.assertRaises(ArgumentError, schema.find, [INT, BOOL], "max_bandwith")
        self.assertIn("did you mean max-bandwidth?", str(error))
        error = self.assertRaises(ArgumentError, schema.find, [INT, BOOL], "zzz")
        self.assertIn("'query-tunables' lists those that there are", str(error))


class CoerceTests(SynchronousTestCase):
    def takes(self, tunable: Tunable, **values: Any) -> None:
        """Check what is made of values given as ``name=(given, wanted)``."""
        for given_, wanted in values.values():
            got = schema.coerce(tunable, given_)
            self.assertEqual((got, type(got)), (wanted, type(wanted)), given_)

    def refuses(self, tunable: Tunable, *values: Any) -> None:
        for value in values:
            error = self.assertRaises(ArgumentError, schema.coerce, tunable, value)
            self.assertIn(tunable.name, str(error))

    def test_integers(self) -> None:
        """Whole numbers, in digits or with a power of 1024 behind them."""
        self.takes(
            INT, json=(5, 5), digits=("5", 5), negative=("-1", -1), hexadecimal=("0x10", 16),
            mega=("512M", 512 << 20), mebi=(" 2 MiB ", 2 << 20), part=("1.5g", 3 << 29),
            kilo=("4kB", 4096), exa=("1E", 1 << 60),
        )  # fmt: skip
        self.refuses(INT, True, None, 1.5, "", "M", "1.M", "1e3", "five", "12Q", [1], "-1M")
        self.refuses(INT, "9" * 5000, "9" * 5000 + "M")

    @given(st.integers(-(2**63), 2**64 - 1))
    def test_any_integer(self, number: int) -> None:
        """What JSON or a decimal number says is taken as it is."""
        self.assertEqual(schema.coerce(INT, number), number)
        self.assertEqual(schema.coerce(INT, str(number)), number)

    @given(st.integers(0, 8191), st.sampled_from(range(6)))
    def test_any_size(self, number: int, power: int) -> None:
        """Each suffix is 1024 times the one before."""
        suffix = "KMGTPE"[power]
        self.assertEqual(schema.coerce(INT, f"{number}{suffix}"), number << 10 * (power + 1))

    @given(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.none())
    )
    def test_nothing_else_comes_out(self, value: Any) -> None:
        """Whatever is given, the type is right or the error has a sentence."""
        for tunable, kinds in ((INT, (int,)), (BOOL, (bool,)), (ENUM, (str,)), (LIST, (list,))):
            try:
                self.assertIsInstance(schema.coerce(tunable, value), kinds)
            except ArgumentError as error:
                self.assertIn(tunable.name, error.text)

    def test_booleans(self) -> None:
        """On and off, in JSON's words or a person's."""
        self.takes(
            BOOL, json=(True, True), on=("on", True), true=("True", True), off=("off", False)
        )
        self.refuses(BOOL, 1, "1", "yes", None)

    def test_enums(self) -> None:
        """One of the values; a slip is answered with the nearest."""
        self.takes(ENUM, value=("zstd", "zstd"))
        self.refuses(ENUM, "", 1, None, ["zstd"])
        error = self.assertRaises(ArgumentError, schema.coerce, ENUM, "zsdt")
        self.assertIn("none, zlib, zstd; did you mean zstd?", str(error))

    def test_strings(self) -> None:
        """A string is a string, also one that looks like something else; null unsets."""
        self.takes(TEXT, text=("on", "on"), empty=("", ""), null=(None, None))
        self.refuses(TEXT, 1, True, [])
        self.refuses(Tunable("name", "str"), None)

    def test_lists(self) -> None:
        """A JSON array, as JSON or in a string."""
        self.takes(LIST, json=([1], [1]), text=('[{"a": 1}]', [{"a": 1}]))
        self.refuses(LIST, "{}", "nonsense", 1, None)
        self.takes(Tunable("thing", "object"), text=('{"a": 1}', {"a": 1}))

    def test_numbers(self) -> None:
        """Numbers with a fraction, where QEMU wants them."""
        self.takes(Tunable("rate", "number"), json=(1.5, 1.5), text=("1.5", 1.5), whole=(2, 2))
        self.refuses(Tunable("rate", "number"), "x", None, True)


class QemuTests(RigCase):
    async def test_tunables(self) -> None:
        """Every QEMU tells its own parameters, with the values that it has now."""
        for label in LABELS:
            guest = self.guest(require(label), label).start()
            client = await connect(reactor, f"unix:{guest.qmp_path}")
            try:
                known = await schema.of(client)
                values = await client.execute("query-migrate-parameters")
                tunables = {tunable.name: tunable for tunable in known.tunables(values)}
                self.assertLessEqual(set(values), set(tunables))
                bandwidth = tunables["max-bandwidth"]
                self.assertEqual((bandwidth.type, bandwidth.value), ("int", 128 << 20))
                self.assertIn("zstd", tunables["multifd-compression"].values)
                self.assertTrue(tunables["x-checkpoint-delay"].unstable)
                self.assertTrue(known.nullable("tls-creds"))
                for tunable in tunables.values():
                    self.assertNotRegex(tunable.type, r"^\d")
                    if tunable.value is not None:
                        self.assertEqual(schema.coerce(tunable, tunable.value), tunable.value)
                settable = {
                    name: schema.coerce(tunables[name], str(value))
                    for name, value in values.items()
                    if tunables[name].type in ("int", "bool", "enum")
                }
                await client.execute("migrate-set-parameters", **settable)
            finally:
                client.close()

    async def test_read_once(self) -> None:
        """The same build is asked once in a process, the same connection never again."""
        guest = self.guest(require("7.2")).start()
        first = None
        for _ in range(2):
            client = await connect(reactor, f"unix:{guest.qmp_path}")
            lost: Deferred[None] = Deferred()
            client.when_lost(lambda reason, lost=lost: lost.callback(None))  # type: ignore[misc]
            known = await schema.of(client)
            self.assertIs(await schema.of(client), known)
            first = first or known
            self.assertIs(known, first)
            client.close()
            await lost

    def test_json(self) -> None:
        """Tunables hold nothing but JSON."""
        json.dumps([vars(tunable) for tunable in schema.read(ENTITIES).tunables({})])
