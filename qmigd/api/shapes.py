"""The shapes of what the commands return.

Sizes are in bytes, times in milliseconds, and points in time in seconds since
1970, as QEMU has them, unless the text says otherwise.
"""

from __future__ import annotations

from ..interfaces import FORMATS, PATHS, PLACES
from .declare import (
    ANY,
    BOOL,
    DICT,
    INT,
    NUMBER,
    STR,
    Enum,
    ListOf,
    Member,
    Struct,
)

__all__ = [
    "AFTER",
    "CHANNEL",
    "COMMAND_INFO",
    "ERROR",
    "FEATURE",
    "FEATURES",
    "FILE",
    "FORMAT",
    "GUEST",
    "LEFT_OUT",
    "LEGACY",
    "MIGRATE",
    "MIGRATION",
    "PATH",
    "PLACE",
    "PLAN",
    "RAM",
    "ROLE",
    "SCHEMA_INFO",
    "TRIPLE",
    "TUNABLE",
    "VERSION",
]

ROLE = Enum("Role", ("source", "destination"))
PATH = Enum("Path", PATHS)
PLACE = Enum("Place", PLACES)
FORMAT = Enum("FileFormat", FORMATS)
AFTER = Enum("AfterSave", ("keep", "continue", "quit"))
LEGACY = Enum("Legacy", ("refuse", "allow"))

_WHERE = (
    Member("where", PLACE, "Where that is.", optional=True),
    Member("side", ROLE, "On which side, if on one of them.", optional=True),
)

ERROR = Struct(
    "ErrorInfo",
    "Why something failed.",
    (
        Member("class", STR, "A short word for programs, stable between releases."),
        Member("desc", STR, "A sentence for people."),
    ),
)

TRIPLE = Struct(
    "VersionTriple",
    "A version in the form in which QEMU gives its own.",
    (
        Member("major", INT, "The first number."),
        Member("minor", INT, "The second number."),
        Member("micro", INT, "The third number."),
    ),
)

VERSION = Struct(
    "VersionInfo",
    "Which qmigd this is.",
    (
        Member("qmigd", STR, "The version of qmigd."),
        Member("protocol", ListOf(INT), "The versions of the handshake that it speaks."),
        Member(
            "qemu",
            TRIPLE,
            "The version of qmigd again, under the name where QMP clients look for one.",
        ),
        Member("package", STR, "`qmigd` and its version, where QEMU has its package."),
    ),
)

COMMAND_INFO = Struct("CommandInfo", "A command.", (Member("name", STR, "Its name."),))

SCHEMA_INFO = Struct(
    "SchemaInfo",
    "An entity of the schema, in the format of QEMU's `query-qmp-schema`. Which members "
    "there are depends on `meta-type`.",
    (
        Member("name", STR, "What the others refer to it by."),
        Member(
            "meta-type",
            Enum("SchemaMetaType", ("builtin", "enum", "array", "object", "command", "event")),
            "What kind of entity it is.",
        ),
        Member("json-type", STR, "Of a `builtin`: how it looks in JSON.", optional=True),
        Member("values", ListOf(STR), "Of an `enum`.", optional=True),
        Member("members", ListOf(DICT), "Of an `object` or an `enum`.", optional=True),
        Member("element-type", STR, "Of an `array`.", optional=True),
        Member("arg-type", STR, "Of a `command` or an `event`: an object.", optional=True),
        Member("ret-type", STR, "Of a `command`.", optional=True),
    ),
)

GUEST = Struct(
    "GuestInfo",
    "A guest that this daemon knows.",
    (
        Member("name", STR, "What the commands call it."),
        Member("backend", STR, "What kind of guest it is: `qemu` or `memory`."),
        Member("qmp", STR, "The URI of its QMP socket; absent with `launch`.", optional=True),
        Member("launch", BOOL, "The daemon starts this guest's process itself."),
        Member("configured", BOOL, "It stands in the configuration file."),
        Member(
            "state",
            STR,
            "QEMU's run state (`running`, `paused`, `inmigrate`, `postmigrate` ...), or "
            "`unreachable`, `busy` (another client has its QMP socket), or `not-started`.",
        ),
        Member(
            "reason",
            STR,
            "Why the state could not be read, or why it is not started.",
            optional=True,
        ),
        Member("migration", STR, "The id of the migration that it is in.", optional=True),
    ),
)

FEATURE = Struct(
    "FeatureInfo",
    "A negotiable feature.",
    (
        Member("name", STR, "Its name in the handshake, and in `prefer` and the like."),
        Member("summary", STR, "What it does."),
        Member("offered", BOOL, "This host (and the guest, if one was named) can do it."),
        Member("selected", BOOL, "A migration to that peer would use it.", optional=True),
        Member("reason", STR, "Why it is not offered, or not selected.", optional=True),
        *_WHERE,
    ),
)

FEATURES = Struct(
    "FeaturesInfo",
    "What could be negotiated.",
    (
        Member("guest", STR, "The guest that was asked about.", optional=True),
        Member("peer", STR, "The peer that was asked.", optional=True),
        Member("path", PATH, "The path that the stream would take.", optional=True),
        Member("path-reason", STR, "Why that one.", optional=True),
        Member(
            "blocked-reasons",
            ListOf(STR),
            "Why the guest cannot be moved at all, in its process's words.",
            optional=True,
        ),
        Member("features", ListOf(FEATURE), "Every feature that this daemon has."),
        Member(
            "warnings",
            ListOf(STR),
            "What needs somebody's attention before it stops migrations: certificates that end "
            "soon. Sentences for people.",
            optional=True,
        ),
    ),
)

TUNABLE = Struct(
    "TunableInfo",
    "A migration parameter that a user may set, as the guest describes it.",
    (
        Member("name", STR, "QEMU's name for it."),
        Member("type", STR, "`int`, `bool`, `str`, or the name of an enum."),
        Member("values", ListOf(STR), "The values of an enum.", optional=True),
        Member("value", ANY, "The present value; `null` where there is none."),
        Member("deprecated", BOOL, "It is declared as going away."),
        Member("unstable", BOOL, "It is declared as one that may change."),
    ),
)

CHANNEL = Struct(
    "ChannelInfo",
    "A connection that carries bytes of the stream.",
    (
        Member("name", STR, "`main`, or the name that a feature gave it."),
        Member("index", INT, "Which one of that name, from 0."),
    ),
)

LEFT_OUT = Struct(
    "LeftOutInfo",
    "A feature that was not selected.",
    (
        Member("name", STR, "The feature."),
        Member("reason", STR, "Why it was left out."),
        *_WHERE,
    ),
)

PLAN = Struct(
    "PlanInfo",
    "What both daemons settled on.",
    (
        Member("path", PATH, "How the bytes get from the source's process to the destination's."),
        Member("path-reason", STR, "Why that path."),
        Member("features", ListOf(STR), "The features that are used."),
        Member("agreements", DICT, "Each feature's parameters, by the feature's name."),
        Member("channels", ListOf(CHANNEL), "The connections that carry the stream."),
        Member("left-out", ListOf(LEFT_OUT), "The features that are not used, and why."),
    ),
)

RAM = Struct(
    "RamInfo",
    "The guest's own figures on RAM, by QEMU's names. There may be more than these.",
    (
        Member("total", INT, "The guest's RAM.", optional=True),
        Member("transferred", INT, "Sent so far.", optional=True),
        Member("remaining", INT, "Still to be sent in this pass.", optional=True),
        Member("mbps", NUMBER, "The rate, in megabits per second.", optional=True),
        Member("dirty-sync-count", INT, "The pass, from 1.", optional=True),
        Member("dirty-pages-rate", INT, "Pages that the guest dirties a second.", optional=True),
        Member("page-size", INT, "Of one page.", optional=True),
        Member("duplicate", INT, "Pages that were sent as zeros.", optional=True),
        Member("normal", INT, "Pages that were sent whole.", optional=True),
        Member("normal-bytes", INT, "What those pages come to.", optional=True),
        Member("postcopy-requests", INT, "Pages that the destination asked for.", optional=True),
    ),
    open=True,
)

FILE = Struct(
    "FileInfo",
    "The file of a saved guest.",
    (
        Member("path", STR, "Where it is, or will be once it is complete."),
        Member(
            "format",
            FORMAT,
            "`mapped-ram`: each page of RAM has its place in it. `stream`: what a migration would "
            "send. `zstd`: the same, compressed.",
        ),
        Member("features", ListOf(STR), "What is used to write it, or to read it."),
        Member("size", INT, "Its bytes."),
        Member("on-disk", INT, "What it takes on the disk, which is less where it has holes."),
    ),
)

MIGRATION = Struct(
    "MigrationInfo",
    "A migration, running or over; a save and a restore are such, too.",
    (
        Member("id", STR, "Its id, a UUID; the same on both sides."),
        Member("guest", STR, "The guest, by its name on this side."),
        Member("role", ROLE, "Which side this daemon is."),
        Member("peer", STR, "The other daemon, or `file:` and a path."),
        Member("file", FILE, "Of a save or a restore.", optional=True),
        Member(
            "peer-names",
            ListOf(STR),
            "In TLS: the names and addresses in the other host's certificate.",
            optional=True,
        ),
        Member(
            "status",
            STR,
            "In QEMU's words: `setup`, `active`, `postcopy-active`, `device`, `completed`, "
            "`failed`, `cancelling`, `cancelled` and so on.",
        ),
        Member("step", STR, "What is going on, for people: *negotiating*, *moving RAM*."),
        Member("plan", PLAN, "Once both sides have settled on it.", optional=True),
        Member("tunables", DICT, "The tunables that the user set, with their values."),
        Member("ram", RAM, "Once RAM is being moved.", optional=True),
        Member(
            "setup-time",
            INT,
            "What the guest's process needed before the first byte.",
            optional=True,
        ),
        Member("total-time", INT, "How long it took, or has taken so far.", optional=True),
        Member("expected-downtime", INT, "How long the guest would stop now.", optional=True),
        Member("downtime", INT, "How long the guest stood still.", optional=True),
        Member("postcopy", BOOL, "`migrate-start-postcopy` is possible now.", optional=True),
        Member(
            "owner",
            ROLE,
            "Which side the guest belongs to; only there may it run. It is the source until "
            "everything has been sent, or postcopy begins.",
            optional=True,
        ),
        Member(
            "handover-time",
            NUMBER,
            "How long the guest stood still beyond QEMU's `downtime`, until the destination "
            "let it run.",
            optional=True,
        ),
        Member(
            "negotiation-time",
            NUMBER,
            "What the two daemons added before the guest's processes began.",
            optional=True,
        ),
        Member("cpu-throttle-percentage", INT, "How much the guest is slowed.", optional=True),
        Member("postcopy-blocktime", INT, "How long virtual CPUs waited for pages.", optional=True),
        Member(
            "blocked-reasons",
            ListOf(STR),
            "Why the guest's process refuses to migrate.",
            optional=True,
        ),
        Member("error", ERROR, "Why it failed.", optional=True),
        Member("started", NUMBER, "When it began, in seconds since 1970."),
        Member("ended", NUMBER, "When it was over, in seconds since 1970.", optional=True),
    ),
)

MIGRATE = Struct(
    "MigrateInfo",
    "A migration that was accepted.",
    (Member("id", STR, "Its id, for `query-migrate`."),),
)
