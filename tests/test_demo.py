"""``make demo`` does what it says, and says what is missing where it cannot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from unittest import SkipTest
from xml.etree import ElementTree

from twisted.trial.unittest import SynchronousTestCase

from tests.rig.pair import KNOWN

_ROOT = Path(__file__).parents[1]


#: Runs a program without the rights of root, whoever the tests are run by.
_UNPRIVILEGED = ("/usr/bin/unshare", "--user") if os.getuid() == 0 else ()


def _demo(
    *arguments: str, prefix: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-m", "tests.demo", *arguments],
        cwd=_ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


class DemoTests(SynchronousTestCase):
    def setUp(self) -> None:
        # a short path, so that the demo keeps its sockets there
        self.scratch = tempfile.mkdtemp(prefix="demo-")
        self.addCleanup(shutil.rmtree, self.scratch, ignore_errors=True)

    def require(self) -> None:
        if shutil.which("qemu-system-x86_64") is None and not os.environ.get("CI"):
            raise SkipTest("this host has no qemu-system-x86_64")

    def test_there_and_back(self) -> None:
        """A guest moves there and back, its RAM is right, it counts on, and nothing is left."""
        self.require()
        done = _demo(TMPDIR=self.scratch)
        self.assertEqual((0, ""), (done.returncode, done.stderr), done.stdout)
        text = re.sub(r"\s+", " ", done.stdout)
        self.assertNotIn("\x1b", done.stdout)
        self.assertEqual(2, text.count("$ qmigctl migrate demo tcp:127.0.0.1:"))
        self.assertEqual(2, text.count("RAM right: all 32,768 pages (128 MiB) hold"))
        handed_on = re.findall(
            r"the last line on host (\w) was (\w+), the first on host (\w) (\w+), -?\d+ ms later",
            text,
        )
        self.assertEqual([("A", "B"), ("B", "A")], [(one[0], one[2]) for one in handed_on])
        for _, last, _, first in handed_on:
            self.assertIn(int(first, 16) - int(last, 16), (1, 2))
        # every feature has its line in the table, with a reason
        table = text.partition("What was negotiated, and why")[2]
        self.assertIn("peer in TLS, with the certificate of host-b, 127.0.0.1", text)
        for feature in sorted(KNOWN):
            self.assertRegex(table, rf" {feature} (used both sides can|left out \w)")
        self.assertIn(" path relay ", table)
        self.assertIn("All 5 processes and their files are gone again", text)
        self.assertEqual([], os.listdir(self.scratch))

    def test_picture(self) -> None:
        """``--picture`` draws the run, qmigctl's progress included, without fetching anything."""
        self.require()
        path = Path(self.scratch, "demo.svg")
        done = _demo("--picture", str(path), TMPDIR=self.scratch)
        self.assertEqual((0, ""), (done.returncode, done.stderr), done.stdout)
        words = "".join(ElementTree.parse(path).getroot().itertext()).replace("\xa0", " ")
        self.assertIn("qmigctl migrate demo tcp:", words)
        self.assertRegex(words, r"demo to tcp:\S+: moving RAM")
        self.assertIn("What was negotiated, and why", words)
        self.assertNotIn("http", path.read_text().replace("http://www.w3.org/2000/svg", ""))

    def test_no_qemu(self) -> None:
        """Without a QEMU it says what to install, in a sentence, and moves qmigd's own guest.

        It does so without any right that an ordinary user lacks.
        """
        done = _demo(PATH=self.scratch, TMPDIR=self.scratch, prefix=_UNPRIVILEGED)
        self.assertEqual((0, ""), (done.returncode, done.stderr), done.stdout)
        text = re.sub(r"\s+", " ", done.stdout)
        self.assertRegex(text, r"\AThere is no qemu-system-x86_64 here: .* install qemu-system-x86")
        self.assertEqual(2, text.count("RAM right: all 65,536 pages (256 MiB) hold"))
        self.assertIn("count on host-a from tick 0; on host-b from tick", text)
        self.assertRegex(text, r"counted to \d+ in three processes, and not one number is missing")
        self.assertIn("All 5 processes and their files are gone again", text)
        self.assertEqual([], os.listdir(self.scratch))

    def test_qemu_wanted(self) -> None:
        """If it is to be a QEMU, and there is none, that is an error, and no traceback."""
        done = _demo("--guest", "qemu", PATH=self.scratch)
        self.assertEqual((1, ""), (done.returncode, done.stdout))
        self.assertRegex(done.stderr, r"\A\ndemo: There is no qemu-system-x86_64 here: ")
        self.assertNotIn("Traceback", done.stderr)
