"""Installed in each of the usual ways qmigd is known to twistd, and leaves Twisted whole.

Each test has an environment of its own.  Twisted and whatever else qmigd needs are
really installed there, records and all, out of copies of what this environment
has; so nothing is downloaded, and uninstalling can do all the harm it is able to.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from twisted.trial.unittest import SynchronousTestCase

from tests.rig.pair import KNOWN

_ROOT = Path(__file__).parents[1]

#: What is in the tree but not in a clone of it.
_NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".*cache", "build", "dist", "*.egg-info", "__pycache__", "_trial_temp*"
)  # fmt: skip

#: Commands of ``twistd`` that are Twisted's own.
_TWISTED_COMMANDS = {"web", "dns", "procmon"}


def _needed() -> list[Distribution]:
    """Return the distributions that qmigd and its build need, with all that those need."""
    found: dict[str, Distribution] = {}
    waiting = ["setuptools", *_requirements(distribution("qmigd"))]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = distribution(name)
            waiting += _requirements(found[name])
    return list(found.values())


def _requirements(of: Distribution) -> list[str]:
    """Return the names of what a distribution requires here, without its extras."""
    requirements = map(Requirement, of.requires or [])
    return [
        one.name.lower()
        for one in requirements
        if one.marker is None or one.marker.evaluate({"extra": ""})
    ]


class Environment:
    """A throw-away environment, and a clone of the tree to install from."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "source"
        shutil.copytree(_ROOT, self.source, ignore=_NOT_SOURCE)
        venv.create(folder / "env", symlinks=True)
        self.bin = folder / "env" / "bin"
        self.python = self.bin / "python"
        self.site = next((folder / "env" / "lib").glob("python*/site-packages"))
        for one in _needed():
            self._copy(one)
        # Twisted's commands, for this environment.
        self.twistd_script = (
            "import sys; from twisted.scripts.twistd import run; sys.argv[0] = 'twistd'; run()"
        )
        self.twisted = self._twisted()

    def _copy(self, one: Distribution) -> None:
        for file in one.files or []:
            # Scripts are outside of site-packages, and have another Python's name in them.
            if ".." not in file.parts and file.suffix != ".pyc":
                target = self.site / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(str(file.locate()), target)

    def _twisted(self) -> dict[str, str]:
        """Return the sums of Twisted's files, without what Python and Twisted cache."""
        return {
            str(path.relative_to(self.site)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (self.site / "twisted").rglob("*.py")
        }

    def run(self, *argv: str | Path) -> str:
        """Run a command, well away from this tree, and return what it prints."""
        environment = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))
        }
        done = subprocess.run(
            [str(part) for part in argv],
            cwd=self.bin,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise AssertionError(f"{' '.join(map(str, argv))} failed:\n{done.stdout}")
        return done.stdout

    def pip(self, *argv: str | Path) -> str:
        """Run this environment's pip on the throw-away one, with no index to download from."""
        pip = (sys.executable, "-m", "pip", "--python", self.python, "--isolated")
        return self.run(*pip, "--quiet", "--disable-pip-version-check", *argv)

    def install(self, *argv: str | Path) -> None:
        """Install; whatever qmigd requires has to be there, and recent enough."""
        self.pip("install", "--no-index", "--no-build-isolation", *argv)

    def commands(self) -> set[str]:
        """Return the commands that ``twistd --help`` lists."""
        text = self.run(self.python, "-c", self.twistd_script, "--help")
        return set(re.findall(r"^    ([\w-]+)  ", text.partition("Commands:")[2], re.MULTILINE))


class InstallTests(SynchronousTestCase):
    def setUp(self) -> None:
        folder = Path(self.mktemp()).absolute()
        folder.mkdir(parents=True)
        self.addCleanup(shutil.rmtree, folder)
        self.environment = Environment(folder)
        self.dist = folder / "dist"

    def check(self) -> None:
        """Check what an installed qmigd is worth, then uninstall it and look at Twisted."""
        here = self.environment
        self.assertLessEqual({"qmigd", *_TWISTED_COMMANDS}, here.commands())
        self.assertIn(
            "--config", here.run(here.python, "-c", here.twistd_script, "qmigd", "--help")
        )
        self.assertIn("migrate", here.run(here.bin / "qmigctl", "--help"))
        features = (
            "from importlib.metadata import entry_points\n"
            "print(*sorted(one.load().name for one in entry_points(group='qmigd.features')))\n"
        )
        self.assertEqual(
            here.run(here.python, "-c", features).split(),
            sorted(KNOWN),
        )

        here.pip("uninstall", "--yes", "qmigd")
        left = here.commands()
        self.assertLessEqual(_TWISTED_COMMANDS, left)
        self.assertNotIn("qmigd", left)
        self.assertEqual(here._twisted(), here.twisted)

    def build(self) -> Path:
        """Build a source distribution, and a wheel out of that; returns the wheel."""
        self.environment.run(
            *(sys.executable, "-m", "build", "--no-isolation", "--outdir", self.dist),
            self.environment.source,
        )
        (wheel,) = self.dist.glob("*.whl")
        return wheel

    def test_install(self) -> None:
        """``pip install .`` makes qmigd known to twistd, and can be undone."""
        self.environment.install(self.environment.source)
        self.check()

    def test_editable(self) -> None:
        """``pip install -e .`` makes qmigd known to twistd, and can be undone."""
        self.environment.install("--editable", self.environment.source)
        self.check()

    def test_wheel(self) -> None:
        """A wheel, built from the source distribution, does the same."""
        wheel = self.build()
        self.check_contents(set(zipfile.ZipFile(wheel).namelist()))
        self.environment.install(wheel)
        self.check()

    def check_contents(self, names: set[str]) -> None:
        """Check that a wheel has all of qmigd, and nothing of Twisted's but the plugin."""
        ours = {
            path.relative_to(_ROOT).as_posix()
            for path in (_ROOT / "qmigd").rglob("*")
            if path.suffix == ".py" or path.name == "py.typed"
        }
        self.assertEqual({name for name in names if name.startswith("qmigd/")}, ours)
        self.assertEqual(
            {name for name in names if name.startswith("twisted/")},
            {"twisted/plugins/qmigd_plugin.py"},
        )
        self.assertEqual(
            {name.split("/")[0] for name in names} - {"qmigd", "twisted"}, {self.dist_info(names)}
        )

    @staticmethod
    def dist_info(names: set[str]) -> str:
        """Return the folder of the wheel's own data."""
        return next(name.split("/")[0] for name in names if ".dist-info/" in name)
