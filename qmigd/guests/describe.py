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
- the numbering of devices without an id, after a hot-unplug: so it is left out;
- features of the CPU, where the destination's has more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from qmigd.qmp.client import QMPClient, QMPRefusal
from qmigd.waiting import together

__all__ = ["describe", "machine", "parse_ram_blocks"]

_PERIPHERAL = "/machine/peripheral"
_ANONYMOUS = "/machine/peripheral-anon"

# Name, page size, offset, used length, length; newer QEMUs have more columns.
_RAM_BLOCK = re.compile(
    r"\s*(\S.*?)\s+\d+ [KMGT]?i?B\s+0x[0-9a-f]+\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\b"
)

_Json = dict[str, Any]


def _ask(client: QMPClient, command: str, /, **arguments: Any) -> Deferred[Any]:
    """Run a command; fires with ``None`` where QEMU refuses it."""

    def refused(failure: Failure) -> None:
        failure.trap(QMPRefusal)

    return client.execute(command, **arguments).addErrback(refused)


def _get(client: QMPClient, path: str, name: str) -> Deferred[Any]:
    return _ask(client, "qom-get", path=path, property=name)


async def machine(client: QMPClient) -> str:
    """Return the machine type with its version, ``"pc-i440fx-7.2"``."""
    name: str = await client.execute("qom-get", path="/machine", property="type")
    return name.removesuffix("-machine")


async def describe(client: QMPClient) -> _Json:
    """Return the description of the guest that ``client`` is connected to.

    Everything is asked at once; QEMU answers in order.

    :raises GuestError: the QEMU does not answer any more.
    """
    answers = await together(
        [
            _ask(client, "query-version"),
            _get(client, "/machine", "type"),
            _ask(client, "query-uuid"),
            _ask(client, "query-migrate-capabilities"),
            _ask(client, "query-target"),
            _ask(client, "query-memory-size-summary"),
            _ask(client, "human-monitor-command", **{"command-line": "info ramblock"}),
            _ask(client, "query-cpus-fast"),
            _ask(client, "query-block"),
            _ask(client, "query-pci"),
            _ask(client, "qom-list", path=_PERIPHERAL),
            _ask(client, "qom-list", path=_ANONYMOUS),
        ]
    )
    version, kind, uuid, capabilities, target, memory, *rest = answers
    blocks, cpus, drives, pci, named, anonymous = rest
    found: _Json = {}
    if version:
        found["qemu"] = "{major}.{minor}.{micro}".format_map(version["qemu"])
    if kind:
        found["machine"] = kind.removesuffix("-machine")
    if uuid:
        found["uuid"] = uuid["UUID"]
    if capabilities:
        found["capabilities"] = sorted(
            entry["capability"] for entry in capabilities if entry["state"]
        )
    if target:
        found["arch"] = target["arch"]
    if memory:
        found["memory"] = memory["base-memory"] + memory.get("plugged-memory", 0)
    if blocks:
        found["ram-blocks"] = parse_ram_blocks(blocks)
    if cpus:
        found |= await _cpus(client, cpus)
    if named is not None:
        found["devices"] = await _devices(client, named, anonymous or (), pci or ())
    if drives is not None:
        found["drives"] = [_drive(number, drive) for number, drive in enumerate(drives)]
    return found


def parse_ram_blocks(text: str) -> list[_Json]:
    """Return name and full size in bytes of each block in HMP's ``info ramblock``, by name."""
    blocks = []
    for line in text.splitlines():
        if match := _RAM_BLOCK.match(line):
            blocks.append({"name": match[1], "size": int(match[2], 16)})
    return sorted(blocks, key=lambda block: block["name"])


async def _cpus(client: QMPClient, cpus: Sequence[_Json]) -> _Json:
    path = cpus[0]["qom-path"]
    model, words = await together([_get(client, path, "type"), _get(client, path, "feature-words")])
    found: _Json = {"cpus": len(cpus)}
    if model:
        found["cpu-model"] = model
    if words:  # an x86 CPU's
        found["cpu-features"] = {
            _register(word): word["features"] for word in words if word["features"]
        }
    return found


def _register(word: Mapping[str, Any]) -> str:
    """Return the name of a CPUID register: leaf, subleaf where there is one, register."""
    leaf = f"{word['cpuid-input-eax']:#x}"
    if "cpuid-input-ecx" in word:
        leaf += f".{word['cpuid-input-ecx']}"
    return f"{leaf}.{word['cpuid-register'].lower()}"


async def _devices(
    client: QMPClient,
    named: Sequence[_Json],
    anonymous: Sequence[_Json],
    pci: Sequence[_Json],
) -> list[_Json]:
    """Return what was put in by hand, then what else is on the first PCI bus."""
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
    on_first_bus = set()
    for (folder, child), slot, bus in zip(places, answers[::2], answers[1::2], strict=True):
        device: _Json = {"type": child["type"].removeprefix("child<").removesuffix(">")}
        if folder == _PERIPHERAL:
            device["id"] = child["name"]
        if isinstance(slot, int) and bus:  # a PCI device's: its slot and function
            address = _address(slot >> 3, slot & 7)
            if bus.startswith(_PERIPHERAL):
                address = f"{bus.rpartition('/')[2]}/{address}"
            else:
                on_first_bus.add(address)
            device["address"] = address
        devices.append(device)
    for function in pci[0]["devices"] if pci else ():
        address = _address(function["slot"], function["function"])
        if address not in on_first_bus:
            ids = function["id"]
            devices.append(
                {
                    "type": f"{ids['vendor']:04x}:{ids['device']:04x}",
                    "address": address,
                    "built-in": True,
                }
            )
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
