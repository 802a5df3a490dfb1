"""Finds the QEMUs that moves are tried with: 7.2, 10.0 and 11.x.

The system's own QEMU serves for its version.  Any other is fetched from Debian
(see ``debian``) and kept in ``.cache/qemu`` in the repository, about 190 MB for
each version.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from unittest import SkipTest

from tests.rig.debian import CACHE, Unavailable, libraries, loader, tree

__all__ = ["LABELS", "Qemu", "Unavailable", "available", "find", "require"]

_PACKAGE = "qemu-system-x86"
_PROGRAM = "qemu-system-x86_64"


@dataclass(frozen=True)
class Qemu:
    """A QEMU that can be run here.

    :ivar label: what tests call it, one of :data:`LABELS`.
    :ivar version: its full version, ``"10.0.2"``.
    :ivar argv: the beginning of its command line.
    :ivar suites: the suites of Debian's whose libraries it runs with; empty for the
        system's own.
    """

    label: str
    version: str
    argv: tuple[str, ...]
    suites: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Source:
    """Where a version comes from: Debian's suites, the last one preferred."""

    #: What the full version has to begin with.
    prefix: str
    suites: tuple[str, ...]


_SOURCES = {
    "7.2": _Source("7.2.", ("bookworm",)),
    "10.0": _Source("10.0.", ("bookworm", "bookworm-backports")),
    "11": _Source("11.", ("sid",)),
}

#: The QEMUs that tests can ask for.
LABELS = tuple(_SOURCES)


def available() -> dict[str, Qemu]:
    """Return the QEMUs that can be had, by label; fetches what is missing."""
    found = {}
    for label in LABELS:
        try:
            found[label] = find(label)
        except Unavailable:
            continue
    return found


def require(label: str) -> Qemu:
    """Return a QEMU, or skip the test that asks for it, with the reason.

    :raises SkipTest: it cannot be had.  Under ``CI`` 7.2 is no reason to skip,
        since the set-up installs it: there it is a failure.
    """
    try:
        return find(label)
    except Unavailable as error:
        if label == "7.2" and os.environ.get("CI"):
            raise
        raise SkipTest(str(error)) from None


def find(label: str) -> Qemu:
    """Return a QEMU, fetching it on the first use.

    :raises Unavailable: it cannot be had.
    """
    found = _find(label)
    if isinstance(found, str):
        raise Unavailable(found)
    return found


@functools.cache
def _find(label: str) -> Qemu | str:
    """Return the QEMU or the reason why there is none, the same during this process's life."""
    source = _SOURCES[label]
    system = shutil.which(_PROGRAM)
    if system is not None:
        version = _version((system,))
        if version.startswith(source.prefix):
            return Qemu(label, version, (system,))
    try:
        root = tree(CACHE / "qemu" / label, f"QEMU {label}", [_PACKAGE], source.suites)
    except Unavailable as error:
        return f"QEMU {label} is not here: {error}"
    argv = _argv(root)
    version = _version(argv)
    if not version:
        return f"QEMU {label} is not here: the one in {root} does not run."
    if not version.startswith(source.prefix):
        return f"QEMU {label} is not here: {source.suites[-1]} has {version} by now."
    return Qemu(label, version, argv, source.suites)


def _version(argv: tuple[str, ...]) -> str:
    """Return what a QEMU says its version is, or nothing if it does not run."""
    try:
        done = subprocess.run([*argv, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    match = re.search(r"version (\d+\.\d+\.\d+)", done.stdout)
    return match[1] if match else ""


def _argv(root: Path) -> tuple[str, ...]:
    """Return the command line of a QEMU in an unpacked tree: its own loader and libraries."""
    return (
        "/usr/bin/env",
        f"QEMU_MODULE_DIR={libraries(root)[0] / 'qemu'}",
        *loader(root),
        "--argv0",
        _PROGRAM,
        str(root / "usr/bin" / _PROGRAM),
        "-L",
        str(root / "usr/share/qemu"),
        "-L",
        str(root / "usr/share/seabios"),
    )


def _main() -> None:
    """Fetch what is missing, and say what there is."""
    for label in LABELS:
        try:
            print(f"QEMU {find(label).version} is here.", flush=True)
        except Unavailable as error:
            print(error, flush=True)


if __name__ == "__main__":
    _main()
