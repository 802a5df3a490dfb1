"""The documentation is true: it builds, its examples start, and its commands do what they say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tomllib
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from qmigd.cli.options import LOCAL, SUBCOMMANDS
from qmigd.daemon.config_file import parse
from tests.rig.case import RigCase
from tests.rig.daemons import free_ports
from tests.rig.news import wait_until
from tests.rig.process import Process, temporary_directory
from tests.rig.qemus import require

_ROOT = Path(__file__).parents[1]
_BIN = Path(sys.executable).parent
_PAGES = [_ROOT / "README.md", _ROOT / "CHANGELOG.md", *sorted((_ROOT / "docs").rglob("*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language in a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


class BuildTests(SynchronousTestCase):
    def test_build(self) -> None:
        """Sphinx builds the documentation without a warning, and every page is reached."""
        done = subprocess.run(
            [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", self.mktemp()]
            + [str(_ROOT / "docs"), out := self.mktemp()],
            capture_output=True,
            text=True,
            check=False,
        )
        self.assertEqual((0, "", ""), (done.returncode, done.stdout, done.stderr))
        pages = {path.stem for path in (_ROOT / "docs").glob("*.md")}
        built = {path.stem for path in Path(out).glob("*.html")}
        self.assertLessEqual(pages, built)
        for path in Path(out).rglob("*.html"):
            self.assertNotIn("out of the code:", path.read_text(), path)

    def test_links(self) -> None:
        """What a page links to in the tree is there."""
        for page in _PAGES:
            for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
                self.assertTrue((page.parent / target).exists(), f"{page.name}: {target}")

    def test_named(self) -> None:
        """Modules and files that a page names are there."""
        for page in _PAGES:
            for name in re.findall(r"`((?:qmigd|tests|docs|conf)/[\w./-]+)`", page.read_text()):
                self.assertTrue((_ROOT / name).exists(), f"{page.name}: {name}")
        rooms = (_ROOT / "docs/architecture.md").read_text().partition("## One migration")[2]
        for name in re.findall(r"`([a-z]+/[a-z_]+\.py)`", rooms.partition("## Where")[0]):
            self.assertTrue((_ROOT / "qmigd" / name).exists(), name)

    def test_commands(self) -> None:
        """Every qmigctl command that a page shows is one."""
        for page in _PAGES:
            text = page.read_text()
            for command in re.findall(r"(?:^|`|'|\$ )qmigctl ([a-z][a-z-]*)", text, re.MULTILINE):
                self.assertIn(command, {*SUBCOMMANDS, *LOCAL}, page.name)

    def test_configurations(self) -> None:
        """Every configuration that is shown as an example is a good one."""
        environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
        for page in (_ROOT / "README.md", _ROOT / "docs/getting-started.md"):
            blocks = _blocks(page, "toml")
            self.assertTrue(blocks)
            for text in blocks:
                # the program need not be on this host
                parse(text.replace("qemu-system-x86_64", "sh"), page.name, environ, 0)


class OperationsTests(RigCase):
    def test_cannot_start(self) -> None:
        """A daemon that cannot listen ends with exit code 1, and says why in a sentence."""
        first = self.daemon("first").start()
        second = self.daemon("second", listen=[first.uri])
        self.assertEqual(1, second.launch().wait())
        self.assertIn(f"qmigd does not start: it cannot listen on {first.uri}", second.log)
        self.assertNotIn("Traceback", second.log)
        third = self.daemon("third", lisen=[])
        self.assertEqual(1, third.launch().wait())
        self.assertIn("did you mean 'listen'", third.log)


class ReadmeTests(RigCase):
    """The README's own lines, with other paths and ports."""

    def test_ten_lines(self) -> None:
        """They move a guest."""
        require("7.2")
        (config,) = _blocks(_ROOT / "README.md", "toml")
        host_b, host_a = _blocks(_ROOT / "README.md", "sh")
        self.assertEqual(10, len((config + host_b + host_a).splitlines()))
        port = free_ports()[0]
        a, b = self.host("a", "", port), self.host("b", config, port)
        self.type(b, host_b, port)
        said = self.type(a, host_a, port)
        self.assertRegex(said, r"(?m)^web1 moved to tcp:127\.0\.0\.1:\d+ in ")
        self.assertRegex(said, r"(?m)^  path +(handover|direct): ")
        code, guests = self.run_line(b, "qmigctl guests")
        self.assertEqual(0, code)
        self.assertRegex(guests, r"(?m)^web1 +running ")

    def host(self, name: str, config: str, port: int) -> Path:
        """Make a directory that stands for a host, with its configuration."""
        directory = Path(temporary_directory())
        self.addCleanup(shutil.rmtree, directory, ignore_errors=True)
        if "[daemon]" not in config:
            config = f'[daemon]\nlisten = ["tcp:127.0.0.1:{free_ports()[0]}"]\n{config}'
        ports = free_ports(2)
        own = (
            f'[daemon]\nmonitor = "unix:{directory}/monitor"\nstate-dir = "{directory}"\n'
            f'direct-ports = "{ports[0]}-{ports[-1]}"\n'
        )
        config = self.adapted(directory, config, port).replace("[daemon]\n", own)
        tomllib.loads(config)
        (directory / f"host-{name}.toml").write_text(config)
        return directory

    def adapted(self, host: Path, text: str, port: int) -> str:
        text = text.replace("192.0.2.2:16516", f"127.0.0.1:{port}").replace("/tmp/", f"{host}/")
        return text.replace("/dev/null", "host-a.toml")

    def type(self, host: Path, lines: str, port: int) -> str:
        """Type the lines one by one; the daemon is left running, once it is there."""
        said = ""
        for line in self.adapted(host, lines, port).splitlines():
            if line.startswith("twistd"):
                self.start_daemon(host, line)
                continue
            self.addCleanup(self.end_qemu, host)
            code, output = self.run_line(host, line)
            self.assertEqual(0, code, f"{line}\n{output}")
            said += output
        return said

    def environment(self, host: Path) -> dict[str, str]:
        path = f"{_BIN}:{os.environ['PATH']}"
        return {"PATH": path, "QMIGD_SOCKET": f"unix:{host}/monitor", "PYTHONUNBUFFERED": "1"}

    def run_line(self, host: Path, line: str) -> tuple[int, str]:
        with open(host / "said", "w+") as said:  # a pipe would stay open as long as the QEMU runs
            done = subprocess.run(
                shlex.split(line),
                cwd=host,
                env={**os.environ, **self.environment(host)},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                check=False,
            )
            said.seek(0)
            return done.returncode, said.read()

    def start_daemon(self, host: Path, line: str) -> None:
        log = host / "log"
        process = Process.start(
            ["/usr/bin/env", *shlex.split(line)],
            log=str(log),
            environment=self.environment(host),
            directory=str(host),
        )
        # last in, first out: the daemon goes before the QEMU that it has started
        self.addCleanup(self.end_qemu, host)
        self.addCleanup(process.close)

        def said() -> str:
            return log.read_text() if log.exists() else ""

        wait_until(lambda: "management socket:" in said() or not process.running, said)

    def end_qemu(self, host: Path) -> None:
        """End the QEMU that answers on a host's QMP socket, whoever started it."""
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(host / "web1.qmp"))
            except OSError:
                return
            size = struct.calcsize("3i")
            peer = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        Process.adopt(struct.unpack("3i", peer)[0]).close()
