"""Finds the kernel of the lane (see ``lane``): a stock one of Debian's, fetched and unpacked.

Which suite it comes from is said by the environment's ``KERNEL``:
``bookworm`` if nothing is said; ``bookworm-backports`` and the like for a newer one.

The same tree has what the lane needs around it: a static busybox for the first
program that runs, and kmod with its libraries, which loads modules inside and
here makes the table of which module needs which others.  A tree is kept in
``.cache/kernel``, 200 to 470 MB.
"""

from __future__ import annotations

import functools
import lzma
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import SkipTest

from tests.rig.debian import CACHE, Unavailable, loader, tree

__all__ = ["Kernel", "find", "require"]

_SUITE = "bookworm"
_PACKAGES = ("linux-image-amd64", "busybox-static", "kmod")


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be booted.

    :ivar version: as ``uname -r`` says it.
    :ivar image: what a bootloader loads.
    :ivar modules: the directory of its modules.
    :ivar busybox: the static busybox.
    :ivar kmod: the command line of kmod's program, up to its name: that is put
        behind it, and then the arguments.
    """

    version: str
    image: Path
    modules: Path
    busybox: Path
    kmod: Path

    def command(self, name: str) -> tuple[str, ...]:
        """Return the command line of one of kmod's programs, such as ``modprobe``."""
        root = self._root
        return (*loader(root), "--argv0", name, str(self.kmod))

    @property
    def _root(self) -> Path:
        return next(path for path in self.kmod.parents if path.parent == CACHE / "kernel")

    def module_files(self, *names: str) -> Iterator[tuple[str, bytes]]:
        """Return names and contents of modules, in the order in which they are to be loaded.

        What is built into the kernel is left out.

        :raises Unavailable: the kernel has no such module.
        """
        files = {_module_name(path): path for path in self._needs}
        builtin = {
            _module_name(path) for path in (self.modules / "modules.builtin").read_text().split()
        }
        done: set[str] = set()
        for wanted in names:
            if wanted in builtin:
                continue
            if wanted not in files:
                raise Unavailable(f"the kernel {self.version} has no module {wanted}.")
            path = files[wanted]
            # modules.dep names what is needed last first.
            for one in (*reversed(self._needs[path]), path):
                if one not in done:
                    done.add(one)
                    yield _module_name(one), self._content(one)

    @functools.cached_property
    def _needs(self) -> dict[str, list[str]]:
        """Which other modules each one needs, by their paths."""
        lines = (self.modules / "modules.dep").read_text().splitlines()
        return {path: needs.split() for path, _, needs in (line.partition(":") for line in lines)}

    def _content(self, path: str) -> bytes:
        content = (self.modules / path).read_bytes()
        return lzma.decompress(content) if path.endswith(".xz") else content


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def require() -> Kernel:
    """Return the lane's kernel, or skip the test that asks for it, with the reason.

    :raises SkipTest: it cannot be had.  Under ``CI`` that is a failure.
    """
    try:
        return find()
    except Unavailable as error:
        if os.environ.get("CI"):
            raise
        raise SkipTest(str(error)) from None


@functools.cache
def find() -> Kernel:
    """Return the lane's kernel, fetching it on the first use.

    :raises Unavailable: it cannot be had.
    """
    suite = os.environ.get("KERNEL") or _SUITE
    # What backports does not have comes from the suite that it is for.
    suites = dict.fromkeys((suite.removesuffix("-backports"), suite))
    try:
        root = tree(CACHE / "kernel" / suite, f"a kernel ({suite})", _PACKAGES, tuple(suites))
    except Unavailable as error:
        raise Unavailable(f"The kernel is not here: {error}") from None
    return _look(root)


def _look(root: Path) -> Kernel:
    """Find everything in an unpacked tree, wherever Debian has it in this suite."""
    [modules] = [*root.glob("lib/modules/*"), *root.glob("usr/lib/modules/*")]
    [image] = [*root.glob("boot/vmlinuz-*"), *modules.glob("vmlinuz")]
    [busybox] = [*root.glob("bin/busybox"), *root.glob("usr/bin/busybox")]
    [kmod] = [*root.glob("bin/kmod"), *root.glob("usr/bin/kmod")]
    kernel = Kernel(modules.name, image, modules, busybox, kmod)
    if not (modules / "modules.dep").exists():
        base = modules.parents[2]
        done = subprocess.run(
            [*kernel.command("depmod"), "-b", str(base), modules.name],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Unavailable(f"depmod: {done.stderr.strip()[-300:]}")
    return kernel


def _main() -> None:
    """Fetch it if it is missing, and say what there is."""
    try:
        print(f"Linux {find().version} is here.", flush=True)
    except Unavailable as error:
        print(error, flush=True)


if __name__ == "__main__":
    _main()
