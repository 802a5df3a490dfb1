"""What the demos have in common: two hosts, what is asked of them, and what is shown.

Everything is asked for with the ``qmigctl`` command; what it prints is its own.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tests.rig.daemons import Daemon, DaemonDied
from tests.rig.guest import Guest, GuestDied
from tests.rig.memory import MemoryGuest
from tests.rig.process import Process, temporary_directory

__all__ = ["PICTURE", "Demo", "Host", "Problem", "facts"]

_QMIGCTL = str(Path(sys.executable).with_name("qmigctl"))

#: Columns of the picture.
PICTURE = 100
#: What rich's Live begins each new drawing with: it goes back over the one before.
_REDRAW = re.compile(r"\r(?:\x1b\[(?:1A|2K))+")


class Problem(Exception):
    """The demo cannot go on; the text is a sentence that says why."""


@dataclass(frozen=True)
class Host:
    """One of the two hosts, as the demo shows them."""

    name: str
    daemon: Daemon


def facts(columns: int) -> Table:
    """Return a table without lines, of whose columns only the last one has long texts."""
    table = Table.grid(padding=(0, 2))
    for _ in range(columns - 1):
        table.add_column(no_wrap=True)
    table.add_column()
    return table


class Demo:
    """One demo: what it shows is a subclass's affair.

    :ivar console: where it is shown.
    :ivar guests: all that there have been, for the end.
    """

    def __init__(self, console: Console, *, picture: bool) -> None:
        """:param picture: what qmigctl draws is shown once, as on a terminal."""
        self.console = console
        self.guests: list[Guest | MemoryGuest] = []
        self._picture = picture
        self._daemons: list[Daemon] = []
        self._directory = temporary_directory()

    def run(self) -> None:
        """Do it all, and check it all.

        :raises Problem: something is not as it should be.
        """
        raise NotImplementedError

    def close(self) -> int:
        """End everything; returns how many processes there had been.

        :raises Problem: something is left.
        """
        processes: list[Process] = []
        for one in self._everything:
            with contextlib.suppress(DaemonDied, GuestDied):
                processes.append(one.process)
        # As an administrator would: SIGTERM, and a clean end.
        codes = {one.name: one.stop() for one in self._daemons if _runs(one)}
        for one in (*self.guests, *self._daemons):
            one.close()
        shutil.rmtree(self._directory)
        for name, code in codes.items():
            # twistd puts its own house in order, and then ends as SIGTERM would have it.
            if code not in (0, -signal.SIGTERM):
                raise Problem(f"The daemon of {name} ended with exit code {code}.")
        left = [one.directory for one in self._everything if os.path.exists(one.directory)]
        if left or any(process.running for process in processes):
            raise Problem(f"Something is left: {left or 'a process'}.")
        return len(processes)

    @property
    def _everything(self) -> list[Daemon | Guest | MemoryGuest]:
        return [*self._daemons, *self.guests]

    def logs(self) -> Iterator[str]:
        """The last lines of each daemon's log."""
        for one in self._daemons:
            for line in one.log.splitlines()[-5:]:
                yield f"{one.name}: {line}"

    # its parts

    def hosts(self) -> None:
        """Make the authority that signs the hosts' certificates."""
        self.title("Two hosts, each with a certificate")
        self.qmigctl("pki", "init", "--dir", self._directory)

    def host(self, name: str, guest: Mapping[str, Any]) -> Host:
        """Make a host that knows the guest, and start its daemon."""
        self.qmigctl("pki", "host", name, "127.0.0.1", "--dir", self._directory)
        files = Path(self._directory, "hosts", name)
        daemon = Daemon(
            name,
            guests={"demo": guest},
            policy={"source-after": "quit"},
            tls={
                "certificate": str(files / "server-cert.pem"),
                "key": str(files / "server-key.pem"),
                "ca": str(files / "ca-cert.pem"),
            },
        )
        self._daemons.append(daemon)
        return Host(name, daemon.start())

    def qmigctl(self, *words: str) -> None:
        """Show a command of qmigctl's that talks to no daemon, and run it."""
        shown = " ".join(words).replace(self._directory, "pki")
        self.console.print(f"[dim]$[/] [bold]qmigctl {escape(shown)}[/]", soft_wrap=True)
        done = subprocess.run([_QMIGCTL, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Problem(done.stderr.strip())

    def title(self, text: str) -> None:
        """Show what comes next."""
        self.console.print()
        self.console.print(Text(text, "bold cyan"))

    def migrate(self, here: Host, there: Host) -> Mapping[str, Any]:
        """Have qmigctl move the guest; returns what ``query-migrate`` says of it."""
        words = ["migrate", "demo", there.daemon.uri]
        self.console.print(
            f"[dim]{here.name}$[/] [bold]qmigctl {escape(' '.join(words))}[/]", soft_wrap=True
        )
        self.console.file.flush()
        argv = [_QMIGCTL, *words]
        environment = {**os.environ, "QMIGD_SOCKET": f"unix:{here.daemon.monitor_path}"}
        if self._picture:
            code = self._drawn(argv, environment)
        else:
            code = subprocess.run(argv, env=environment, check=False).returncode
        if code:
            raise Problem(f"The guest was not moved: qmigctl ended with exit code {code}.")
        entry = here.daemon.execute("query-migrate", guest="demo")[-1]
        if entry["status"] != "completed" or "plan" not in entry:
            raise Problem(f"qmigctl was content, but the daemon says: {entry['step']}.")
        return dict(entry)

    def _drawn(self, argv: list[str], environment: Mapping[str, str]) -> int:
        """Run qmigctl on a terminal of its own, and print one look at its bar and the end."""
        master, slave = pty.openpty()
        more = {"COLUMNS": str(PICTURE), "TERM": "xterm-256color"}
        child = subprocess.Popen(
            argv, env={**environment, **more}, stdout=slave, stderr=slave, stdin=slave
        )
        os.close(slave)
        output = b""
        with contextlib.suppress(OSError):  # how a pseudo terminal says that it is over
            while data := os.read(master, 65536):
                output += data
        os.close(master)
        *frames, end = _REDRAW.split(output.decode().replace("\r\n", "\n"))
        looks = {
            abs(60 - int(percent[1])): frame
            for frame in frames
            if (percent := re.search(r"(\d+)%", frame))
        }
        if looks:
            self.console.print(_plain(looks[min(looks)]))
        self.console.print(_plain(end))
        return child.wait()

    def show_plan(self, host: Host, there: Mapping[str, Any], back: Mapping[str, Any]) -> None:
        """Show what was negotiated, with the reasons."""
        summaries = {
            feature["name"]: feature["summary"]
            for feature in host.daemon.execute("query-features")["features"]
        }
        plans = {"there and back": there}
        if there != back:
            plans = {"there": there, "back": back}
        for way, plan in plans.items():
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
            table.add_column(way, no_wrap=True)
            table.add_column("", no_wrap=True)
            table.add_column("why")
            for name in plan["features"]:
                terms = ", ".join(f"{k} {v}" for k, v in plan["agreements"][name].items())
                words = f"both sides can: {summaries.get(name, '')}"
                words = escape(f"{words} ({terms})" if terms else words)
                table.add_row(name, "[green]used[/]", words)
            for left in plan["left-out"]:
                table.add_row(left["name"], "[yellow]left out[/]", escape(left["reason"]))
            table.add_row("path", f"[green]{plan['path']}[/]", escape(plan["path-reason"]))
            channels = plan["channels"]
            table.add_row("channels", str(len(channels)), ", ".join(_channels(channels)))
            self.console.print(table)


def _plain(printed: str) -> Text:
    """Return what a terminal would show, without what it is told about its cursor."""
    return Text.from_ansi(re.sub(r"\x1b\[\?25[lh]", "", printed).strip("\n"))


def _runs(daemon: Daemon) -> bool:
    try:
        return daemon.process.running
    except DaemonDied:
        return False


def _channels(channels: list[dict[str, Any]]) -> Iterator[str]:
    for channel in channels:
        several = sum(other["name"] == channel["name"] for other in channels) > 1
        yield f"{channel['name']} {channel['index']}" if several else channel["name"]
