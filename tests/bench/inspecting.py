"""How fast ``qmigctl inspect`` reads a stream, and how much memory it takes for that.

The stream has only pages that were sent as they are, and it is in the page cache.  Each page is
looked at for whether it is all zeros, which takes longest where it is.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from qmigd.stream import writer
from qmigd.stream.format import RamBlock, RamFlag, SectionType
from qmigd.stream.records import RamWriter
from tests.bench.table import Row, single

__all__ = ["PART", "ROUNDS", "measure"]

PART = "inspect"
ROUNDS = 5

#: What one run reads, in GiB.
_AMOUNT = 2

_PAGE = 4096
_AT_ONCE = 4096

#: Runs qmigctl, and says how much memory it has had at most.
_SCRIPT = """
import atexit, sys
atexit.register(lambda: sys.stderr.write(open("/proc/self/status").read()))
from qmigd.cli.main import main
main()
"""


def measure(rounds: int, tell: Callable[[str], None]) -> list[Row]:
    """Measure; ``tell`` hears of each round."""
    rows = []
    with TemporaryDirectory(prefix="qmigd-bench-") as directory:
        path = Path(directory) / "stream"
        for what, zeros in (("random pages", False), ("zero pages", True)):
            _write(path, zeros)
            size = path.stat().st_size / 2**30
            speeds, peaks = [], []
            for number in range(rounds):
                seconds, peak = _inspect(path)
                speeds.append(size / seconds)
                peaks.append(peak)
                tell(f"{what}, {number + 1} of {rounds}: {speeds[-1]:.2f} GiB/s")
            rows += [
                single(
                    *(PART, f"{_AMOUNT} GiB of {what}", "GiB/s", speeds),
                    target="at least 1",
                    judge=lambda median, _: median >= 1,
                ),
                single(
                    *(PART, f"memory, {what}", "MiB", peaks),
                    target="less than 64",
                    judge=lambda median, _: median < 64,
                ),
            ]
    return rows


def _inspect(path: Path) -> tuple[float, float]:
    """Return the seconds that it took, its start included, and its memory in MiB."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, "inspect", "--json", str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.monotonic() - begun
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    assert peak is not None
    return seconds, int(peak[1]) / 1024


def _write(path: Path, zeros: bool) -> None:
    """Write a stream of normal pages."""
    pages = _AMOUNT * 2**30 // _PAGE
    eos = struct.pack(">Q", RamFlag.EOS) + writer.section_end(2)
    ram = RamWriter(_PAGE)
    rows = np.zeros((_AT_ONCE, _PAGE), np.uint8)
    if not zeros:
        rows = np.random.default_rng(1).integers(0, 256, rows.shape, np.uint8)
    with open(path, "wb") as file:
        file.write(writer.header() + writer.configuration("pc"))
        file.write(writer.section_start(SectionType.START, 2, "ram", 0, 4))
        file.write(writer.ram_setup([RamBlock("pc.ram", pages * _PAGE)]) + eos)
        file.write(writer.section_start(SectionType.END, 2))
        for first in range(0, pages, _AT_ONCE):
            offsets = np.arange(first, first + _AT_ONCE) * _PAGE
            for part in ram.pages("pc.ram", offsets, rows):
                file.write(part)
        file.write(eos + writer.end())
