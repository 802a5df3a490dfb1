"""Tests of every outcome, for the lane to be tried with; nobody else runs them."""

from __future__ import annotations

import os
import sys
from unittest import SkipTest

from tests.rig.case import RigCase


class Samples(RigCase):
    def test_success(self) -> None:
        print("all is well")

    def test_failure(self) -> None:
        os.write(2, b"about to fail\n")
        self.assertEqual("one thing", "another")

    def test_error(self) -> None:
        self.addCleanup(lambda: print("cleaned up"))
        raise ValueError("no such thing")

    async def test_asynchronous(self) -> None:
        self.fail("later")

    def test_skip(self) -> None:
        raise SkipTest("not today")

    def test_death(self) -> None:
        print("farewell", file=sys.stderr)
        os._exit(1)
