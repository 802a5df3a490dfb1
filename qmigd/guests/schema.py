"""What a QEMU says about its own migration parameters, and values for them.

``query-qmp-schema`` is read once per QEMU: 200 kB, 15 ms of QEMU's time.  It
names parameters, but not the types that users gave names to, and all integers
are alike in it: so an enum's type is ``"enum"`` here, and a size with a suffix
is taken for every integer.  What range a parameter has is for QEMU to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any
from weakref import WeakKeyDictionary

from qmigd.backend import Tunable
from qmigd.errors import ArgumentError
from qmigd.qmp.client import QMPClient

__all__ = ["NULLABLE", "Schema", "coerce", "find", "of", "read"]

#: The type of a parameter that takes a string, or null to unset it.
NULLABLE = "str-or-null"

_SUFFIXES = {letter: 1 << (10 * (power + 1)) for power, letter in enumerate("kmgtpe")}
_SIZE = re.compile(r"(\d+)(?:\.(\d+))?\s*([kmgtpe])(?:i?b)?", re.IGNORECASE)
_BOOLS = {"on": True, "true": True, "off": False, "false": False}

Entity = Mapping[str, Any]


@dataclass(frozen=True)
class Schema:
    """What qmigd needs to know out of a QEMU's schema.

    :ivar parameters: what ``migrate-set-parameters`` takes, without present values.
    """

    parameters: tuple[Tunable, ...]

    def tunables(self, values: Mapping[str, Any]) -> list[Tunable]:
        """Return the parameters with their present values.

        :param values: what ``query-migrate-parameters`` returned.
        """
        return [
            Tunable(
                name=known.name,
                type=known.type,
                values=known.values,
                value=values.get(known.name),
                deprecated=known.deprecated,
                unstable=known.unstable,
            )
            for known in self.parameters
        ]

    def nullable(self, name: str) -> bool:
        """Return whether a parameter can be unset by giving it null."""
        return any(known.name == name and known.type == NULLABLE for known in self.parameters)


def read(entities: Sequence[Entity]) -> Schema:
    """Make a :class:`Schema` of what ``query-qmp-schema`` returned."""
    by_name = {entity["name"]: entity for entity in entities}
    command = by_name["migrate-set-parameters"]
    members = by_name[command["arg-type"]].get("members", ())
    return Schema(tuple(_parameter(member, by_name) for member in members))


def _parameter(member: Entity, by_name: Mapping[str, Entity]) -> Tunable:
    features = member.get("features", ())
    of_type = by_name[member["type"]]
    values: tuple[str, ...] = ()
    match of_type["meta-type"]:
        case "builtin":
            kind = member["type"]
        case "enum":
            kind = "enum"
            # "values" is the older form, and deprecated where there is "members".
            listed = of_type.get("members")
            values = tuple(value["name"] for value in listed) if listed else of_type["values"]
        case "alternate" if {alternative["type"] for alternative in of_type["members"]} == {
            "str",
            "null",
        }:
            kind = NULLABLE
        case other:
            kind = other
    return Tunable(
        name=member["name"],
        type=kind,
        values=tuple(values),
        deprecated="deprecated" in features,
        unstable="unstable" in features,
    )


_by_client: WeakKeyDictionary[QMPClient, Schema] = WeakKeyDictionary()
_by_build: dict[str, Schema] = {}


async def of(client: QMPClient) -> Schema:
    """Return the schema of the QEMU that ``client`` is connected to.

    It is asked for once per connection, and once in the process for every
    build: version and package of a QEMU that says what package it is.

    :raises GuestError: the QEMU did not answer.
    """
    if (known := _by_client.get(client)) is not None:
        return known
    version = client.greeting.get("version", {})
    package = version.get("package", "")
    build = json.dumps(version, sort_keys=True)
    schema = _by_build.get(build)
    if schema is None:
        schema = read(await client.execute("query-qmp-schema"))
        if package:
            _by_build[build] = schema
    _by_client[client] = schema
    return schema


def find(tunables: Iterable[Tunable], name: str) -> Tunable:
    """Return the one of that name.

    :raises ArgumentError: there is none; the text has the nearest names.
    """
    by_name = {tunable.name: tunable for tunable in tunables}
    if name in by_name:
        return by_name[name]
    near = get_close_matches(name.replace("_", "-"), by_name, n=3)
    hint = "'query-tunables' lists those that there are"
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    raise ArgumentError(f"this guest has no migration parameter '{name}'; {hint}")


def coerce(tunable: Tunable, value: Any) -> Any:
    """Return ``value`` as QEMU takes it.

    :param value: JSON, or a string as a person writes it: ``"on"``, ``"4"``,
        ``"512M"`` (K, M, G, T, P, E are powers of 1024).
    :raises ArgumentError: it does not fit; the text says what would.
    """
    match tunable.type:
        case "int":
            return _integer(tunable, value)
        case "number":
            return _number(tunable, value)
        case "bool":
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value.lower() in _BOOLS:
                return _BOOLS[value.lower()]
            raise _misfit(tunable, value, "on or off")
        case "enum":
            if value in tunable.values:
                return value
            near = get_close_matches(str(value), tunable.values, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise _misfit(tunable, value, f"one of {', '.join(tunable.values)}{hint}")
        case "str":
            if isinstance(value, str):
                return value
            raise _misfit(tunable, value, "a string")
        case type_ if type_ == NULLABLE:
            if value is None or isinstance(value, str):
                return value
            raise _misfit(tunable, value, "a string or null")
        case "array":
            return _json(tunable, value, list, "a JSON array")
        case "object":
            return _json(tunable, value, dict, "a JSON object")
        case _:
            return value  # a type that no QEMU has here yet: QEMU will judge


def _misfit(tunable: Tunable, value: Any, wanted: str) -> ArgumentError:
    shown = f"'{value}'" if isinstance(value, str) else json.dumps(value, default=repr)
    return ArgumentError(f"{tunable.name} cannot be {shown}: it has to be {wanted}")


def _integer(tunable: Tunable, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = value.strip()
        if re.fullmatch(r"-?\d{1,20}|0[xX][0-9a-fA-F]{1,16}", text):
            return int(text, 16 if text[:2].lower() == "0x" else 10)
        if (match := _SIZE.fullmatch(text)) and len(text) < 30:
            whole, fraction, suffix = match.groups()
            unit = _SUFFIXES[suffix.lower()]
            part = int(fraction) * unit // 10 ** len(fraction) if fraction else 0
            return int(whole) * unit + part
    raise _misfit(tunable, value, "a whole number, or one with K, M, G or T behind it")


def _number(tunable: Tunable, value: Any) -> int | float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    raise _misfit(tunable, value, "a number")


def _json(tunable: Tunable, value: Any, kind: type, wanted: str) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise _misfit(tunable, value, wanted) from None
    if isinstance(value, kind):
        return value
    raise _misfit(tunable, value, wanted)
