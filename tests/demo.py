"""``make demo``: a running guest moves to another host and back, as a user would have it.

Two daemons with separate state are two hosts, each with a certificate.  On host A a
QEMU runs the rig's guest, which dirties its RAM and counts on its serial port.
Everything is asked for with the ``qmigctl`` command; what it prints is its own.  Then
the proofs: the plan with its reasons, the RAM page by page, and the count on the serial
port over all three QEMUs.

    python -m tests.demo [--guest qemu|memory] [--picture FILE.svg]

Where there is no QEMU, or with ``--guest memory``, it is qmigd's own guest that moves
(:mod:`tests.demo_memory`).  ``--picture`` draws what the run printed, with one look at
qmigctl's progress bar.
The exit code is 0 only if all of it is as it should be.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme

from tests.demo_memory import MemoryDemo
from tests.rig.bootsector import PAGE, Program
from tests.rig.daemons import DaemonDied
from tests.rig.guest import Guest, GuestDied, Line
from tests.rig.proofs import counted_without_a_gap
from tests.rig.qemus import Qemu
from tests.rig.qmp import Lost
from tests.rig.stage import PICTURE, Demo, Host, Problem, facts

__all__ = ["NoQemu", "QemuDemo", "installed_qemu", "main"]

_PROGRAM = "qemu-system-x86_64"
#: The first QEMU that the guest's machine and qmigd are tried with.
_OLDEST = (7, 2)

_MEMORY = 256  # MiB
_WORK = Program(pages=128 << 8, pages_per_tick=16)  # dirties 128 MiB, 6 MiB/s


class NoQemu(Problem):
    """There is none here."""


def installed_qemu() -> Qemu:
    """Return the host's own QEMU.

    :raises NoQemu: there is none.
    :raises Problem: it is too old, or does not run.
    """
    path = shutil.which(_PROGRAM)
    if path is None:
        raise NoQemu(
            f"There is no {_PROGRAM} here: to see a real QEMU guest move, install it (Debian, "
            f"Ubuntu: 'apt install qemu-system-x86'; Fedora: 'dnf install qemu-system-x86') and "
            f"say 'make demo' again."
        )
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", said.stdout)
    if found is None:
        raise Problem(f"{path} does not run: {said.stderr.strip() or 'it says no version'}.")
    version = ".".join(found.groups())
    if (int(found[1]), int(found[2])) < _OLDEST:
        raise Problem(f"{path} is QEMU {version}; the demo needs 7.2 or newer.")
    return Qemu("system", version, (path,))


class QemuDemo(Demo):
    """The demo with a QEMU."""

    def __init__(self, console: Console, *, picture: bool, qemu: Qemu) -> None:
        super().__init__(console, picture=picture)
        self._qemu = qemu

    def run(self) -> None:
        """Do it all, and check it all.

        :raises Problem: something is not as it should be.
        """
        qemu = self._qemu
        home = self._guest(Guest(qemu, "host A", memory=_MEMORY, machine="pc", program=_WORK))
        away = self._guest(
            Guest(qemu, "host B", memory=_MEMORY, machine="pc", program=_WORK, incoming=True)
        )
        self.hosts()
        # A finds its QEMU by the QMP socket; B starts one when the guest comes.
        here = self.host("host-a", {"qmp": f"unix:{home.qmp_path}"})
        there = self.host("host-b", {"launch": away.launch})
        home.start()
        self.title("A running guest")
        self._introduce(qemu, here, there)

        self.title("There ...")
        first = self.migrate(here, there)
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

        self.title("... and back")
        second = self.migrate(there, here)
        again.wait_ticks(1)
        self._check(away, again)

        self.title("What was negotiated, and why")
        self.show_plan(here, first["plan"], second["plan"])
        again.wait_ticks(20)
        counted_without_a_gap(home, away, again)
        ticks = again.counter + 1
        self.console.print(
            f"\nThe guest counted to {ticks} on three QEMUs, and not one number is missing or came "
            f"twice."
        )

    def _guest(self, guest: Guest) -> Guest:
        self.guests.append(guest)
        return guest

    def _introduce(self, qemu: Qemu, here: Host, there: Host) -> None:
        rate = _WORK.dirty_rate / (1 << 20)
        table = facts(3)
        table.add_row(
            here.name,
            here.daemon.uri,
            f"runs the guest: QEMU {qemu.version}, {_MEMORY} MiB; it writes {rate:.1f} MiB of its "
            f"RAM and counts {_WORK.ticks_per_second} lines on its serial port each second",
        )
        table.add_row(there.name, there.daemon.uri, "has no QEMU yet; its qmigd will start one")
        self.console.print(table)

    def _check(self, left: Guest, now: Guest) -> None:
        """Check the guest's RAM and its count where it runs now, and say so."""
        if not now.running():
            raise Problem(f"The guest does not run on {now.name}: it is {now.status()} there.")
        last, first = left.lines[-1], now.lines[0]
        counted_without_a_gap(left, now)
        window = now.check_ram()
        table = facts(2)
        rounds = f"its {_ordinal(window.generation)} round"
        if window.boundary < _WORK.end:
            rounds += f" up to {window.boundary:#x}, the one before from there on"
        pages = f"{_WORK.pages:,} pages ({_WORK.pages * PAGE >> 20} MiB)"
        table.add_row(
            "  RAM     ", f"[green]right[/]: all {pages} hold what the guest wrote: {rounds}"
        )
        table.add_row("  serial", _handed_on(left, last, now, first))
        self.console.print(table)


def _handed_on(left: Guest, last: Line, now: Guest, first: Line) -> str:
    silence = (first.seen - last.seen) * 1000
    return (
        f"the last line on {left.name} was {last.tick:08x}, the first on {now.name} "
        f"{first.tick:08x}, {silence:.0f} ms later"
    )


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
    svg = svg.replace("VIEW", f"-16 -4 {PICTURE * 12.2 + 32:.0f} {lines * 24.4 + 28:.0f}")
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


# -- the command --------------------------------------------------------------------


def _demo(which: str, console: Console, *, picture: bool) -> Demo:
    """Return the demo that was asked for, or the one that can be had.

    :raises Problem: it cannot be had.
    """
    if which == "memory":
        return MemoryDemo(console, picture=picture)
    try:
        return QemuDemo(console, picture=picture, qemu=installed_qemu())
    except NoQemu as error:
        if which == "qemu":
            raise
        console.print(f"{error} Until then it is qmigd's own guest that moves.")
        return MemoryDemo(console, picture=picture)


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description="See 'make demo'.")
    parser.add_argument(
        "--guest",
        choices=("qemu", "memory"),
        help="what moves: a QEMU, or qmigd's own memory guest; without it, whichever can be had",
    )
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw the run as an SVG")
    options = parser.parse_args()
    console = Console(highlight=False)
    if options.picture:
        console = Console(highlight=False, record=True, width=PICTURE, force_terminal=True)
    began = time.monotonic()
    failure = ""
    demo: Demo | None = None
    processes = 0
    try:
        try:
            demo = _demo(options.guest or "", console, picture=options.picture is not None)
            demo.run()
        except (Problem, DaemonDied, GuestDied, Lost, AssertionError, OSError) as error:
            failure = str(error) or type(error).__name__
            if not isinstance(error, Problem):
                failure = f"Something is wrong: {failure}"
            if demo is not None:
                failure = "\n  ".join([failure, *demo.logs()])
        if demo is not None:
            processes = demo.close()
    except Problem as error:
        failure = failure or str(error)
    except KeyboardInterrupt:
        if demo is not None:
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
