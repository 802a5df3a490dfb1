"""``make demo``: a running guest moves to another host and back, as a user would have it.

Two daemons with separate state are two hosts, each with a certificate.  On host A a
QEMU runs the rig's guest, which dirties its RAM and counts on its serial port.
Everything is asked for with the ``qmigctl`` command; what it prints is its own.  Then
the proofs: the plan with its reasons, the RAM page by page, and the count on the serial
port over all three QEMUs.

    python -m tests.demo [--picture FILE.svg]

``--picture`` draws what the run printed, with one look at qmigctl's progress bar.
The exit code is 0 only if all of it is as it should be.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from tests.rig.bootsector import PAGE, Program
from tests.rig.daemons import Daemon, DaemonDied
from tests.rig.guest import Guest, GuestDied, Line
from tests.rig.process import Process, temporary_directory
from tests.rig.proofs import counted_without_a_gap
from tests.rig.qemus import Qemu

__all__ = ["Problem", "installed_qemu", "main"]

_PROGRAM = "qemu-system-x86_64"
_QMIGCTL = str(Path(sys.executable).with_name("qmigctl"))
#: The first QEMU that the guest's machine and qmigd are tried with.
_OLDEST = (7, 2)

_MEMORY = 256  # MiB
_WORK = Program(pages=128 << 8, pages_per_tick=16)  # dirties 128 MiB, 6 MiB/s

#: Columns of the picture.
_PICTURE = 100
#: What rich's Live begins each new drawing with: it goes back over the one before.
_REDRAW = re.compile(r"\r(?:\x1b\[(?:1A|2K))+")


class Problem(Exception):
    """The demo cannot go on; the text is a sentence that says why."""


def installed_qemu() -> Qemu:
    """Return the host's own QEMU.

    :raises Problem: there is none, or it is too old.
    """
    path = shutil.which(_PROGRAM)
    if path is None:
        raise Problem(
            f"There is no {_PROGRAM} here, and the demo moves a real QEMU guest. Install it "
            f"(Debian, Ubuntu: 'apt install qemu-system-x86'; Fedora: 'dnf install "
            f"qemu-system-x86') and say 'make demo' again."
        )
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", said.stdout)
    if found is None:
        raise Problem(f"{path} does not run: {said.stderr.strip() or 'it says no version'}.")
    version = ".".join(found.groups())
    if (int(found[1]), int(found[2])) < _OLDEST:
        raise Problem(f"{path} is QEMU {version}; the demo needs 7.2 or newer.")
    return Qemu("system", version, (path,))


@dataclass(frozen=True)
class _Host:
    """One of the two hosts, as the demo shows them."""

    name: str
    daemon: Daemon


class _Demo:
    def __init__(self, console: Console, *, picture: bool) -> None:
        self._console = console
        self._picture = picture
        self._guests: list[Guest] = []
        self._daemons: list[Daemon] = []
        self._directory = temporary_directory()

    # what is shown

    def run(self, qemu: Qemu) -> None:
        """Do it all, and check it all.

        :raises Problem: something is not as it should be.
        """
        home = self._guest(Guest(qemu, "host A", memory=_MEMORY, machine="pc", program=_WORK))
        away = self._guest(
            Guest(qemu, "host B", memory=_MEMORY, machine="pc", program=_WORK, incoming=True)
        )
        self._title("Two hosts, each with a certificate")
        self._qmigctl("pki", "init", "--dir", self._directory)
        # A finds its QEMU by the QMP socket; B starts one when the guest comes.
        here = self._host("host-a", {"qmp": f"unix:{home.qmp_path}"})
        there = self._host("host-b", {"launch": away.launch})
        home.start()
        self._title("A running guest")
        self._introduce(qemu, here, there)

        self._title("There ...")
        first = self._migrate(here, there)
        away.wait_for_monitor()
        away.wait_ticks(1)
        self._check(home, away)

        # On A a new QEMU waits, on the same QMP socket: qmigd has ended the first one.
        if home.alive:
            raise Problem("host-a's QEMU still runs, though 'source-after' is \"quit\".")
        again = self._guest(
            Guest(qemu, "host A", memory=_MEMORY, machine="pc", program=_WORK, incoming=True)
        )
        again.qmp_path = home.qmp_path
        again.start()

        self._title("... and back")
        second = self._migrate(there, here)
        again.wait_ticks(1)
        self._check(away, again)

        self._title("What was negotiated, and why")
        self._show_plan(here, first["plan"], second["plan"])
        again.wait_ticks(20)
        counted_without_a_gap(home, away, again)
        ticks = again.counter + 1
        self._console.print(
            f"\nThe guest counted to {ticks} on three QEMUs, and not one number is missing or came "
            f"twice."
        )

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
        for one in self._everything:
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
    def _everything(self) -> list[Daemon | Guest]:
        return [*self._daemons, *self._guests]

    def logs(self) -> Iterator[str]:
        """The last lines of each daemon's log."""
        for one in self._daemons:
            for line in one.log.splitlines()[-5:]:
                yield f"{one.name}: {line}"

    # its parts

    def _guest(self, guest: Guest) -> Guest:
        self._guests.append(guest)
        return guest

    def _host(self, name: str, guest: Mapping[str, Any]) -> _Host:
        self._qmigctl("pki", "host", name, "127.0.0.1", "--dir", self._directory)
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
        return _Host(name, daemon.start())

    def _qmigctl(self, *words: str) -> None:
        """Show a command of qmigctl's that talks to no daemon, and run it."""
        shown = " ".join(words).replace(self._directory, "pki")
        self._console.print(f"[dim]$[/] [bold]qmigctl {escape(shown)}[/]", soft_wrap=True)
        done = subprocess.run([_QMIGCTL, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Problem(done.stderr.strip())

    def _title(self, text: str) -> None:
        self._console.print()
        self._console.print(Text(text, "bold cyan"))

    def _introduce(self, qemu: Qemu, here: _Host, there: _Host) -> None:
        rate = _WORK.dirty_rate / (1 << 20)
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column()
        table.add_row(
            here.name,
            here.daemon.uri,
            f"runs the guest: QEMU {qemu.version}, {_MEMORY} MiB; it writes {rate:.1f} MiB of its "
            f"RAM and counts {_WORK.ticks_per_second} lines on its serial port each second",
        )
        table.add_row(there.name, there.daemon.uri, "has no QEMU yet; its qmigd will start one")
        self._console.print(table)

    def _migrate(self, here: _Host, there: _Host) -> Mapping[str, Any]:
        """Have qmigctl move the guest; returns what ``query-migrate`` says of it."""
        words = ["migrate", "demo", there.daemon.uri]
        self._console.print(
            f"[dim]{here.name}$[/] [bold]qmigctl {escape(' '.join(words))}[/]", soft_wrap=True
        )
        self._console.file.flush()
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
        more = {"COLUMNS": str(_PICTURE), "TERM": "xterm-256color"}
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
            self._console.print(_plain(looks[min(looks)]))
        self._console.print(_plain(end))
        return child.wait()

    def _check(self, left: Guest, now: Guest) -> None:
        """Check the guest's RAM and its count where it runs now, and say so."""
        if not now.running():
            raise Problem(f"The guest does not run on {now.name}: it is {now.status()} there.")
        last, first = left.lines[-1], now.lines[0]
        counted_without_a_gap(left, now)
        window = now.check_ram()
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        rounds = f"its {_ordinal(window.generation)} round"
        if window.boundary < _WORK.end:
            rounds += f" up to {window.boundary:#x}, the one before from there on"
        pages = f"{_WORK.pages:,} pages ({_WORK.pages * PAGE >> 20} MiB)"
        table.add_row(
            "  RAM     ", f"[green]right[/]: all {pages} hold what the guest wrote: {rounds}"
        )
        table.add_row("  serial", _handed_on(left, last, now, first))
        self._console.print(table)

    def _show_plan(self, host: _Host, there: Mapping[str, Any], back: Mapping[str, Any]) -> None:
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
            self._console.print(table)


def _plain(printed: str) -> Text:
    """Return what a terminal would show, without what it is told about its cursor."""
    return Text.from_ansi(re.sub(r"\x1b\[\?25[lh]", "", printed).strip("\n"))


def _runs(daemon: Daemon) -> bool:
    try:
        return daemon.process.running
    except DaemonDied:
        return False


def _handed_on(left: Guest, last: Line, now: Guest, first: Line) -> str:
    silence = (first.seen - last.seen) * 1000
    return (
        f"the last line on {left.name} was {last.tick:08x}, the first on {now.name} "
        f"{first.tick:08x}, {silence:.0f} ms later"
    )


def _channels(channels: list[dict[str, Any]]) -> Iterator[str]:
    for channel in channels:
        several = sum(other["name"] == channel["name"] for other in channels) > 1
        yield f"{channel['name']} {channel['index']}" if several else channel["name"]


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number // 10 % 10 != 1 else 0, "th")
    return f"{number}{ending}"


# -- the picture ------------------------------------------------------------------

_COLOURS = TerminalTheme(
    (28, 30, 38),
    (214, 218, 226),
    [
        (28, 30, 38), (224, 108, 117), (152, 195, 121), (229, 192, 123),
        (97, 175, 239), (198, 120, 221), (86, 182, 194), (214, 218, 226),
    ],
    [
        (92, 99, 112), (224, 108, 117), (152, 195, 121), (229, 192, 123),
        (97, 175, 239), (198, 120, 221), (86, 182, 194), (255, 255, 255),
    ],
)  # fmt: skip

#: rich's own form fetches a font from elsewhere; this one takes the reader's.
_SVG = """\
<svg viewBox="VIEW" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; white-space: pre; }}
{styles}
</style>
<defs>{lines}</defs>
<rect x="-16" y="-4" width="100%" height="100%" rx="8" fill="#1c1e26"/>
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</svg>
"""


def _draw(console: Console, path: Path) -> None:
    lines = console.export_text(clear=False).count("\n")
    svg = console.export_svg(theme=_COLOURS, code_format=_SVG, unique_id="demo")
    svg = svg.replace("VIEW", f"-16 -4 {_PICTURE * 12.2 + 32:.0f} {lines * 24.4 + 28:.0f}")
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


# -- the command --------------------------------------------------------------------


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description="See 'make demo'.")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw the run as an SVG")
    options = parser.parse_args()
    console = Console(highlight=False)
    if options.picture:
        console = Console(highlight=False, record=True, width=_PICTURE, force_terminal=True)
    began = time.monotonic()
    demo = _Demo(console, picture=options.picture is not None)
    failure = ""
    try:
        try:
            demo.run(installed_qemu())
        except (Problem, DaemonDied, GuestDied, AssertionError, OSError) as error:
            failure = str(error) or type(error).__name__
            if not isinstance(error, Problem):
                failure = f"Something is wrong: {failure}"
            failure = "\n  ".join([failure, *demo.logs()])
        processes = demo.close()
    except Problem as error:
        failure = failure or str(error)
    except KeyboardInterrupt:
        demo.close()
        print("\ndemo: interrupted; everything was ended and removed.", file=sys.stderr)
        return 130
    if failure:
        print(f"\ndemo: {failure}", file=sys.stderr)
        return 1
    console.print(
        f"All {processes} processes and their files are gone again; it took "
        f"{time.monotonic() - began:.0f} s."
    )
    if options.picture:
        _draw(console, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
