"""The base of tests that use guests and daemons: cleans up, and shows logs on a failure."""

from __future__ import annotations

import sys
from typing import Any
from unittest import TestResult

from twisted.trial.unittest import TestCase

from tests.rig.daemons import Daemon
from tests.rig.guest import Guest
from tests.rig.netns import Isolated, Link, require
from tests.rig.qemus import Qemu

__all__ = ["RigCase"]


class RigCase(TestCase):
    """A test whose guests, daemons and links end with it.

    If it fails, what its daemons and QEMUs have printed is shown.

    :cvar in_band: its daemons listen for the handshake's in-band form.
    """

    in_band = False

    def guest(self, qemu: Qemu, name: str = "guest", **options: Any) -> Guest:
        """Prepare a guest (see :class:`Guest`); it is not started."""
        guest = Guest(qemu, name, **options)
        self._keep(guest)
        return guest

    def daemon(self, name: str = "qmigd", **options: Any) -> Daemon:
        """Prepare a daemon (see :class:`Daemon`); it is not started."""
        daemon = Daemon(name, in_band=self.in_band, preloaded=True, **options)
        self._keep(daemon)
        return daemon

    def link(self) -> Link:
        """Make two joined namespaces, or skip the test with the reason."""
        require()
        link = Link()
        self.addCleanup(link.close)
        return link

    def isolated(self) -> Isolated:
        """Make two namespaces without any network, or skip the test with the reason."""
        require()
        isolated = Isolated()
        self.addCleanup(isolated.close)
        return isolated

    def _keep(self, one: Guest | Daemon) -> None:
        def end() -> None:
            self._logs.append((one.name, one.log))
            one.close()

        self.addCleanup(end)

    def run(self, result: Any = None) -> TestResult | None:
        """Run the test, and show the logs if it did not succeed."""
        self._logs: list[tuple[str, str]] = []
        problems = len(result.failures) + len(result.errors)
        ran: TestResult | None = super().run(result)
        if len(result.failures) + len(result.errors) > problems:
            for name, log in self._logs:
                if log:
                    print(f"--- what {name} has printed ---\n{log}", file=sys.stderr)
        return ran
