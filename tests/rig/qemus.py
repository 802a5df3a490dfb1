"""Finds the QEMUs that moves are tried with: 7.2, 10.0 and 11.x.

The system's own QEMU serves for its version.  Any other is fetched from the
Debian archive that the host's apt is configured for, by a private apt whose
lists, cache and package status are its own: since that status is empty, the
closure includes the C library, and the unpacked tree runs by its own loader on
any Linux host of the same architecture.  Nothing is installed on the host.

A tree is kept in ``.cache/qemu`` in the repository, about 190 MB for each
version; a lock file makes processes that want the same one wait for it.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import SkipTest

__all__ = ["LABELS", "Qemu", "Unavailable", "available", "find", "require"]

#: Where the trees are kept.
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "qemu"

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_PACKAGE = "qemu-system-x86"
_PROGRAM = "qemu-system-x86_64"


@dataclass(frozen=True)
class Qemu:
    """A QEMU that can be run here.

    :ivar label: what tests call it, one of :data:`LABELS`.
    :ivar version: its full version, ``"10.0.2"``.
    :ivar argv: the beginning of its command line.
    """

    label: str
    version: str
    argv: tuple[str, ...]


class Unavailable(Exception):
    """This QEMU cannot be had here and now; the text says why."""


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
        tree = _tree(label, source)
    except Unavailable as error:
        return f"QEMU {label} is not here: {error}"
    argv = _argv(tree)
    version = _version(argv)
    if not version:
        return f"QEMU {label} is not here: the one in {tree} does not run."
    if not version.startswith(source.prefix):
        return f"QEMU {label} is not here: {source.suites[-1]} has {version} by now."
    return Qemu(label, version, argv)


def _version(argv: tuple[str, ...]) -> str:
    """Return what a QEMU says its version is, or nothing if it does not run."""
    try:
        done = subprocess.run([*argv, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    match = re.search(r"version (\d+\.\d+\.\d+)", done.stdout)
    return match[1] if match else ""


def _argv(tree: Path) -> tuple[str, ...]:
    """Return the command line of a QEMU in an unpacked tree: its own loader and libraries."""
    libraries = [tree / "usr/lib/x86_64-linux-gnu", tree / "lib/x86_64-linux-gnu"]
    loader = next(
        (path for folder in libraries if (path := folder / "ld-linux-x86-64.so.2").exists()),
        libraries[0] / "ld-linux-x86-64.so.2",
    )
    return (
        "/usr/bin/env",
        f"QEMU_MODULE_DIR={libraries[0] / 'qemu'}",
        str(loader),
        "--library-path",
        ":".join(map(str, libraries)),
        "--argv0",
        _PROGRAM,
        str(tree / "usr/bin" / _PROGRAM),
        "-L",
        str(tree / "usr/share/qemu"),
        "-L",
        str(tree / "usr/share/seabios"),
    )


def _tree(label: str, source: _Source) -> Path:
    """Return the unpacked tree of a version, fetching it if it is not in the cache."""
    tree = CACHE / label
    if tree.exists():
        return tree
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"{label}.lock"):
        if not tree.exists():
            print(f"Fetching QEMU {label} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix=f"{label}-", dir=CACHE) as scratch:
                fetch(source.suites, Path(scratch), archive())
                (Path(scratch) / "root").rename(tree)
    return tree


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def archive() -> str:
    """Return the URI of the Debian archive that this host's apt is configured for.

    :raises Unavailable: there is none, or the means to use it are missing.
    """
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise Unavailable(f"this host has no {program} to fetch it with.")
    if not _KEYRING.exists():
        raise Unavailable(f"this host lacks {_KEYRING} (package debian-archive-keyring).")
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=False,
    )
    for uri in listed.stdout.split():
        if uri.rstrip("/").endswith("/debian"):
            return uri
    raise Unavailable("no source of this host's apt is a Debian archive.")


def fetch(suites: tuple[str, ...], scratch: Path, uri: str) -> None:
    """Fetch QEMU with all that it needs, and unpack it into ``scratch/root``.

    :param suites: Debian's suites, the last one preferred.
    :param uri: the archive.
    :raises Unavailable: the archive cannot be reached or does not have it.
    """
    for folder in ("root", "state", "lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    (scratch / "status").touch()
    (scratch / "sources.list").write_text(
        "".join(f"deb [arch=amd64 signed-by={_KEYRING}] {uri} {suite} main\n" for suite in suites)
    )
    options = {
        "APT::Architecture": "amd64",
        "APT::Sandbox::User": "",
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
        "Acquire::Retries": "2",
        "Acquire::http::Timeout": "20",
        "Dir::Cache": scratch / "cache",
        "Dir::Etc::Parts": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::Etc::SourceList": scratch / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": scratch / "state",
        "Dir::State::Lists": scratch / "lists",
        "Dir::State::Status": scratch / "status",
    }
    apt = ["apt-get", "-qq", "-y"]
    for name, value in options.items():
        apt += ["-o", f"{name}={value}"]
    _run([*apt, "update"])
    _run(
        [*apt, "--no-install-recommends", "--download-only", "-t", suites[-1]]
        + ["install", _PACKAGE]
    )
    packages = sorted((scratch / "cache/archives").glob("*.deb"))
    if not packages:
        raise Unavailable(f"the package source has no {_PACKAGE} in {suites[-1]}.")
    for package in packages:
        _run(["dpkg-deb", "-x", str(package), str(scratch / "root")])


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg"))]
        raise Unavailable(
            f"the package source failed: {' '.join(lines) or done.stderr.strip()[-300:]}"
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
