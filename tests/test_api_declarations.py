"""The declarations themselves: complete, consistent, and fit to be read."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from twisted.trial.unittest import SynchronousTestCase

from qmigd import errors
from qmigd.api import COMMANDS, EVENTS, Command, Event, Struct, Type, default_socket, structs


def every_struct() -> list[Struct]:
    roots: list[Type] = []
    for command in COMMANDS.values():
        roots += [member.type for member in command.arguments]
        if command.returns is not None:
            roots.append(command.returns)
    for event in EVENTS.values():
        roots += [member.type for member in event.data]
    return structs(roots)


class DeclarationTests(SynchronousTestCase):
    def test_names_are_keys(self) -> None:
        """Each command and event is found under its own name."""
        for name, command in COMMANDS.items():
            self.assertEqual(name, command.name)
        for name, event in EVENTS.items():
            self.assertEqual(name, event.name)

    def test_every_help_is_a_sentence(self) -> None:
        """Each help text begins with a line that is a sentence and ends with a full stop."""
        everything: list[Command | Event] = [*COMMANDS.values(), *EVENTS.values()]
        for declared in everything:
            self.assertRegex(declared.help.split("\n")[0], r"^[A-Z].*\.$")
            self.assertTrue(declared.help.endswith("."), declared.name)
        for struct in every_struct():
            self.assertRegex(struct.help, r"(?s)^[A-Z].*\.$")
            for member in struct.members:
                self.assertTrue(member.help.endswith("."), f"{struct.name}.{member.name}")

    def test_error_codes_exist(self) -> None:
        """Each code that a command lists is one of qmigd.errors."""
        codes = {getattr(errors, name).code for name in errors.__all__}
        for command in COMMANDS.values():
            for code, when in command.errors:
                self.assertIn(code, codes)
                self.assertRegex(when, r"^[A-Z].*\.$")

    def test_no_name_is_declared_twice(self) -> None:
        """Two different objects never share a name, nor two members of one object."""
        for struct in every_struct():
            names = [member.name for member in struct.members]
            self.assertEqual(len(names), len(set(names)), struct.name)
        for command in COMMANDS.values():
            names = [member.name for member in command.arguments]
            self.assertEqual(len(names), len(set(names)), command.name)


class DefaultSocketTests(SynchronousTestCase):
    def test_root(self) -> None:
        """For root it is the system's socket, whatever the environment says."""
        self.assertEqual(
            "unix:/run/qmigd/qmigd.sock", default_socket({"XDG_RUNTIME_DIR": "/run/user/0"}, 0)
        )

    def test_ordinary_user(self) -> None:
        """For an ordinary user it lies in that user's own directory, if there is one."""
        self.assertEqual(
            "unix:/run/user/7/qmigd/qmigd.sock",
            default_socket({"XDG_RUNTIME_DIR": "/run/user/7"}, 7),
        )
        self.assertEqual("unix:/run/qmigd/qmigd.sock", default_socket({}, 7))
        self.assertEqual("unix:/run/qmigd/qmigd.sock", default_socket({"XDG_RUNTIME_DIR": "x"}, 7))


def commands_page() -> ModuleType:
    path = Path(__file__).parents[1] / "docs" / "_ext" / "commands_page.py"
    spec = importlib.util.spec_from_file_location("commands_page", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ReferencePageTests(SynchronousTestCase):
    def test_everything_is_on_the_page(self) -> None:
        """The reference has a heading for each command, event and object in an answer."""
        text = commands_page().reference()
        for name in [*COMMANDS, *EVENTS]:
            self.assertIn(f"\n### {name}\n", text)
        for command in COMMANDS.values():
            for member in command.arguments:
                self.assertIn(f"| `{member.name}` |", text)
        for struct in every_struct():
            self.assertIn(f"(object-{struct.name})=\n### {struct.name}\n", text)

    def test_the_page_has_the_mark(self) -> None:
        """The page of the documentation has the line that the reference replaces."""
        module = commands_page()
        page = Path(__file__).parents[1] / "docs" / f"{module.PAGE}.md"
        self.assertIn(module.MARK, page.read_text("utf-8"))
