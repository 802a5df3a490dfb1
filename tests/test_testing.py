"""``qmigd.testing``: what it promises to authors of features."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from qmigd.guests.memory import dirty, faults
from qmigd.interfaces import RELAY, Feature, ICodec
from qmigd.testing import Pair
from tests.thirdparty.qmigd_example_deflate import Codec, Deflate

_ROOT = Path(__file__).resolve().parent.parent


class Garbler(Codec):
    """What it decodes is not what was encoded."""

    def decode(self, data: memoryview) -> bytes:
        return super().decode(data)[::-1]


class Harmful(Deflate):
    """Its channels bring something else than was sent."""

    name = "__org.example_harmful"

    def codec(self, agreement: Mapping[str, Any]) -> Callable[[], ICodec]:
        return lambda: Garbler(1)


class PairTests(TestCase):
    async def there_and_back(self, transport: Literal["tcp", "unix"]) -> None:
        async with Pair(reactor, [Deflate()], transport=transport) as pair:
            directories = [pair.here.directory, pair.there.directory]
            for _ in range(2):
                moved = await pair.move(require=[Deflate.name])
                self.assertIn(Deflate.name, moved.plan["features"])
                self.assertEqual(RELAY, moved.plan["path"])
                await pair.turn()
        self.assertFalse(any(map(Path.exists, directories)))

    async def test_over_loopback(self) -> None:
        """A feature that is given to both hosts is negotiated and used, and nothing is left."""
        await self.there_and_back("tcp")

    async def test_in_memory(self) -> None:
        """So it is where nothing leaves the kernel's memory."""
        await self.there_and_back("unix")

    async def test_postcopy(self) -> None:
        """A move can be switched to postcopy, whose pages come on demand."""
        async with Pair(reactor, guest={"dirty-rate": "64M"}) as pair:
            slow = {"max-postcopy-bandwidth": 32 << 20}
            moved = await pair.move(postcopy=True, tunables=slow)
            self.assertIn("postcopy-ram", moved.plan["features"])
            self.assertGreater((await pair.there.guest.execute("query-faults"))["count"], 0)

    async def test_one_side(self) -> None:
        """Where one host lacks it, the guest moves without, for that reason."""
        async with Pair(reactor, source_features=[Deflate()]) as pair:
            moved = await pair.move()
        self.assertNotIn(Deflate.name, moved.plan["features"])
        (left,) = (one for one in moved.plan["left-out"] if one["name"] == Deflate.name)
        self.assertIn("does not offer it", left["reason"])

    async def test_old_kernel(self) -> None:
        """A kernel that keeps no account of dirty pages, and gives no userfaultfd, will do."""

        def refuse(*_: Any) -> Any:
            raise OSError(errno.EINVAL, "this kernel cannot")

        self.patch(dirty, "PagemapTracker", refuse)
        self.patch(faults, "Userfaultfd", refuse)
        async with Pair(reactor, guest={"dirty-rate": "64M"}) as pair:
            moved = await pair.move(tunables={"max-bandwidth": 32 << 20})
        self.assertNotIn("postcopy-ram", moved.plan["features"])

    async def test_harmful(self) -> None:
        """A feature that spoils the stream is found out, and the guest goes on where it was."""
        async with Pair(reactor, [Harmful()]) as pair:
            moved = await pair.move(require=[Harmful.name], check=False)
            self.assertEqual("failed", moved.status)
            self.assertEqual("running", pair.here.guest.machine.state)
            self.assertEqual({}, await pair.here.guest.execute("check-ram"))

    def trial(self, folder: Path, module: str) -> str:
        """Run an author's tests as they would; returns what is printed."""
        trial = [sys.executable, "-m", "twisted.trial", "--temp-directory"]
        done = subprocess.run(
            [*trial, os.path.abspath(self.mktemp()), module],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.stdout

    def by_its_author(self, folder: str, module: str, passed: int) -> None:
        """Run an example's own tests, which pass."""
        printed = self.trial(Path(__file__).parent / folder, module)
        self.assertIn(f"PASSED (successes={passed})", printed)

    def test_of_a_third_party(self) -> None:
        """The tests that come with the example of a distribution pass."""
        self.by_its_author("thirdparty", "test_deflate", 2)

    def test_of_the_tutorial(self) -> None:
        """So do those of the tutorial."""
        self.by_its_author("tutorial", "test_crc", 3)

    def test_tutorial_step_by_step(self) -> None:
        """What its reader has typed after each step does what the text says."""
        text = (_ROOT / "docs" / "half-an-hour.md").read_text()
        feature, tests = (
            (_ROOT / "tests" / "tutorial" / name).read_text()
            for name in ("qmigd_example_crc.py", "test_crc.py")
        )
        folder = Path(self.mktemp())
        folder.mkdir()
        used = tests.partition("# -- it is used")[2].partition("# -- only one host")[0]
        (folder / "test_crc.py").write_text(used)
        begun = text.partition("```python\n")[2].partition("```")[0]
        agreed = feature.partition("# -- the feature")[2].partition("# -- what is done")[0]
        for step, outcome in (
            (begun, "{'checksum': 'crc32'} != {}"),
            (f"{agreed}\nfeature = Checksums()\n", "PASSED (successes=1)"),
        ):
            (folder / "qmigd_example_crc.py").write_text(step)
            self.assertIn(outcome, self.trial(folder, "test_crc"))

    async def test_no_feature(self) -> None:
        """What is no feature is refused when the pair is made."""

        class Nameless(Feature):
            pass

        with self.assertRaisesRegex(AssertionError, "Nameless is no feature"):
            Pair(reactor, [Nameless()])
        self.flushLoggedErrors()
