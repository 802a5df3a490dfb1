"""The events."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .declare import BOOL, INT, NUMBER, STR, Event, ListOf, Member
from .shapes import CHANNEL, ERROR, ROLE

__all__ = ["EVENTS"]

EVENTS: Mapping[str, Event] = MappingProxyType(
    {
        declared.name: declared
        for declared in (
            Event(
                "MIGRATION",
                "The status of a migration has changed.",
                (
                    Member("id", STR, "The migration."),
                    Member("guest", STR, "The guest, by its name on this side."),
                    Member("role", ROLE, "Which side this daemon is."),
                    Member("status", STR, "As in `query-migrate`."),
                    Member("error", ERROR, "Why it failed.", optional=True),
                ),
            ),
            Event(
                "MIGRATION_PASS",
                "The source begins another pass over the guest's RAM.",
                (
                    Member("id", STR, "The migration."),
                    Member("guest", STR, "The guest, by its name on this side."),
                    Member("pass", INT, "Which pass, from 1."),
                ),
            ),
            Event(
                "CHANNEL_PLAN",
                "A migration over `fd:` is going to want these payload channels.\n\n"
                "The source says so twice. Before it asks for anything, `control` included, it "
                "lists what this side could use (`settled` is false): there are not going to be "
                "more, but perhaps fewer, which depends on the destination. What has been settled "
                "comes before the first of them is asked for; the destination says this alone. "
                "None is listed where the stream takes the control connection.",
                (
                    Member("id", STR, "The migration."),
                    Member("guest", STR, "The guest, by its name on this side."),
                    Member("role", ROLE, "Which side this daemon is."),
                    Member("channels", ListOf(CHANNEL), "In the order in which they are opened."),
                    Member("settled", BOOL, "Whether it has been negotiated."),
                ),
            ),
            Event(
                "CHANNEL_REQUEST",
                "A migration over `fd:` wants a connection to the peer.\n\n"
                "It is answered with `getfd` and `add-channel`. The first one that a source asks "
                "for is `control`; it is asked for again if it was lost just when the guest was "
                "handed over, to find out what became of it.",
                (
                    Member("id", STR, "The migration."),
                    Member("guest", STR, "The guest, by its name on this side."),
                    Member("role", ROLE, "Which side this daemon is."),
                    Member("channel", STR, "The channel's name: `control`, `main` and so on."),
                    Member("index", INT, "Which one of that name, from 0."),
                    Member(
                        "timeout",
                        NUMBER,
                        "Seconds that the source waits; then the migration fails, and the guest "
                        "goes on here. Absent at the destination, which waits for as long as the "
                        "migration lasts.",
                        optional=True,
                    ),
                ),
            ),
        )
    }
)
