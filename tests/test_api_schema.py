"""``query-qmp-schema``: what a reader of QEMU's schema relies on holds for this one."""

from __future__ import annotations

import json

from twisted.trial.unittest import SynchronousTestCase

from qmigd.api import COMMANDS, mismatch, schema


class SchemaTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.entities = schema()
        self.named = {entity["name"]: entity for entity in self.entities}

    def test_names_are_unique(self) -> None:
        """Commands, events and types share one space of names without a collision."""
        self.assertEqual(len(self.entities), len(self.named))

    def test_every_reference_resolves(self) -> None:
        """Each type that an entity refers to is in the schema."""
        for entity in self.entities:
            for key in ("arg-type", "ret-type", "element-type"):
                if key in entity:
                    self.assertIn(entity[key], self.named)
            if entity["meta-type"] == "object":
                for member in entity["members"]:
                    self.assertIn(member["type"], self.named)

    def test_arguments_are_objects(self) -> None:
        """The arguments of a command and the data of an event are of meta-type object."""
        for entity in self.entities:
            if entity["meta-type"] in ("command", "event"):
                self.assertEqual("object", self.named[entity["arg-type"]]["meta-type"])

    def test_migrate(self) -> None:
        """Tunables can be looked for as in QEMU: command, its arguments, their types."""
        arguments = self.named[self.named["migrate"]["arg-type"]]
        members = {member["name"]: member for member in arguments["members"]}
        self.assertEqual({"name": "uri", "type": "str"}, members["uri"])
        self.assertEqual({"name": "prefer", "type": "[str]", "default": None}, members["prefer"])
        self.assertEqual(
            {"name": "[str]", "meta-type": "array", "element-type": "str"}, self.named["[str]"]
        )
        self.assertEqual(
            {"name": "dict", "meta-type": "builtin", "json-type": "object"}, self.named["dict"]
        )

    def test_enum(self) -> None:
        """An enum has its values in the old place and in the new one."""
        self.assertEqual(
            {
                "name": "Role",
                "meta-type": "enum",
                "members": [{"name": "source"}, {"name": "destination"}],
                "values": ["source", "destination"],
            },
            self.named["Role"],
        )

    def test_it_is_what_it_says(self) -> None:
        """The schema is JSON, and of the type that it declares for itself."""
        again = json.loads(json.dumps(self.entities))
        returns = COMMANDS["query-qmp-schema"].returns
        assert returns is not None
        self.assertIsNone(mismatch(returns, again, "schema"))
