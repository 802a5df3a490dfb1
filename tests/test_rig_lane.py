"""The lane: what goes wrong inside is told outside."""

from __future__ import annotations

import os
from dataclasses import replace
from unittest import SkipTest

from twisted.trial.reporter import TestResult
from twisted.trial.unittest import SynchronousTestCase

from tests.kernel import test_lane
from tests.rig import kernel
from tests.rig.debian import Unavailable
from tests.rig.lane import KernelCase, Lane, LaneFailed, Outcome, machine

_SAMPLES = "tests.lane_samples.Samples"


class OutcomeTests(SynchronousTestCase):
    def test_all(self) -> None:
        """Each outcome comes out as it was, and once the guest is dead every test fails."""
        lane = Lane(kernel.require(), machine())
        self.addCleanup(lane.close)

        def run(name: str) -> Outcome:
            return lane.run(f"{_SAMPLES}.test_{name}")

        self.assertEqual(run("success"), Outcome("success", "", "all is well\n"))
        self.assertEqual(run("skip"), Outcome("skip", "not today", ""))
        failure = run("failure")
        self.assertEqual((failure.kind, failure.printed), ("failure", "about to fail\n"))
        self.assertIn("'one thing' != 'another'", failure.text)
        error = run("error")
        self.assertEqual((error.kind, error.printed), ("error", "cleaned up\n"))
        self.assertIn("ValueError: no such thing", error.text)
        self.assertEqual(run("asynchronous").kind, "failure")
        self.assertEqual(run("there_is_no_such").kind, "error")
        self.assertEqual(run("success").kind, "success")
        death = self.assertRaises(LaneFailed, run, "death")
        self.assertIn("The lane's guest has died", str(death))
        self.assertIn("Power", str(death))
        self.assertRaises(LaneFailed, run, "success")


class ReportTests(SynchronousTestCase):
    def reported(self, lane: Lane | Exception) -> TestResult:
        """Return what is reported of a test if that is the lane."""
        self.patch(KernelCase, "_lane", lane)
        result = TestResult()
        test_lane.LaneTests("test_kernel").run(result)
        return result

    def test_no_guest(self) -> None:
        """A test that could not be run is an error, by its own name."""
        result = self.reported(LaneFailed("It does not come up."))
        self.assertEqual(result.successes, 0)
        [(test, failure)] = result.errors
        self.assertEqual(test.id(), "tests.kernel.test_lane.LaneTests.test_kernel")
        self.assertIn("It does not come up.", str(failure))

    def test_no_kernel(self) -> None:
        """Where no kernel can be had the test is skipped, with the reason."""
        result = self.reported(SkipTest("There is none."))
        self.assertEqual(result.successes, 0)
        self.assertEqual([reason for _, reason in result.skips], ["There is none."])

    def test_does_not_start(self) -> None:
        """A machine that ends at once is told of, with what it said."""
        qemu = replace(machine(), argv=("/bin/sh", "-c", "echo no such machine"))
        error = self.assertRaises(LaneFailed, Lane, kernel.require(), qemu)
        self.assertIn("no such machine", str(error))

    def test_reason(self) -> None:
        """A kernel that cannot be fetched is a reason to skip, but not under CI."""
        for ci, expected in ({}, SkipTest), ({"CI": "1"}, Unavailable):
            kernel.find.cache_clear()
            self.addCleanup(kernel.find.cache_clear)
            self.patch(os, "environ", {"PATH": os.environ["PATH"], "KERNEL": "nowhere", **ci})
            error = self.assertRaises(expected, kernel.require)
            self.assertIn("The kernel is not here", str(error))
