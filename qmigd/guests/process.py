"""The process of a guest's QEMU, as its QMP socket and /proc show it.

A unix socket tells which process listens on it (SO_PEERCRED): with ``-qmp unix:...``
that is QEMU, also where somebody handed it the socket, since it calls listen() again.
It may still be something in between, a proxy; so it has to have the thread that QEMU
says a virtual CPU is (``thread-id`` in ``query-cpus-fast``).

Nothing here is worth an error: what cannot be read is not known.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmigd.interfaces import Process

__all__ = ["filesystems", "look", "peer", "started"]

#: What SO_PEERCRED tells: pid, uid and gid.
_UCRED = struct.Struct("3i")

# Bits of CapEff (linux/capability.h).
_CAP_DAC_OVERRIDE = 1 << 1
_CAP_IPC_LOCK = 1 << 14
_CAP_SYS_PTRACE = 1 << 19

#: The user namespace in which the kernel's own checks want a capability
#: (PROC_USER_INIT_INO in linux/proc_ns.h).
_INITIAL = "user:[4026531837]"

_SWITCH = Path("/proc/sys/vm/unprivileged_userfaultfd")
_DEVICE = "dev/userfaultfd"
_MEMLOCK = "Max locked memory"


def peer(transport: Any) -> int | None:
    """Return the number of the process that listens on a connection's other end.

    :return: ``None``: it is no unix socket, or the process is not of this PID namespace.
    """
    sock = transport.getHandle()
    if sock.family != socket.AF_UNIX:
        return None
    pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(pid) or None


def started(pid: int) -> int | None:
    """Return when a process was started, in clock ticks since the host's start.

    With its number that tells it from all others, earlier and later.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in parentheses, may have anything in it (proc(5): starttime is field 22).
    return int(text.rpartition(")")[2].split()[19])


def look(pid: int, thread: int) -> Process | None:
    """Return what there is to know of a QEMU's process.

    :param thread: a thread that QEMU says it has.
    :return: ``None``: it cannot be looked at, or is not that QEMU.
    """
    place = Path(f"/proc/{pid}")
    try:
        if not (place / "task" / str(thread)).exists():
            return None
        status = _status(place)
        capabilities = int(status["CapEff"], 16)
        if os.readlink(place / "ns/user") != _INITIAL:
            capabilities = 0
        memlock = None if capabilities & _CAP_IPC_LOCK else _memlock(place)
        return Process(
            pid=pid,
            uid=int(status["Uid"].split()[1]),
            memlock=memlock,
            userfaultfd=bool(capabilities & _CAP_SYS_PTRACE) or _for_everybody(),
            userfaultfd_device=_may_open(place / "root" / _DEVICE, status, capabilities),
        )
    except (OSError, KeyError, ValueError, IndexError):
        return None


def filesystems(pid: int, files: Mapping[str, str]) -> dict[str, str]:
    """Return on what kind of file system each file is, as the process sees it: ``"ext4"``.

    :param files: paths, each under a name of the caller's; the answer has the same names,
        without those of which it cannot be found out.
    """
    place = Path(f"/proc/{pid}")
    found = {}
    try:
        # mount ID, parent ID, major:minor ... - type, source, options (proc(5))
        kinds = {
            fields[2]: fields[fields.index("-") + 1]
            for fields in map(str.split, (place / "mountinfo").read_text().splitlines())
        }
    except (OSError, ValueError):
        return {}
    for name, path in files.items():
        try:
            device = os.stat(f"{place}/root/{path}").st_dev
        except OSError:
            continue
        kind = kinds.get(f"{os.major(device)}:{os.minor(device)}")
        if kind is not None:
            found[name] = kind
    return found


def _status(place: Path) -> Mapping[str, str]:
    lines = (place / "status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _memlock(place: Path) -> int | None:
    """Return the soft limit of locked memory in bytes, or ``None`` for none."""
    for line in (place / "limits").read_text().splitlines():
        if line.startswith(_MEMLOCK):
            soft = line.removeprefix(_MEMLOCK).split()[0]
            return None if soft == "unlimited" else int(soft)
    raise KeyError(_MEMLOCK)


def _for_everybody() -> bool:
    """Whether ordinary users may handle the kernel's faults; before Linux 5.11 there is no switch.

    Linux 5.2 to 5.10 has the same switch with another meaning that comes to the same
    here, and an older kernel lets everybody.
    """
    return not _SWITCH.exists() or _SWITCH.read_text().strip() == "1"


def _may_open(device: Path, status: Mapping[str, str], capabilities: int) -> bool:
    """Whether the process's user and groups may open a device for reading and writing."""
    try:
        found = device.stat()
    except FileNotFoundError:
        return False
    if capabilities & _CAP_DAC_OVERRIDE:
        return True
    groups = {int(word) for word in (*status["Groups"].split(), status["Gid"].split()[1])}
    if found.st_uid == int(status["Uid"].split()[1]):
        need = stat.S_IRUSR | stat.S_IWUSR
    elif found.st_gid in groups:
        need = stat.S_IRGRP | stat.S_IWGRP
    else:
        need = stat.S_IROTH | stat.S_IWOTH
    return found.st_mode & need == need
