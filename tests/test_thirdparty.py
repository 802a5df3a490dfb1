"""Somebody else's features: installed beside qmigd they are used, and qmigd lives without them.

The distribution in ``tests/thirdparty`` is built into a wheel and installed, with
qmigd, into a throw-away environment.  The daemons of that environment are real, and so
are the QEMUs.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from tests.rig.case import RigCase
from tests.rig.daemons import Daemon, free_ports
from tests.rig.guest import Guest
from tests.rig.news import wait_until
from tests.rig.process import temporary_directory
from tests.rig.proofs import counted_without_a_gap, only_one_runs
from tests.rig.qemus import require
from tests.test_packaging import Environment

_DEFLATE = "__org.example_deflate"
_CONVERGE = "__org.example_converge"

_TWISTD = """\
#!{python}
import sys
from twisted.scripts.twistd import run
sys.exit(run())
"""


@functools.cache
def _environment() -> Environment:
    """Return an environment with qmigd and the third party's wheel, and two broken features."""
    folder = Path(temporary_directory())
    environment = Environment(folder)
    environment.install(environment.source)
    environment.run(
        *(sys.executable, "-m", "build", "--wheel", "--no-isolation"),
        *("--outdir", folder / "dist", environment.source / "tests" / "thirdparty"),
    )
    (wheel,) = (folder / "dist").glob("*.whl")
    environment.install(wheel)
    _install_broken(environment.site)
    twistd = environment.bin / "twistd"
    twistd.write_text(_TWISTD.format(python=environment.python))
    twistd.chmod(0o755)
    return environment


def _install_broken(site: Path) -> None:
    info = site / "qmigd_example_broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: qmigd-example-broken\nVersion: 1\n"
    )
    (info / "entry_points.txt").write_text(
        "[qmigd.features]\n"
        "__org.example_broken = qmigd_example_broken:feature\n"
        "__org.example_half = qmigd_example_half:feature\n"
    )
    (site / "qmigd_example_broken.py").write_text("import a_module_that_nobody_has\n")
    (site / "qmigd_example_half.py").write_text(
        "class Half:\n    name = '__org.example_half'\n\nfeature = Half()\n"
    )
    (site / "twisted/plugins/qmigd_example_torn.py").write_text("import nobody_has_this_either\n")


class Wire:
    """What stands between two daemons and counts the bytes, as a network does.

    :ivar uri: where the source connects.
    :ivar sent: bytes from the source to the destination.
    """

    def __init__(self, to: str) -> None:
        form, host, port = to.rsplit(":", 2)
        self._to = host, int(port)
        self.sent = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", free_ports()[0]))
        self.uri = f"{form}:127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = [self._listener]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._to)
                self._open += [near, far]
                for ends in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._copy, args=ends, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                if counted:
                    with self._lock:
                        self.sent += len(data)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


class ThirdPartyCase(RigCase):
    def theirs(self, name: str, guest: Guest) -> Daemon:
        """Start a daemon that has the third party's features."""
        return self.start(name, guest, python=str(_environment().python))

    def start(self, name: str, guest: Guest, **options: Any) -> Daemon:
        guests = {"vm": {"qmp": f"unix:{guest.qmp_path}"}}
        return self.daemon(name, guests=guests, **options).start()

    def guests(self) -> tuple[Guest, Guest]:
        qemu = require("7.2")
        here, there = self.guest(qemu, "here"), self.guest(qemu, "there", incoming=True)
        there.start()
        return here.start(), there

    def migrate(self, source: Daemon, uri: str) -> dict[str, Any]:
        """Move the guest and return what the source says of it at the end."""
        source.execute("migrate", guest="vm", uri=uri)

        def ended() -> dict[str, Any]:
            (entry,) = source.execute("query-migrate", guest="vm")
            return entry if "ended" in entry else {}

        return wait_until(ended, lambda: f"the end of the migration; {source.log}")

    def check(self, here: Guest, there: Guest) -> None:
        only_one_runs(there, here)
        counted_without_a_gap(here, there)
        there.check_ram()

    def check_both_sides(self) -> None:
        here, there = self.guests()
        source, destination = self.theirs("source", here), self.theirs("destination", there)
        offered = {one["name"]: one for one in destination.execute("query-features")["features"]}
        self.assertTrue(offered[_DEFLATE]["offered"])
        self.assertTrue(offered[_CONVERGE]["offered"])

        wire = Wire(destination.uri)
        self.addCleanup(wire.close)
        entry = self.migrate(source, wire.uri)
        self.assertEqual("completed", entry["status"], entry)
        plan = entry["plan"]
        self.assertLessEqual({_DEFLATE, _CONVERGE, "postcopy-ram"}, set(plan["features"]))
        self.assertEqual("relay", plan["path"])
        self.assertEqual({"level": 1}, plan["agreements"][_DEFLATE])
        self.check(here, there)
        # The guest's pages are much the same, and QEMU sends each in full.
        self.assertLess(0, wire.sent)
        self.assertLess(wire.sent, entry["ram"]["transferred"] / 4)


class InBandTests(ThirdPartyCase):
    """In the handshake's in-band form."""

    in_band = True

    def test_both_sides(self) -> None:
        """The features are negotiated there, and what they encode follows it bare."""
        self.check_both_sides()


class ThirdPartyTests(ThirdPartyCase):
    def test_both_sides(self) -> None:
        """Two daemons that have the features offer, select and use them; the RAM is right."""
        self.check_both_sides()

    def test_pair(self) -> None:
        """query-features shows them for the pair, with what they do."""
        here, there = self.guests()
        source, destination = self.theirs("source", here), self.theirs("destination", there)
        answer = source.execute("query-features", guest="vm", uri=destination.uri)
        (deflate,) = [one for one in answer["features"] if one["name"] == _DEFLATE]
        self.assertTrue(deflate["selected"])
        self.assertEqual("compresses every channel with deflate", deflate["summary"])

    def test_destination_without(self) -> None:
        """Into a daemon without them the move goes on without, and says why."""
        here, there = self.guests()
        source, destination = self.theirs("source", here), self.start("destination", there)
        entry = self.migrate(source, destination.uri)
        self.assertEqual("completed", entry["status"], entry)
        plan = entry["plan"]
        self.assertIn("postcopy-ram", plan["features"])
        left_out = {one["name"]: one["reason"] for one in plan["left-out"]}
        for name in (_DEFLATE, _CONVERGE):
            self.assertNotIn(name, plan["features"])
            self.assertEqual("destination host: its qmigd does not offer it", left_out[name])
        self.check(here, there)

    def test_source_without(self) -> None:
        """From a daemon without them, what it does not know is passed over."""
        here, there = self.guests()
        source, destination = self.start("source", here), self.theirs("destination", there)
        entry = self.migrate(source, destination.uri)
        self.assertEqual("completed", entry["status"], entry)
        self.assertNotIn(_DEFLATE, entry["plan"]["features"])
        self.assertIn("postcopy-ram", entry["plan"]["features"])
        self.check(here, there)

    def test_broken(self) -> None:
        """What cannot be loaded, or is no feature, is logged by name; the daemon starts."""
        daemon = self.daemon("broken", python=str(_environment().python)).start()
        names = {one["name"] for one in daemon.execute("query-features")["features"]}
        self.assertLessEqual({_DEFLATE, _CONVERGE, "multifd"}, names)
        self.assertFalse({name for name in names if "broken" in name or "half" in name})
        wait_until(lambda: "features:" in daemon.log, lambda: daemon.log)
        for words in (
            "feature __org.example_broken (qmigd_example_broken:feature) is left out: it cannot "
            "be loaded: ModuleNotFoundError: No module named 'a_module_that_nobody_has'",
            "feature __org.example_half (qmigd_example_half:feature) is left out: ",
            "qmigd_example_torn",
        ):
            self.assertIn(words, daemon.log)
