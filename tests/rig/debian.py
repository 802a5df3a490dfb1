"""Fetches Debian's packages, with all that they need, and installs nothing.

They come from the Debian archive that the host's apt is configured for, by a
private apt whose lists, cache and package status are its own: since that status
is empty, what comes is complete down to the C library, and a program out of it
runs by its own loader on any Linux host of the same architecture.

A tree is kept in ``.cache`` in the repository; a lock file makes processes that
want the same one wait for it.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CACHE", "Unavailable", "archive", "fetch", "libraries", "loader", "tree"]

#: Where the trees are kept.
CACHE = Path(__file__).resolve().parents[2] / ".cache"

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class Unavailable(Exception):
    """It cannot be had here and now; the text says why."""


def tree(path: Path, what: str, packages: Sequence[str], suites: Sequence[str]) -> Path:
    """Return the directory ``path`` with packages unpacked in it, fetched if it is not there.

    :param what: what people call it.
    :param suites: Debian's suites, the last one preferred.
    :raises Unavailable: they cannot be fetched.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            print(f"Fetching {what} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix=f"{path.name}-", dir=path.parent) as scratch:
                fetch(packages, suites, Path(scratch), archive())
                (Path(scratch) / "root").rename(path)
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def libraries(root: Path) -> list[Path]:
    """Return where an unpacked tree has its libraries."""
    return [root / "usr/lib/x86_64-linux-gnu", root / "lib/x86_64-linux-gnu"]


def loader(root: Path) -> tuple[str, ...]:
    """Return what the command line of a program out of an unpacked tree begins with."""
    folders = libraries(root)
    found = next(
        (path for folder in folders if (path := folder / "ld-linux-x86-64.so.2").exists()),
        folders[0] / "ld-linux-x86-64.so.2",
    )
    return (str(found), "--library-path", ":".join(map(str, folders)))


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


def fetch(packages: Sequence[str], suites: Sequence[str], scratch: Path, uri: str) -> None:
    """Fetch packages with all that they need, and unpack them into ``scratch/root``.

    :param suites: Debian's suites, the last one preferred.
    :param uri: the archive.
    :raises Unavailable: the archive cannot be reached or does not have them.
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
        + ["install", *packages]
    )
    fetched = sorted((scratch / "cache/archives").glob("*.deb"))
    if not fetched:
        raise Unavailable(f"the package source has no {packages[0]} in {suites[-1]}.")
    for package in fetched:
        _run(["dpkg-deb", "-x", str(package), str(scratch / "root")])


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg"))]
        raise Unavailable(
            f"the package source failed: {' '.join(lines) or done.stderr.strip()[-300:]}"
        )
