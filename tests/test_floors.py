"""The house's floors: who may import whom, who may not do I/O, and who may name a feature.

Everything is read out of the source, so that an import within a function or for
type checking only counts as well.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

_ROOT = Path(__file__).parents[1] / "qmigd"

#: From the top down.  A room imports from floors below its own, and from no other
#: room of its own floor.
_FLOORS = (
    {"testing"},
    {"daemon"},
    {"cli", "features", "migration"},
    {"guests", "channels", "handshake"},
    {"qmp", "transports", "negotiation", "wire"},
    {"stream"},
    {"api"},
    {"backend"},
    {"interfaces"},
    {"waiting"},
    {"errors"},
)

#: Rooms that only compute.
_PURE = ("wire", "handshake", "negotiation", "stream")

#: All that those may import beside qmigd: nothing in it opens, sends, waits or asks the clock.
_HARMLESS = {
    "__future__", "abc", "automat", "collections", "contextlib", "copy", "dataclasses", "difflib",
    "enum", "functools", "hashlib", "hmac", "ipaddress", "itertools", "json", "math", "operator",
    "re", "secrets", "string", "struct", "types", "typing", "uuid", "zope",
    # what a stream's pages are computed with: arrays, and the two compressions
    "numpy", "zlib", "zstd", "backports", "compression",
    # for its version
    "sys",
}  # fmt: skip

#: Calls that are I/O without an import.
_IO_CALLS = {"open", "input", "print"}

#: Where a built-in feature may be named: its own room, the table of what a QEMU gets
#: wrong, the memory guest, whose capabilities have QEMU's names as a QEMU's own have, the list of
#: QEMU's URI schemes, which has words of the same kind, and QEMU's stream, which has parts by
#: these names.
_MAY_NAME = (
    *("features/", "guests/memory/", "guests/quirks.py"),
    *("stream/", "transports/uri.py"),
)

#: ``tls`` is the name of other things as well: of a table and a key of the configuration,
#: which sentences about them name, of what the handshake itself goes over to, of the kernel's
#: module, of an error's code.
_NAMESAKES = re.compile(r"\[tls\]|\[policy\] has tls = |'tls' in ")
#: The modules that are about those, or about a key of that name.
_NAMESAKE_OF = {
    "mptcp": {"daemon/config_file.py", "daemon/configured_host.py"},
    "tls": {
        "channels/kernel_tls.py",
        "cli/pki.py",
        "daemon/config_file.py",
        "daemon/configured_host.py",
        "errors.py",
        "wire/greeting.py",
    },
    # a kind of channel that a file may have been captured from
    "multifd": {"cli/inspecting.py", "cli/options.py"},
}


@dataclass(frozen=True)
class Module:
    """A module of qmigd: its path within the package, and its syntax."""

    path: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The package or top-level module that it belongs to."""
        return self.path.split("/")[0].removesuffix(".py")

    def imports(self) -> Iterator[str]:
        """The full names of all that it imports."""
        package = ["qmigd", *self.path.split("/")[:-1]]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                base += [node.module] if node.module else []
                yield from (".".join([*base, alias.name]) for alias in node.names)

    def docstrings(self) -> set[int]:
        """The ids of the constants that are docstrings, also those of attributes."""
        return {
            id(node.value)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        }


@cache
def _modules() -> tuple[Module, ...]:
    return tuple(
        Module(path.relative_to(_ROOT).as_posix(), ast.parse(path.read_text(), str(path)))
        for path in sorted(_ROOT.rglob("*.py"))
    )


def _floor(room: str) -> int:
    return next(number for number, rooms in enumerate(_FLOORS) if room in rooms)


class FloorTests(SynchronousTestCase):
    def test_every_room_has_a_floor(self) -> None:
        """There is no room that the plan of the house does not know."""
        rooms = {module.room for module in _modules()} - {"__init__"}
        self.assertEqual(rooms - set().union(*_FLOORS), set())

    def test_imports_go_down_only(self) -> None:
        """No room imports from a floor above, or from another room of its own floor."""
        wrong = []
        for module in _modules():
            for name in module.imports():
                _, _, rest = name.partition("qmigd.")
                room = rest.split(".")[0]
                if not name.startswith("qmigd.") or room in (module.room, "__version__"):
                    continue
                if _floor(room) <= _floor(module.room):
                    wrong.append(f"{module.path} imports {name}")
        self.assertEqual(wrong, [])


class PureTests(SynchronousTestCase):
    def test_imports(self) -> None:
        """The pure rooms import nothing that could do I/O, wait, or ask for the time."""
        wrong = [
            f"{module.path} imports {name}"
            for module in _modules()
            if module.room in _PURE
            for name in module.imports()
            if name.split(".")[0] not in _HARMLESS | {"qmigd"}
        ]
        self.assertEqual(wrong, [])

    def test_calls(self) -> None:
        """The pure rooms do not open files, read the terminal or print either."""
        wrong = [
            f"{module.path}:{node.lineno} calls {node.func.id}()"
            for module in _modules()
            if module.room in _PURE
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in _IO_CALLS
        ]
        self.assertEqual(wrong, [])

    def test_no_reactor_comes_along(self) -> None:
        """With all the pure rooms imported, nothing of ``twisted.internet`` is there."""
        names = [
            "qmigd." + module.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for module in _modules()
            if module.room in _PURE
        ]
        script = (
            "import importlib, sys\n"
            "for name in sys.argv[1:]: importlib.import_module(name)\n"
            "print(*[name for name in sys.modules if name.startswith('twisted.internet')])\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, *names],
            cwd=_ROOT.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        self.assertTrue(names)
        self.assertEqual(done.stdout.strip(), "")


class IdleTests(SynchronousTestCase):
    def test_no_numpy(self) -> None:
        """A daemon that has begun, and a qmigctl that asks it, have not loaded numpy."""
        script = (
            "import sys\n"
            "import qmigd.cli.session, qmigd.daemon.commands, qmigd.daemon.service\n"
            "import twisted.plugins.qmigd_plugin\n"
            "print('numpy' in sys.modules)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=_ROOT.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        self.assertEqual(done.stdout, "False\n")


class CoreTests(SynchronousTestCase):
    def test_names_no_feature(self) -> None:
        """No string outside of the features' own room has a built-in feature's name as a word.

        ``multifd-channels`` is another word: a tunable's.
        """
        names = entry_points(group="qmigd.features").names
        self.assertIn("multifd", names)
        pattern = re.compile(rf"(?<![\w-])({'|'.join(sorted(names))})(?![\w-])")
        wrong = []
        for module in _modules():
            if module.path.startswith(_MAY_NAME):
                continue
            docstrings = module.docstrings()
            for node in ast.walk(module.tree):
                if (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and id(node) not in docstrings
                    and (found := pattern.search(_NAMESAKES.sub("", node.value)))
                    and module.path not in _NAMESAKE_OF.get(found[0], ())
                ):
                    wrong.append(f"{module.path}:{node.lineno} names {found[0]}")
        self.assertEqual(wrong, [])

    def test_imports_no_feature(self) -> None:
        """Nobody imports a feature's module: features are found, not known."""
        registry = "qmigd.features.registry"
        wrong = [
            f"{module.path} imports {name}"
            for module in _modules()
            if module.room != "features"
            for name in module.imports()
            if name.startswith("qmigd.features.") and not name.startswith(registry)
        ]
        self.assertEqual(wrong, [])
