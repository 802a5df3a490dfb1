"""Whether two guests fit together, found out before anything is moved.

Both sides describe their guest in the same shape (docs/protocol, GUEST).  What one
side does not say is not compared: a bare peer may send no description at all.
QEMU itself would find most of these differences too, but only at the end, when all
RAM has been copied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import PreflightError

__all__ = ["MUST_MATCH", "check", "differences"]

#: Capabilities that no feature of qmigd stands for, and that QEMU wants to be alike
#: on both sides (shared facts of docs/guests): with one side alone it hangs or fails.
MUST_MATCH = frozenset({"switchover-ack", "x-ignore-shared", "mapped-ram", "x-colo"})

#: The UUID of a guest that was given none.
NO_UUID = "00000000-0000-0000-0000-000000000000"

#: RAM blocks that QEMU resizes to what the stream says (docs: hw/core/loader.c).
RESIZABLE = "/rom@"


def check(source: Mapping[str, Any], destination: Mapping[str, Any]) -> None:
    """See that the guests fit.

    :raises PreflightError: they do not; the text names every difference.
    """
    found = differences(source, destination)
    if found:
        raise PreflightError(
            "the two guests do not fit together, and nothing has been moved: " + "; ".join(found)
        )


def differences(source: Mapping[str, Any], destination: Mapping[str, Any]) -> list[str]:
    """Return one clause for each thing that differs; an empty list if the guests fit."""
    found: list[str] = []
    for key, compare in _COMPARED.items():
        if key in source and key in destination:
            try:
                found.extend(compare(source[key], destination[key]))
            except (TypeError, ValueError, KeyError, AttributeError):
                found.append(f"the source's {key!r} is not in the form that docs/protocol gives")
    return found


def _same(what: str, unit: str = "") -> Callable[[Any, Any], list[str]]:
    def compare(source: Any, destination: Any) -> list[str]:
        if source == destination:
            return []
        return [f"{what} is {source}{unit} at the source and {destination}{unit} here"]

    return compare


def _uuids(source: Any, destination: Any) -> list[str]:
    if NO_UUID in (source, destination):
        return []
    return _same("the UUID")(source, destination)


def _blocks(source: Any, destination: Any) -> list[str]:
    here = {block["name"]: block["size"] for block in destination}
    found = []
    for block in source:
        name, size = block["name"], block["size"]
        if name not in here:
            found.append(f"the source has a RAM block {name!r} that this guest lacks")
        elif here[name] != size and not name.startswith(RESIZABLE):
            found.append(f"RAM block {name!r} has {size} bytes at the source and {here[name]} here")
    return found


def _drives(source: Any, destination: Any) -> list[str]:
    here = {drive["name"]: drive.get("size") for drive in destination if not drive["removable"]}
    return [
        f"drive {drive['name']!r} has {drive['size']} bytes at the source and "
        f"{here[drive['name']]} here"
        for drive in source
        if not drive["removable"]
        and here.get(drive["name"]) is not None
        and drive.get("size") not in (None, here[drive["name"]])
    ]


def _devices(source: Any, destination: Any) -> list[str]:
    def label(device: Mapping[str, Any]) -> tuple[str, str]:
        place = device.get("address") or device.get("id") or ""
        return str(device["type"]), str(place)

    there, here = Counter(map(label, source)), Counter(map(label, destination))
    found = []
    for devices, owner, other in (
        (there - here, "the source has", "this guest"),
        (here - there, "this guest has", "the source"),
    ):
        for kind, place in sorted(devices):
            where = f" at {place}" if place else ""
            found.append(f"{owner} a device {kind}{where} that {other} lacks")
    return found


def _capabilities(source: Any, destination: Any) -> list[str]:
    differing = MUST_MATCH & (set(source) ^ set(destination))
    found = []
    for name in sorted(differing):
        where = "at the source" if name in source else "here"
        found.append(
            f"the migration capability {name} is on {where} only: set it alike on both sides"
        )
    return found


_COMPARED: Mapping[str, Callable[[Any, Any], list[str]]] = {
    "machine": _same("the machine type"),
    "memory": _same("the memory", " bytes"),
    "ram-blocks": _blocks,
    "uuid": _uuids,
    "cpus": _same("the number of CPUs"),
    "cpu-model": _same("the CPU model"),
    "devices": _devices,
    "drives": _drives,
    "capabilities": _capabilities,
}
