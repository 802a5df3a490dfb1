"""The declarations in the format of QEMU's ``query-qmp-schema``.

The format is ``SchemaInfo`` of QEMU's qapi/introspect.json: a flat list of
entities that refer to each other by name.  QEMU puts numbers in place of its
own types' names, so that nobody relies on them; here they keep their names,
which the format allows.  Two things that QAPI has no word for are said with
what it has: an object with members of any name is a builtin whose JSON type is
``object``, and members beside the declared ones are not mentioned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .commands import COMMANDS
from .declare import Builtin, Command, Enum, Event, ListOf, Member, Struct, Type
from .events import EVENTS

__all__ = ["schema", "structs"]

_EMPTY = Struct("q_empty", "Nothing.", ())


def schema(
    commands: Mapping[str, Command] = COMMANDS, events: Mapping[str, Event] = EVENTS
) -> list[dict[str, Any]]:
    """Return the schema: commands, events, then each type that they need, once."""
    entities: list[dict[str, Any]] = []
    roots: list[Type] = []

    def object_of(name: str, members: tuple[Member, ...]) -> str:
        struct = Struct(f"q_obj_{name}-arg", "", members) if members else _EMPTY
        roots.append(struct)
        return struct.name

    for command in commands.values():
        returns = command.returns or _EMPTY
        roots.append(returns)
        entities.append(
            {
                "name": command.name,
                "meta-type": "command",
                "arg-type": object_of(command.name, command.arguments),
                "ret-type": returns.name,
            }
        )
    for event in events.values():
        entities.append(
            {
                "name": event.name,
                "meta-type": "event",
                "arg-type": object_of(event.name, event.data),
            }
        )
    return entities + [_entity(type) for type in _reachable(roots)]


def structs(roots: Iterable[Type]) -> list[Struct]:
    """Return the objects that ``roots`` are made of, each once, outermost first."""
    return [type for type in _reachable(roots) if isinstance(type, Struct)]


def _reachable(roots: Iterable[Type]) -> Iterator[Type]:
    seen: set[str] = set()
    waiting = list(roots)
    while waiting:
        type = waiting.pop(0)
        if type.name in seen:
            continue
        seen.add(type.name)
        yield type
        if isinstance(type, ListOf):
            waiting.append(type.element)
        elif isinstance(type, Struct):
            waiting.extend(member.type for member in type.members)


def _entity(type: Type) -> dict[str, Any]:
    if isinstance(type, Builtin):
        return {"name": type.name, "meta-type": "builtin", "json-type": type.json}
    if isinstance(type, Enum):
        return {
            "name": type.name,
            "meta-type": "enum",
            "members": [{"name": value} for value in type.values],
            "values": list(type.values),
        }
    if isinstance(type, ListOf):
        return {"name": type.name, "meta-type": "array", "element-type": type.element.name}
    return {
        "name": type.name,
        "meta-type": "object",
        "members": [
            {"name": member.name, "type": member.type.name}
            | ({"default": None} if member.optional else {})
            for member in type.members
        ],
    }
