"""Soft RoCE in the lane: an RDMA device made of a network device that goes nowhere.

What is sent to its own address comes back to it, so that both QEMUs of a migration use
the same one.  Loopback's own device and a pair of veth will not do: the connection
manager finds no RDMA device for the address there (ENODEV).

Each QEMU needs the driver that fits its libibverbs, where that looks for it.  The
system's own has the host's (package ibverbs-providers); for the others it is
fetched into ``.cache/rdma``, and put into place inside, where nothing is for good.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from unittest import SkipTest

from tests.rig import qemus
from tests.rig.debian import CACHE, Unavailable, libraries, tree
from tests.rig.qemus import LABELS, Qemu

__all__ = ["ADDRESS", "DEVICE", "down", "require", "soft_roce", "up"]

#: The RDMA device's name.
DEVICE = "rxe0"

#: Its IPv4 address, after :func:`soft_roce`.
ADDRESS = "10.99.0.1"

_NETWORK_DEVICE = "roce"
_MODULES = ("rdma_rxe", "ib_uverbs", "rdma_ucm", "dummy")

#: Where Debian's libibverbs looks for drivers, and for their names.
_DRIVERS = Path("/usr/lib/x86_64-linux-gnu/libibverbs")
_NAMES = Path("/etc/libibverbs.d")
_PACKAGE = "ibverbs-providers"


def require(label: str) -> Qemu:
    """Return a QEMU that can use the device of :func:`soft_roce`, or skip the test.

    :raises SkipTest: see :func:`tests.rig.qemus.require`; or its driver cannot be had.
    """
    qemu = qemus.require(label)
    try:
        _fetch(qemu)
    except Unavailable as error:
        raise SkipTest(str(error)) from None
    return qemu


@functools.cache
def soft_roce() -> str:
    """Make the device, once for the lane's life, and return its address.

    :raises RuntimeError: it cannot be made; the text has the words of who refused.
    """
    _NAMES.mkdir(exist_ok=True)
    (_NAMES / "rxe.driver").write_text("driver rxe\n")
    _DRIVERS.mkdir(exist_ok=True)
    for root in (CACHE / "rdma").glob("*/"):
        for folder in libraries(root):
            for driver in (folder / "libibverbs").glob("librxe-*"):
                if not (_DRIVERS / driver.name).exists():
                    shutil.copy(driver, _DRIVERS)
    _run("modprobe", "-a", *_MODULES)
    _run("ip", "link", "add", _NETWORK_DEVICE, "type", "dummy")
    _run("ip", "address", "add", f"{ADDRESS}/24", "dev", _NETWORK_DEVICE)
    # Room for RoCE's headers around 4096 bytes of data.
    _run("ip", "link", "set", _NETWORK_DEVICE, "mtu", "4200", "up")
    _run("rdma", "link", "add", DEVICE, "type", "rxe", "netdev", _NETWORK_DEVICE)
    return ADDRESS


def down() -> None:
    """Take the device's network down, as if the cable had been drawn."""
    _run("ip", "link", "set", _NETWORK_DEVICE, "down")


def up() -> None:
    """Bring it up again; the device is a new one then, of the same name.

    No QEMU must have the old one any more.
    """
    _run("ip", "link", "set", _NETWORK_DEVICE, "up")
    _run("rdma", "link", "delete", DEVICE)
    _run("rdma", "link", "add", DEVICE, "type", "rxe", "netdev", _NETWORK_DEVICE)


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")


def _fetch(qemu: Qemu) -> None:
    """See to it that a QEMU's driver is here; inside the lane it cannot be fetched any more.

    :raises Unavailable: it is not.
    """
    if qemu.suites:
        root, what = CACHE / "rdma" / qemu.label, f"the RDMA driver for QEMU {qemu.label}"
        try:
            tree(root, what, [_PACKAGE], qemu.suites)
        except (Unavailable, OSError) as error:
            raise Unavailable(f"{what} is not here: {error}") from None


def _main() -> None:
    """Fetch what is missing, and say what cannot be had."""
    for label in LABELS:
        try:
            _fetch(qemus.find(label))
        except Unavailable as error:
            print(error, flush=True)


if __name__ == "__main__":
    _main()
