"""Two trials at once: each says what it has to, and neither outlives who has started them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.rig.news import DEADLINE
from tests.rig.process import temporary_directory
from tests.rig.trials import SECOND, first

_ROOT = Path(__file__).parents[1]

_SAMPLES = """
import os, socket
from twisted.trial.unittest import SynchronousTestCase

class Samples(SynchronousTestCase):
    def test_good(self):
        pass

    def test_bad(self):
        self.fail("for a good reason")

    def test_long(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
            end.connect(os.environ["SAMPLES"])
            end.recv(1)  # which never comes
"""

_SCRIPT = """
import signal, sys
from pathlib import Path
from tests.rig.trials import run
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where all run in the background
one, other, build = sys.argv[1:]
sys.exit(run([f"samples.Samples.test_{one}"], [f"samples.Samples.test_{other}"], Path(build)))
"""


class PartsTests(SynchronousTestCase):
    def test_all(self) -> None:
        """Every module of tests is in one of the two, and none in both."""
        modules = {
            ".".join(path.relative_to(_ROOT).with_suffix("").parts)
            for path in Path(__file__).parent.rglob("test_*.py")
            if (path.parent / "__init__.py").exists()
        }
        found = {
            one: {name for name in modules if f"{name}.".startswith(f"{one}.")} for one in SECOND
        }
        self.assertTrue(all(found.values()), found)
        self.assertEqual(modules - set().union(*found.values()), set(first()))


class RunTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = temporary_directory()
        self.addCleanup(shutil.rmtree, self.directory)
        Path(self.directory, "samples.py").write_text(_SAMPLES)
        self.samples = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.addCleanup(self.samples.close)
        self.samples.settimeout(DEADLINE)
        self.samples.bind(f"{self.directory}/samples")
        self.samples.listen()

    def start(self, one: str, other: str) -> subprocess.Popen[str]:
        """Start the samples of those names in the first and in the second trial."""
        process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, one, other, tempfile.mkdtemp(dir=self.directory)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": f"{_ROOT}:{self.directory}",
                "SAMPLES": f"{self.directory}/samples",
            },
        )
        self.addCleanup(process.kill)
        return process

    def ended(self, number: signal.Signals) -> tuple[int, str]:
        """Send that signal while both trials run; return the code and the text once they do not."""
        process = self.start("long", "long")
        both = [self.samples.accept()[0] for _ in range(2)]
        process.send_signal(number)
        text, _ = process.communicate(timeout=DEADLINE)
        for sample in both:
            sample.settimeout(DEADLINE)
            self.assertEqual(sample.recv(1), b"")
            sample.close()
        return process.returncode, text

    def test_outcomes(self) -> None:
        """It has gone well if both have, and what they say comes whole, one after the other."""
        words = {"good": "PASSED (successes=1)", "bad": "FAILED (failures=1)"}
        for one, other in ("good", "good"), ("bad", "good"), ("good", "bad"):
            with self.subTest(one=one, other=other):
                process = self.start(one, other)
                text, _ = process.communicate()
                self.assertEqual(process.returncode == 0, {one, other} == {"good"})
                for part, outcome in zip(
                    text.split("\nThe second trial:\n"), (one, other), strict=True
                ):
                    self.assertIn(words[outcome], part.splitlines())

    def test_interrupted(self) -> None:
        """Ctrl-C ends both, and the first says what it has done."""
        code, text = self.ended(signal.SIGINT)
        self.assertEqual(code, 130)
        self.assertIn("Ran 1 tests", text)

    def test_killed(self) -> None:
        """Neither outlives who has started them."""
        for number in signal.SIGTERM, signal.SIGKILL:
            code, _ = self.ended(number)
            self.assertEqual(code, -number)
