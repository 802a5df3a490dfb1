"""The commands."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..errors import CommandNotFound
from .check import nearest
from .declare import BOOL, DICT, STR, Command, ListOf, Member
from .descriptor_commands import DESCRIPTOR_COMMANDS
from .shapes import (
    AFTER,
    COMMAND_INFO,
    FEATURES,
    FORMAT,
    GUEST,
    LEGACY,
    MIGRATE,
    MIGRATION,
    SCHEMA_INFO,
    TUNABLE,
    VERSION,
)

__all__ = ["COMMANDS", "command"]

_NAMED = Member("guest", STR, "the guest's name, as in `query-guests`.")
_NO_GUEST = ("guest-not-found", "There is no guest of that name.")
_BUSY = ("guest-busy", "The guest is being migrated, or another client has its QMP socket.")
_GONE = ("guest-gone", "The guest's process cannot be reached.")
_NO_PEER = ("peer-gone", "The peer cannot be reached.")
_SLOW = ("deadline", "The peer or the guest's process did not answer in time.")
_NO_MIGRATION = ("migration", "The guest is not being migrated from here.")
_TUNABLES = (
    "values by QEMU's own names, as in `query-tunables`. A string is turned into whatever type "
    'is declared for that name, so `"4"` does where `4` would.'
)

_TLS_HOSTNAME = Member(
    "tls-hostname",
    STR,
    "the name or address that the peer's certificate has to be for, if it is not the one in "
    "`uri`: behind a forwarded port, on a unix socket, or with `fd:`.",
    optional=True,
)

_ARGV = Member(
    "argv",
    ListOf(STR),
    "the program that carries the connections, and its arguments, without a shell in between; "
    "`uri` is `exec:` then, and no more.",
    optional=True,
)

_EXEC = (
    "`exec:COMMAND` has this host's shell run a command for each connection, as the user that "
    "the daemon runs as, with the connection as its standard input and output. Who may use the "
    "management socket may do that; a peer never can."
)

COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        declared.name: declared
        for declared in (
            Command(
                "query-version",
                "Return the version of qmigd and of the handshake that it speaks.",
                returns=VERSION,
            ),
            Command(
                "query-commands",
                "Return the names of all commands.\n\n"
                "Beside them there is `qmp_capabilities`, which a client gives first, as it "
                "would to QEMU.",
                returns=ListOf(COMMAND_INFO),
            ),
            Command(
                "query-qmp-schema",
                "Return the schema of all commands and events.\n\n"
                "The format is that of QEMU's command of the same name, so that tools which "
                "read QEMU's schema can read this one.",
                returns=ListOf(SCHEMA_INFO),
            ),
            Command(
                "query-guests",
                "Return the guests that this daemon knows, with their states.",
                returns=ListOf(GUEST),
            ),
            Command(
                "guest-add",
                "Register a running guest under a name, so that it can be migrated.\n\n"
                "It is forgotten when the daemon ends. A guest that the daemon is to know "
                "always, or that it is to start itself, belongs in the "
                "configuration file. To receive a guest, start a QEMU with `-incoming defer` "
                "and register it here. The daemon takes a first look at it, so that a migration "
                "begins sooner; that it cannot be reached yet is no error, but shown.",
                (
                    Member("name", STR, "what the commands are to call the guest."),
                    Member(
                        "qmp",
                        STR,
                        "its QMP socket, `unix:/path`; it was started with "
                        "`-qmp unix:/path,server=on,wait=off`.",
                    ),
                ),
                returns=GUEST,
                errors=(("guest-busy", "There is a guest of that name already."),),
            ),
            Command(
                "guest-remove",
                "Forget a guest that was registered with `guest-add`.\n\n"
                "Its process is left alone.",
                (Member("name", STR, "the guest's name."),),
                errors=(
                    _NO_GUEST,
                    (
                        "guest-busy",
                        "The guest is being migrated, or stands in the configuration file.",
                    ),
                ),
            ),
            Command(
                "query-features",
                "Return what can be negotiated, and why the rest cannot.\n\n"
                "Without arguments: what this host can do. With a guest: what this host can do "
                "with this guest. With the URI of a peer as well: what a migration of this "
                "guest to that peer would use. No guest is touched in any of the three.\n\n"
                + _EXEC,
                (
                    Member("guest", STR, "the guest's name.", optional=True),
                    Member(
                        "uri",
                        STR,
                        "where the peer's qmigd listens, as for `migrate`; needs `guest`.",
                        optional=True,
                    ),
                    _TLS_HOSTNAME,
                    _ARGV,
                ),
                FEATURES,
                (_NO_GUEST, _BUSY, _GONE, _NO_PEER, _SLOW),
            ),
            Command(
                "query-tunables",
                "Return the migration parameters that can be set for a guest.\n\n"
                "They are what the guest itself declares. None has to be set. What is "
                "negotiated (features, TLS, ports) is not among them.",
                (_NAMED,),
                ListOf(TUNABLE),
                (_NO_GUEST, _BUSY, _GONE, _SLOW),
            ),
            Command(
                "migrate",
                "Move a guest to the host where another qmigd listens.\n\n"
                "Features need not be chosen: the two daemons use what both hosts, and the "
                "guest on each of them, can do.\n\n"
                "With `fd:` as `uri` qmigd makes no connection by itself: it asks for each with "
                "the event `CHANNEL_REQUEST`, and `add-channel` hands it over.\n\n"
                "Once accepted, the migration runs on its own: `query-migrate` and the "
                "`MIGRATION` event show how it goes on. Whatever fails before the guest has "
                "passed to the destination, it goes on running here.\n\n"
                "`prefer`, `require` and `exclude` take names of features, as in "
                "`query-features`, and of paths: `direct`, `handover`, `relay`. They are added "
                "to the policy in the configuration file; what contradicts it is refused.\n\n"
                + _EXEC,
                (
                    _NAMED,
                    Member(
                        "uri",
                        STR,
                        "where the destination's qmigd listens: `tcp:host:port`, `unix:/path`, "
                        "`vsock:cid:port`, or `exec:command`.",
                    ),
                    Member("tunables", DICT, _TUNABLES, optional=True),
                    Member(
                        "prefer",
                        ListOf(STR),
                        "taken first where two exclude each other, in this order.",
                        optional=True,
                    ),
                    Member(
                        "require",
                        ListOf(STR),
                        "the migration is refused if one of these cannot be had.",
                        optional=True,
                    ),
                    Member("exclude", ListOf(STR), "not to be used.", optional=True),
                    _TLS_HOSTNAME,
                    Member(
                        "legacy",
                        LEGACY,
                        "what is done where nobody greets, because it is a QEMU with `-incoming` "
                        "and no qmigd: `refuse`, or `allow`, then it gets QEMU's plain stream, in "
                        "clear and with no feature. By default what `legacy` in `[policy]` says.",
                        optional=True,
                    ),
                    _ARGV,
                ),
                MIGRATE,
                (
                    _NO_GUEST,
                    _BUSY,
                    _GONE,
                    (
                        "argument",
                        "A value is wrong, a name is unknown, or a tunable is a feature.",
                    ),
                ),
            ),
            Command(
                "save",
                "Save a guest into a file on this host.\n\n"
                "The guest stops, its RAM and the state of its devices are written, and it stays "
                "here as it is, stopped, unless `after` says otherwise. Its disks are not in the "
                "file: whoever lets the guest go on and wants to restore the file later has to "
                "copy the disks, too, while it stands still.\n\n"
                "Once accepted, it runs on its own, as a migration does: `query-migrate` and the "
                "`MIGRATION` event show how it goes on, and `migrate-cancel` ends it. The file "
                "gets its name when all of it is on the disk; whatever fails before, the guest "
                "goes on running and there is no file.",
                (
                    _NAMED,
                    Member("file", STR, "where to, an absolute path on the host of this daemon."),
                    Member(
                        "format",
                        FORMAT,
                        "what the file is to have. Without it `mapped-ram` where the guest "
                        "has it (QEMU 9.1 or newer), else `stream`.",
                        optional=True,
                    ),
                    Member(
                        "live",
                        BOOL,
                        "let the guest run while its RAM is saved, and stop it for the rest only; "
                        "what it writes meanwhile is saved again.",
                        optional=True,
                    ),
                    Member(
                        "after",
                        AFTER,
                        "what becomes of the guest: `keep` it stopped, let it `continue`, or "
                        "`quit` its process. Without it what `source-after` in the configuration "
                        "says.",
                        optional=True,
                    ),
                    Member("replace", BOOL, "a file of that name may be replaced.", optional=True),
                    Member(
                        "checksum",
                        BOOL,
                        "give what is saved a checksum, which a restore verifies; it is on, "
                        "and costs one reading of the file.",
                        optional=True,
                    ),
                    Member("tunables", DICT, _TUNABLES, optional=True),
                ),
                MIGRATE,
                (
                    _NO_GUEST,
                    _BUSY,
                    _GONE,
                    ("argument", "A value is wrong, or a tunable does not go with the format."),
                    ("feature", "The guest does not have the format."),
                    ("file", "The file cannot be made; the text says why."),
                    ("guest", "There is nothing that could be saved, or it may not be."),
                ),
            ),
            Command(
                "restore",
                "Restore a guest from a file on this host.\n\n"
                "It goes into a process that waits with `-incoming defer`, or that the daemon "
                "starts itself. That this guest is the one that was saved is seen before any RAM "
                "is read. It runs afterwards if it ran when it was saved, and is paused if it was. "
                "The file stays.\n\n"
                "Once accepted, it runs on its own: `query-migrate` and the `MIGRATION` event show "
                "how it goes on, and `migrate-cancel` ends it.",
                (
                    _NAMED,
                    Member("file", STR, "where from, an absolute path on the host of this daemon."),
                    Member(
                        "verify",
                        BOOL,
                        "compare what was saved with its checksum first; it is on, and costs one "
                        "reading of the file.",
                        optional=True,
                    ),
                    Member("tunables", DICT, _TUNABLES, optional=True),
                ),
                MIGRATE,
                (
                    _NO_GUEST,
                    _BUSY,
                    ("file", "The file cannot be read, or is no good one; the text says why."),
                ),
            ),
            Command(
                "query-migrate",
                "Return migrations, running ones and the most recent of those that are over.\n\n"
                "Without arguments all that the daemon remembers, the oldest first.",
                (
                    Member("guest", STR, "only those of this guest.", optional=True),
                    Member("id", STR, "only the one with this id.", optional=True),
                ),
                ListOf(MIGRATION),
                (_NO_GUEST, ("migration", "There is no migration with that id.")),
            ),
            Command(
                "migrate-start-postcopy",
                "Switch a running migration to postcopy.\n\n"
                "The guest stops here and goes on at the destination at once, which fetches the "
                "rest of the RAM as the guest needs it. It always comes to an end, however fast "
                "the guest writes to its RAM; but from then on the guest belongs to the "
                "destination. It is possible when `query-migrate` says `postcopy`. With `fd:` it "
                "returns at once: a channel may have to be handed over first.",
                (_NAMED,),
                errors=(
                    _NO_GUEST,
                    _NO_MIGRATION,
                    ("feature", "This migration was negotiated without postcopy."),
                    ("guest", "The guest's process refused."),
                ),
            ),
            Command(
                "migrate-cancel",
                "Cancel a running migration, save or restore.\n\n"
                "The guest goes on running here; one that was being restored is not here. It "
                "returns once the request was taken; the "
                "end is seen in `query-migrate` and in the `MIGRATION` event. After postcopy "
                "has begun it is too late; but one in which nothing moves any more is given up, "
                "and left to the two processes.",
                (_NAMED,),
                errors=(
                    _NO_GUEST,
                    _NO_MIGRATION,
                    ("migration", "The guest has passed to the destination already."),
                ),
            ),
            Command(
                "migrate-set-parameters",
                "Set tunables of a migration while it runs.\n\n"
                "They are put back to what they were when the migration is over.",
                (_NAMED, Member("tunables", DICT, _TUNABLES)),
                errors=(
                    _NO_GUEST,
                    _NO_MIGRATION,
                    ("argument", "A name is a feature, or is unknown to the guest."),
                    ("guest", "The guest's process refused a value; the text has its words."),
                ),
            ),
            *DESCRIPTOR_COMMANDS,
        )
    }
)


def command(name: str) -> Command:
    """Return the command of that name.

    :raises CommandNotFound: there is none; the text has the nearest names.
    """
    try:
        return COMMANDS[name]
    except KeyError:
        raise CommandNotFound(
            f"There is no command '{name}'{nearest(name, COMMANDS) or '.'}"
        ) from None
