"""Guests whose processes may do less than root, with limits of their own; root starts them."""

from __future__ import annotations

import dataclasses
import os
import shutil
from unittest import SkipTest

from tests.rig.guest import Guest
from tests.rig.qemus import Qemu

__all__ = ["NOBODY", "by", "for_everybody", "locking", "ordinary"]

#: setpriv's options for sets of capabilities that are handed on.
_CAPABILITIES = ("inh-caps", "bounding-set")

#: The user ``nobody``, who has no other processes.
NOBODY = 65534


def ordinary(qemu: Qemu, *, memlock: int | None = None, before: tuple[str, ...] = ()) -> Qemu:
    """Return a QEMU that runs as an ordinary user.

    The user may read what root may, so that it does not matter where the tests are, and
    nothing else that is special.

    :param memlock: bytes that it may lock in memory; the limit stays as it is without.
    :param before: what is run as root before that user is taken on, a prefix.
    :raises SkipTest: the tests are not run as root.
    """
    _require_root()
    prefix = list(before)
    if memlock is not None:
        prefix += _limit(memlock)
    prefix += ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    prefix += [f"--{kind}=-all,+dac_read_search" for kind in ("inh-caps", "ambient-caps")]
    prefix += ["--bounding-set=-all,+dac_read_search"]
    return by(qemu, *prefix)


def locking(memlock: int) -> tuple[str, ...]:
    """Return what starts a process of root's for which the limit of locked memory counts.

    :param memlock: bytes.
    :raises SkipTest: the tests are not run as root.
    """
    _require_root()
    return (*_limit(memlock), "setpriv", *(f"--{kind}=-ipc_lock" for kind in _CAPABILITIES))


def _require_root() -> None:
    if os.getuid() or not shutil.which("setpriv") or not shutil.which("prlimit"):
        raise SkipTest("only root can start what may do less, with setpriv and prlimit")


def _limit(memlock: int) -> tuple[str, ...]:
    return "prlimit", f"--memlock={memlock}:{memlock}"


def by(qemu: Qemu, *prefix: str) -> Qemu:
    """Return a QEMU that another program starts."""
    return dataclasses.replace(qemu, argv=(*prefix, *qemu.argv))


def for_everybody(guest: Guest) -> Guest:
    """Let every user in at what a guest's QEMU has to reach; to be called before its start."""
    os.chmod(guest.directory, 0o777)
    for name in os.listdir(guest.directory):
        os.chmod(os.path.join(guest.directory, name), 0o666)
    return guest
