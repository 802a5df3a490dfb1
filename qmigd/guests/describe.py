"""What a preflight compares: a guest as its QEMU shows it, in JSON.

Only what a person put on the command line, or what the guest would miss: RAM
blocks, CPUs, devices with their place on a PCI bus, drives.  QEMU's internal
devices are left out, since they differ between versions that migrate well.
Whatever a QEMU cannot tell, its key is absent; a peer compares what both have.

What differs without harm between two sides that fit:

- bus numbers behind bridges, which the firmware gives (a QEMU that waits has none):
  so a device there is known by its bus's name;
- the used size of a RAM block that can grow (``/rom@etc/acpi/tables``): so its
  full size is what counts;
- RAM blocks without a name, which are not migrated: so they are left out;
- RAM that was plugged in, which virtio-mem's driver plugs in by and by: so the blocks
  that it can be in are what counts;
- the numbering of devices without an id, after a hot-unplug: so it is left out;
- features of the CPU, where the destination's has more: so its model is what counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from qmigd.interfaces import RamBlock
from qmigd.qmp.client import QMPClient, QMPRefusal
from qmigd.waiting import together

__all__ = ["Description", "Lasting", "describe", "parse_ram_blocks"]

_PERIPHERAL = "/machine/peripheral"
_ANONYMOUS = "/machine/peripheral-anon"
#: Where the first CPU nearly always is; asked for before it is known.
_FIRST_CPU = "/machine/unattached/device[0]"

# Name, page size, offset, used length, length; newer QEMUs have more columns.
_RAM_BLOCK = re.compile(
    r"\s*(\S.*?)\s+(\d+) ([KMGT]?)i?B\s+0x[0-9a-f]+\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\b"
)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
#: Where QEMU has the objects of its command line; a RAM block may bear such a path as its name.
_OBJECTS = "/objects"
#: What can be added to a guest and taken away is in these.
_OWNED = (_PERIPHERAL, _ANONYMOUS, _OBJECTS)
#: Those objects that are RAM in a file.
_IN_FILE = "child<memory-backend-file>"

_Json = dict[str, Any]


def _ask(client: QMPClient, command: str, /, **arguments: Any) -> Deferred[Any]:
    """Run a command; fires with ``None`` where QEMU refuses it."""

    def refused(failure: Failure) -> None:
        failure.trap(QMPRefusal)

    return client.execute(command, **arguments).addErrback(refused)


def _get(client: QMPClient, path: str, name: str) -> Deferred[Any]:
    return _ask(client, "qom-get", path=path, property=name)


@dataclass(frozen=True)
class Lasting:
    """What of a guest stays as it is for as long as its QEMU has the same devices and objects.

    :ivar owns: those: what is in QEMU's folders of them, by their paths.
    :ivar body: what of it a preflight compares, JSON.
    :ivar ram: the blocks of its RAM.
    :ivar files: the file that a block of RAM is in, or the directory of that file, by the
        block's name.
    :ivar thread: the thread of its first CPU, as its QEMU's PID namespace numbers it.
    :ivar built_in: the functions on its first PCI bus that came with the machine.
    """

    owns: Mapping[str, Sequence[_Json] | None]
    body: _Json
    ram: tuple[RamBlock, ...]
    files: Mapping[str, str]
    thread: int | None
    built_in: Sequence[_Json]


@dataclass(frozen=True)
class Description:
    """What there is to know of a guest.

    :ivar body: what a preflight compares, JSON.
    :ivar capabilities: all migration capabilities of its QEMU.
    :ivar blockers: why its QEMU does not let it be moved.
    :ivar migration: the status of its QEMU's migration, ``none`` if there was none.
    :ivar lasting: what the next look at it need not ask for again.
    """

    body: _Json
    capabilities: Mapping[str, bool]
    blockers: tuple[str, ...]
    migration: str
    lasting: Lasting


async def describe(client: QMPClient, known: Lasting | None = None) -> Description:
    """Ask a QEMU for the description of its guest.

    Everything is asked at once; QEMU answers in order.  Each question costs it 0.1 to
    0.3 ms, so none is asked twice.

    :param known: what an earlier look at this very process has found.
    :raises GuestError: the QEMU does not answer any more.
    """
    answers = await together(
        [
            _ask(client, "query-migrate-capabilities"),
            _ask(client, "query-migrate"),
            _ask(client, "query-block"),
            *(_ask(client, "qom-list", path=path) for path in _OWNED),
            *(_ask_for_lasting(client) if known is None else ()),
        ]
    )
    switches, progress, drives = answers[:3]
    owns = dict(zip(_OWNED, answers[3:], strict=False))
    named, anonymous = owns[_PERIPHERAL], owns[_ANONYMOUS]
    devices = await _devices(client, named or (), anonymous or ())
    lasting = known
    if lasting is None or lasting.owns != owns:
        fresh = answers[3 + len(_OWNED) :] or await together(_ask_for_lasting(client))
        lasting = await _lasting(client, owns, devices, fresh)
    capabilities = {entry["capability"]: entry["state"] for entry in switches or ()}
    version = client.greeting["version"]["qemu"]
    found: _Json = {"qemu": "{major}.{minor}.{micro}".format_map(version), **lasting.body}
    if capabilities:
        found["capabilities"] = sorted(name for name, on in capabilities.items() if on)
    if named is not None:
        found["devices"] = _sorted([*devices, *lasting.built_in])
    if drives is not None:
        found["drives"] = [_drive(number, drive) for number, drive in enumerate(drives)]
    progress = progress or {}
    # QEMU 7.2 that listens for its stream already says where, and has no word for that.
    migration = progress.get("status", "setup" if "socket-address" in progress else "none")
    blockers = tuple(progress.get("blocked-reasons", ()))
    return Description(found, capabilities, blockers, migration, lasting)


def _ask_for_lasting(client: QMPClient) -> list[Deferred[Any]]:
    return [
        _get(client, "/machine", "type"),
        _ask(client, "query-uuid"),
        _ask(client, "query-memory-size-summary"),
        _ask(client, "human-monitor-command", **{"command-line": "info ramblock"}),
        _ask(client, "query-memdev"),
        _ask(client, "query-cpus-fast"),
        _get(client, _FIRST_CPU, "type"),
        _ask(client, "query-pci"),
    ]


async def _lasting(
    client: QMPClient,
    owns: Mapping[str, Sequence[_Json] | None],
    devices: Sequence[_Json],
    answers: Sequence[Any],
) -> Lasting:
    """Put together what :func:`_ask_for_lasting` has asked for.

    :param devices: those that were put in by hand.
    """
    kind, uuid, memory, blocks, backends, cpus, cpu, pci = answers
    ram = parse_ram_blocks(blocks or "", backends or ())
    files = Deferred.fromCoroutine(_files(client, owns[_OBJECTS] or ()))
    found: _Json = {}
    if kind:
        found["machine"] = kind.removesuffix("-machine")
    if uuid:
        found["uuid"] = uuid["UUID"]
    if memory:
        found["memory"] = memory["base-memory"]
    if blocks:
        found["ram-blocks"] = [{"name": block.name, "size": block.size} for block in ram]
    if cpus:
        found |= await _cpus(client, cpus, cpu)
    in_files = await files
    files_of = {
        block.name: file
        for block in ram
        if (file := in_files.get(block.name.removeprefix(f"{_OBJECTS}/"))) is not None
    }
    thread = cpus[0].get("thread-id") if cpus else None
    return Lasting(owns, found, ram, files_of, thread, _built_in(pci or (), devices))


async def _files(client: QMPClient, objects: Sequence[_Json]) -> dict[str, str]:
    """Return the paths of the memory backends that are in a file, by their ids."""
    names = [child["name"] for child in objects if child["type"] == _IN_FILE]
    paths = await together([_get(client, f"{_OBJECTS}/{name}", "mem-path") for name in names])
    return {name: path for name, path in zip(names, paths, strict=True) if path}


def parse_ram_blocks(text: str, backends: Sequence[_Json] = ()) -> tuple[RamBlock, ...]:
    """Return the named blocks in HMP's ``info ramblock``, by name, with their full sizes.

    :param backends: QEMU's memory backends (``query-memdev``), which know what is shared.
    """
    shared = {backend["id"]: backend.get("share") for backend in backends if "id" in backend}
    blocks = []
    for line in text.splitlines():
        if match := _RAM_BLOCK.match(line):
            name, pages, unit, size = match.groups()
            blocks.append(
                RamBlock(
                    name,
                    int(size, 16),
                    int(pages) * _UNITS[unit],
                    shared.get(name.removeprefix(f"{_OBJECTS}/")),
                )
            )
    return tuple(sorted(blocks, key=lambda block: block.name))


async def _cpus(client: QMPClient, cpus: Sequence[_Json], model: str | None) -> _Json:
    path = cpus[0]["qom-path"]
    if path != _FIRST_CPU:  # hot-plugged, or on another machine than most
        model = await _get(client, path, "type")
    found: _Json = {"cpus": len(cpus)}
    if model:
        found["cpu-model"] = model
    return found


async def _devices(
    client: QMPClient, named: Sequence[_Json], anonymous: Sequence[_Json]
) -> list[_Json]:
    """Return what was put in by hand; on a bus behind a bridge, that is in the address."""
    places = [
        (folder, child)
        for folder, children in ((_PERIPHERAL, named), (_ANONYMOUS, anonymous))
        for child in children
        if child["type"].startswith("child<")
    ]
    asked: list[Deferred[Any]] = []
    for folder, child in places:
        path = f"{folder}/{child['name']}"
        asked += [_get(client, path, "addr"), _get(client, path, "parent_bus")]
    answers = await together(asked)
    devices = []
    for (folder, child), slot, bus in zip(places, answers[::2], answers[1::2], strict=True):
        device: _Json = {"type": child["type"].removeprefix("child<").removesuffix(">")}
        if folder == _PERIPHERAL:
            device["id"] = child["name"]
        if isinstance(slot, int) and bus:  # a PCI device's: its slot and function
            address = _address(slot >> 3, slot & 7)
            if bus.startswith(_PERIPHERAL):
                address = f"{bus.rpartition('/')[2]}/{address}"
            device["address"] = address
        devices.append(device)
    return devices


def _built_in(pci: Sequence[_Json], devices: Sequence[_Json]) -> list[_Json]:
    """Return what else is on the first PCI bus, as ``query-pci`` says."""
    by_hand = {device.get("address") for device in devices}
    return [
        {
            "type": f"{function['id']['vendor']:04x}:{function['id']['device']:04x}",
            "address": address,
            "built-in": True,
        }
        for function in (pci[0]["devices"] if pci else ())
        if (address := _address(function["slot"], function["function"])) not in by_hand
    ]


def _sorted(devices: list[_Json]) -> list[_Json]:
    return sorted(
        devices,
        key=lambda device: (device["type"], device.get("id", ""), device.get("address", "")),
    )


def _address(slot: int, function: int) -> str:
    return f"{slot:02x}.{function:x}"


def _drive(number: int, drive: Mapping[str, Any]) -> _Json:
    inserted = drive.get("inserted")
    path = drive.get("qdev", "")
    name = drive.get("device") or ""
    if not name and path.startswith(f"{_PERIPHERAL}/"):
        name = path.split("/")[3]
    found: _Json = {"name": name or f"drive {number}", "removable": drive["removable"]}
    if inserted:
        found["size"] = inserted["image"]["virtual-size"]
        found["read-only"] = inserted["ro"]
    return found
