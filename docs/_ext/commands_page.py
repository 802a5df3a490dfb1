"""Writes the reference of the management commands into its page, out of :mod:`qmigd.api`.

The page (``docs/commands.md``) has a text for the reader and, where the
reference is to stand, the line :data:`MARK`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qmigd.api import COMMANDS, EVENTS, Command, Enum, Event, ListOf, Member, Struct, Type, structs

if TYPE_CHECKING:
    from sphinx.application import Sphinx

__all__ = ["MARK", "PAGE", "reference", "setup"]

PAGE = "commands"
MARK = "<!-- the reference, out of qmigd/api -->"


def reference() -> str:
    """Return the reference as Markdown (MyST): commands, events, and objects in answers."""
    returned = structs(
        [command.returns for command in COMMANDS.values() if command.returns is not None]
        + [member.type for event in EVENTS.values() for member in event.data]
    )
    parts = ["## Commands"]
    parts += [_command(command) for command in COMMANDS.values()]
    parts += ["## Events"]
    parts += [_event(event) for event in EVENTS.values()]
    parts += ["## Objects"]
    parts += [_struct(struct) for struct in returned]
    return "\n\n".join(parts) + "\n"


def _command(command: Command) -> str:
    parts = [f"(command-{command.name})=\n### {command.name}", command.help]
    if command.arguments:
        parts.append(_members("Argument", command.arguments))
    else:
        parts.append("It takes no arguments.")
    if command.returns is None:
        parts.append("It returns an empty object.")
    else:
        parts.append(f"It returns {_type(command.returns, article=True)}.")
    if command.errors:
        parts.append(
            _table(("Error", "When"), [(f"`{code}`", when) for code, when in command.errors])
        )
    parts.append(f"Since {command.since}.")
    return "\n\n".join(parts)


def _event(event: Event) -> str:
    return "\n\n".join(
        [
            f"(event-{event.name})=\n### {event.name}",
            event.help,
            _members("Data", event.data),
            f"Since {event.since}.",
        ]
    )


def _struct(struct: Struct) -> str:
    return "\n\n".join(
        [f"(object-{struct.name})=\n### {struct.name}", struct.help]
        + [_members("Member", struct.members)]
    )


def _members(title: str, members: Sequence[Member]) -> str:
    return _table(
        (title, "Type", ""),
        [
            (
                f"`{member.name}`",
                _type(member.type) + (", optional" if member.optional else ""),
                member.help[:1].upper() + member.help[1:],
            )
            for member in members
        ],
    )


def _type(type: Type, *, article: bool = False) -> str:
    if isinstance(type, ListOf):
        return f"{'a ' if article else ''}list of {_type(type.element)}"
    if isinstance(type, Struct):
        return f"{'an object, ' if article else ''}[{type.name}](#object-{type.name})"
    if isinstance(type, Enum):
        return " or ".join(f"`{value}`" for value in type.values)
    return type.name


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines
    )


def _insert(app: Sphinx, page: str, source: list[str]) -> None:
    if page == PAGE:
        source[0] = source[0].replace(MARK, reference())


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _insert)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
