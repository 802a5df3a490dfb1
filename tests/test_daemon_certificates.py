"""A daemon's certificates: read when it starts, read anew on SIGHUP, warned of in time."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.rig import qemus
from tests.rig.case import RigCase
from tests.rig.certificates import Authority, Files
from tests.rig.daemons import Daemon, free_ports
from tests.rig.news import wait_until


class CertificateCase(RigCase):
    def setUp(self) -> None:
        self.directory = Path(self.mktemp()).absolute()
        self.ca = Authority(self.directory)
        self.files = self.ca.host("hosta.example", "192.0.2.7")

    def replace(self, other: Files) -> None:
        """Put other files where the daemon's are."""
        shutil.copyfile(other.certificate, self.files.certificate)
        shutil.copyfile(other.key, self.files.key)

    def hang_up(self, daemon: Daemon, expected: str) -> None:
        """Send SIGHUP, and wait until the daemon has logged something."""
        before = len(daemon.log)
        daemon.process.signal(signal.SIGHUP)
        wait_until(lambda: expected in daemon.log[before:], lambda: f"{expected}:\n{daemon.log}")


class StartTests(CertificateCase):
    def test_good(self) -> None:
        """It says whose certificate it has, and may be reached from other hosts."""
        port = free_ports()[0]
        daemon = self.daemon(tls=self.files.table(), listen=[f"tcp:0.0.0.0:{port}"]).start()
        self.assertIn("certificate for hosta.example, 192.0.2.7, good until 20", daemon.log)
        self.assertIn(self.files.load().fingerprint, daemon.log)
        self.assertNotIn("warnings", daemon.execute("query-features"))

    def test_bad(self) -> None:
        """It does not start with files that are not good, and says in a sentence why."""
        self.files.key.chmod(0o644)
        daemon = self.daemon(tls=self.files.table())
        self.assertEqual(1, daemon.launch().wait())
        self.assertIn(f"say 'chmod 600 {self.files.key}'", daemon.log)
        self.assertNotIn("Traceback", daemon.log)

    def test_off(self) -> None:
        """Where the policy does not want TLS, nothing has to be good."""
        self.files.key.unlink()
        daemon = self.daemon(tls=self.files.table(), policy={"tls": "off"}).start()
        self.hang_up(daemon, "uses no certificates")


class HangUpTests(CertificateCase):
    def test_new(self) -> None:
        """On SIGHUP new files are read, and logged."""
        daemon = self.daemon(tls=self.files.table()).start()
        self.replace(self.ca.host("hosta.example", "hosta.dc2.example"))
        self.hang_up(daemon, self.files.load().fingerprint)
        self.assertIn("certificate for hosta.example, hosta.dc2.example, good until", daemon.log)

    def test_bad(self) -> None:
        """If the new ones are not good the old ones stay, and the log says why."""
        self.replace(self.ca.host("hosta.example", days=(-1, 20)))
        daemon = self.daemon(tls=self.files.table()).start()
        warnings = daemon.execute("query-features")["warnings"]
        self.replace(self.ca.expired("hosta.example"))
        self.hang_up(daemon, f"stay as they were: The certificate {self.files.certificate} expired")
        self.assertEqual(warnings, daemon.execute("query-features")["warnings"])
        self.replace(self.ca.host("hosta.example"))
        self.hang_up(daemon, self.files.load().fingerprint)
        self.assertNotIn("warnings", daemon.execute("query-features"))

    def test_none(self) -> None:
        """A daemon without certificates goes on after SIGHUP as before."""
        daemon = self.daemon().start()
        self.hang_up(daemon, "uses no certificates")
        daemon.execute("query-version")


class WarningTests(CertificateCase):
    def test_soon(self) -> None:
        """A certificate that ends within 30 days is warned of, in the log and with features."""
        self.replace(self.ca.host("hosta.example", days=(-1, 12.5)))
        guest = self.guest(qemus.require("7.2"), paused=True).start()
        daemon = self.daemon(
            tls=self.files.table(), guests={"vm": {"qmp": f"unix:{guest.qmp_path}"}}
        ).start()
        sentence = f"the certificate {self.files.certificate} ends in 12 days, on "
        self.assertIn(sentence, daemon.log)
        for arguments in ({}, {"guest": "vm"}):
            answer = daemon.execute("query-features", arguments)
            (warning,) = answer["warnings"]
            self.assertTrue(warning.startswith(sentence), warning)
            self.assertIn("'qmigctl pki host --force hosta.example'", warning)
        shown = subprocess.run(
            [Path(sys.executable).with_name("qmigctl"), "features"],
            env={**os.environ, "QMIGD_SOCKET": f"unix:{daemon.monitor_path}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        self.assertIn(f"\nwarning  {warning}\n", shown)
