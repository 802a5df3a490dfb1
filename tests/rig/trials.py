"""Runs all tests in two trials at once, since most of the tests wait for something.

The second has those of the lane, which keep one CPU busy for minutes, and then some more, so that
both take about as long.  Each is a process, and a session, of its own.  What the first has to say
is printed as it comes; what the second has said is in ``build/second.log``, and is printed once
both have ended.
"""

from __future__ import annotations

import os
import pkgutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import tests
from tests.rig.keeper import keep_process
from tests.rig.process import Process

__all__ = ["SECOND", "first", "run"]

#: What the second runs, in this order.
SECOND = (
    "tests.kernel",
    "tests.test_rig_lane",
    "tests.test_faults_precopy",
)

#: What the exit code says where somebody has pressed Ctrl-C, as a shell has it.
_INTERRUPTED = 128 + signal.SIGINT

#: Seconds; whatever hangs has a deadline of its own.
_DAY = 86400.0


def first() -> list[str]:
    """Return the names of the modules that the first runs."""
    names = (module.name for module in pkgutil.iter_modules(tests.__path__, "tests."))
    return [name for name in names if name.startswith("tests.test_") and name not in SECOND]


def run(one: Sequence[str], other: Sequence[str], build: Path) -> int:
    """Run the tests of those names in the first and in the second trial; returns the exit code.

    Where somebody presses Ctrl-C the first says what it knows by then, and the second is ended.
    Whatever ends this process ends both.

    :param build: where their directories and the second's log are.
    """
    build.mkdir(parents=True, exist_ok=True)
    log = build / "second.log"
    log.unlink(missing_ok=True)
    try:
        with closing(Process.start(_trial(build / "second", other), log=str(log))) as beside:
            code = _run(_trial(build / "trial", one))
            if beside.running:
                print(f"\nThe second trial goes on; what it says is in {log}.", flush=True)
            other_code = beside.wait(deadline=_DAY)
            print(f"\nThe second trial:\n\n{log.read_text(errors='replace')}", end="")
            return code or other_code or 0
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    """Run a program that prints where this one does, and return its exit code."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
    pidfd = os.pidfd_open(process.pid)
    keep_process(pidfd)
    os.close(pidfd)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise


def _trial(directory: Path, names: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "twisted.trial", f"--temp-directory={directory}", *names]


if __name__ == "__main__":
    sys.exit(run(first(), SECOND, Path("build")))
