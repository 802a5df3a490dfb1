"""The lane: tests that need a kernel with everything, on whatever kernel this host has.

A stock Debian kernel (see ``kernel``) is booted under software emulation, with this
host's root, and the working tree in it, for its root (see ``initramfs``).  A test in
there can do what it can do out here, as root, and needs nothing that is special::

    out here                                   inside
    --------                                   ------
    KernelCase.run() -- the test's name ---->  inside: the same test, really run
                     <---- its outcome ------

The guest is booted when the first test asks for it, and ends when the last one that trial
has loaded is done; all tests in between run in one process in there.  If it dies, all that
are left fail, and the text has the end of what its console said.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import SkipTest, TestResult

from twisted.python.failure import Failure
from twisted.trial.itrial import IReporter
from twisted.trial.unittest import PyUnitResultAdapter

from tests.rig.case import RigCase
from tests.rig.initramfs import PORT, SHARE, initramfs
from tests.rig.inside import DEADLINE
from tests.rig.kernel import Kernel, require
from tests.rig.process import Process, temporary_directory
from tests.rig.qemus import Qemu, Unavailable, find

__all__ = ["KernelCase", "Lane", "LaneFailed", "Outcome", "inside", "machine"]

#: Set in the guest's environment.
_INSIDE = "QMIGD_LANE"

#: Loading Twisted's reactor in there took 2.1, 2.3 and 2.5 s.
_FASTEST = ("10.0", "11", "7.2")

#: MiB of RAM for the guest; what is written in there is in it too.
_MEMORY = 3072

_ROOT = Path(__file__).resolve().parents[2]

#: What of this process's environment tests are to see inside.
_HANDED_ON = ("CI", "PATH", "LANG", "LC_ALL")


def inside() -> bool:
    """Whether this process is inside the lane's guest."""
    return _INSIDE in os.environ


class LaneFailed(Exception):
    """What a test inside has failed with, or why it could not be run; the text has all of it."""


@dataclass(frozen=True)
class Outcome:
    """How a test went inside.

    :ivar kind: ``success``, ``skip``, ``failure`` or ``error``.
    :ivar text: the reason of a skip, or the traceback.
    :ivar printed: what it has printed.
    """

    kind: str
    text: str
    printed: str


class Lane:
    """The guest, booted and ready to run tests.

    :ivar kernel: the version of the kernel that runs, as it says itself.
    :ivar boot_seconds: from the start of QEMU until Python was there.
    """

    def __init__(self, kernel: Kernel, qemu: Qemu, cpus: int = 2) -> None:
        """Boot it.

        :param cpus: that it has; QEMU emulates each in a thread of its own.
        :raises LaneFailed: it did not come up.
        """
        began = time.monotonic()
        self._closed = False
        self._stack = ExitStack()
        self._directory = temporary_directory()
        self._stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
        self._log = os.path.join(self._directory, "console")
        with socket.socket(socket.AF_UNIX) as listener:
            path = os.path.join(self._directory, "port")
            listener.bind(path)
            listener.listen(1)
            self._process = Process.start(self._argv(kernel, qemu, path, cpus), log=self._log)
            self._stack.callback(self._process.close)
            pidfd = os.pidfd_open(self._process.pid)
            # QEMU connects before anything else, or ends and says why.
            ready = select.select([listener.fileno(), pidfd], [], [], DEADLINE)[0]
            os.close(pidfd)
            if listener.fileno() not in ready:
                raise self._dead()
            self._port = self._stack.enter_context(listener.accept()[0])
        self._port.settimeout(DEADLINE * 1.5)  # inside it is over before
        self._answers = self._stack.enter_context(self._port.makefile("r"))
        self.kernel = str(self._answer()["kernel"])
        self.boot_seconds = time.monotonic() - began

    def _argv(self, kernel: Kernel, qemu: Qemu, port: str, cpus: int) -> list[str]:
        archive = Path(self._directory, "initramfs")
        environment = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
        archive.write_bytes(
            initramfs(
                kernel,
                [sys.executable, "-m", "tests.rig.inside"],
                directory=str(_ROOT),
                environment={**environment, "HOME": "/root", _INSIDE: "1"},
                paths=[str(_ROOT), sys.prefix, sys.base_prefix],
            )
        )
        argv = [*qemu.argv, "-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", str(cpus)]
        argv += ["-m", str(_MEMORY), "-nodefaults", "-no-user-config", "-no-reboot"]
        argv += ["-display", "none", "-serial", "stdio"]
        argv += ["-kernel", str(kernel.image), "-initrd", str(archive)]
        argv += ["-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable"]
        argv += ["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]
        argv += ["-device", f"virtio-9p-pci,fsdev=root,mount_tag={SHARE}"]
        argv += ["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
        argv += ["-chardev", f"socket,id=port,path={port}"]
        argv += ["-device", f"virtserialport,chardev=port,name={PORT}"]
        return argv

    def run(self, test: str) -> Outcome:
        """Run a test inside, by its full name.

        :raises LaneFailed: the guest has died over it, or before.
        """
        return Outcome(**self._ask({"test": test}))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function inside, and return what it returns there.

        :param function: of a module, at its top level.
        :param arguments: they and what comes back go through JSON.
        :raises LaneFailed: it has failed in there, or the guest has died.
        """
        name = f"{function.__module__}.{function.__qualname__}"
        answer = self._ask({"call": {"name": name, "arguments": arguments}})
        if answer["kind"] != "success":
            raise LaneFailed(f"{answer['text']}{answer['printed']}")
        return answer["value"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            self._port.sendall(json.dumps(question).encode() + b"\n")
        except OSError:
            raise self._dead() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._answers.readline()
        except OSError:
            line = ""
        if not line.endswith("\n"):
            raise self._dead()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _dead(self) -> LaneFailed:
        """Make an end, and return what there is to say of it: to the first who asks, all."""
        if self._closed:
            return LaneFailed("The lane's guest has died over another test.")
        self._process.close()
        console = Path(self._log).read_text(errors="replace")
        self.close()
        return LaneFailed(f"The lane's guest has died. Its console:\n{console[-6000:]}")

    def close(self) -> None:
        """End the guest; harmless when that has happened."""
        self._closed = True
        self._stack.close()


class KernelCase(RigCase):
    """A test that runs inside the lane, and is reported out here as if it had run here."""

    #: The lane, or why there is none; the same for all tests of this process.
    _lane: Lane | Exception | None = None

    #: How many tests trial has loaded that have not been run yet.
    _waiting = 0

    def __init__(self, methodName: str = "runTest") -> None:
        super().__init__(methodName)
        KernelCase._waiting += 1

    def run(self, result: Any = None) -> TestResult | None:
        """Run the test inside; there this is called again, and runs it."""
        if inside():
            return super().run(result)
        reporter = IReporter(result, None) or PyUnitResultAdapter(result)
        reporter.startTest(self)
        try:
            outcome = self._get_lane().run(self.id())
        except SkipTest as skip:
            reporter.addSkip(self, str(skip))
        except Exception:
            reporter.addError(self, Failure())
        else:
            self._report(reporter, outcome)
        finally:
            KernelCase._waiting -= 1
            if not KernelCase._waiting and isinstance(KernelCase._lane, Lane):
                KernelCase._lane.close()
                KernelCase._lane = None
            reporter.stopTest(self)
        return None

    def _report(self, reporter: Any, outcome: Outcome) -> None:
        if outcome.kind == "success":
            reporter.addSuccess(self)
        elif outcome.kind == "skip":
            reporter.addSkip(self, outcome.text)
        else:
            if outcome.printed:
                print(outcome.printed, file=sys.stderr)
            add = reporter.addFailure if outcome.kind == "failure" else reporter.addError
            add(self, Failure(LaneFailed(outcome.text)))

    @staticmethod
    def _get_lane() -> Lane:
        if KernelCase._lane is None:
            try:
                KernelCase._lane = Lane(require(), machine())
            except Exception as error:
                KernelCase._lane = error
        if isinstance(KernelCase._lane, Exception):
            raise KernelCase._lane
        return KernelCase._lane


def machine() -> Qemu:
    """Return the QEMU that is the lane's machine: the one of those here that emulates fastest.

    :raises SkipTest: there is none.  Under ``CI`` that is a failure.
    """
    for label in _FASTEST:
        try:
            return find(label)
        except Unavailable as error:
            reason = error
    if os.environ.get("CI"):
        raise reason
    raise SkipTest(f"There is no QEMU to boot a kernel with: {reason}")
