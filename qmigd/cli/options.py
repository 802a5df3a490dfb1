"""qmigctl's command line: what can be said, and the help, which comes out of :mod:`qmigd.api`."""

from __future__ import annotations

import argparse
import os
import re
import textwrap
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any, NoReturn

from .. import __version__
from ..api import COMMANDS, SOCKET_VARIABLE, nearest
from ..interfaces import FORMATS

__all__ = ["EXIT_CODES", "LOCAL", "SUBCOMMANDS", "Exit", "UsageError", "make_parser"]


class Exit(IntEnum):
    """The exit codes; :data:`EXIT_CODES` has what they mean."""

    OK = 0
    FAILED = 1
    REFUSED = 2
    UNREACHABLE = 3
    CANCELLED = 4
    UNKNOWN = 5
    PASSED_ON = 6
    BUG = 70


#: What each exit code means, for the help and for the documentation.
EXIT_CODES: Mapping[Exit, str] = {
    Exit.OK: "done",
    Exit.FAILED: "it failed; the guest is where it was: on the source, or in its file. Of "
    "'inspect': what is in the file is cut or damaged",
    Exit.REFUSED: "wrong usage, or the daemon refused the command; nothing has changed",
    Exit.UNREACHABLE: "the daemon cannot be reached, or does not answer",
    Exit.CANCELLED: "the migration was cancelled; the guest is on the source",
    Exit.UNKNOWN: "qmigctl was interrupted, lost the daemon, or could not write its output; the "
    "migration may go on",
    Exit.PASSED_ON: "the migration failed after the guest had passed to the destination",
    Exit.BUG: "an error inside qmigctl",
}

_EPILOG = "exit codes:\n" + "\n".join(f"  {code:<3} {text}" for code, text in EXIT_CODES.items())


class UsageError(Exception):
    """The command line is wrong; the text is a sentence."""


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print and exit with."""

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong:
            choices = re.findall(r"[\w-]+", wrong[2])
            message = f"there is no command '{wrong[1]}'{nearest(wrong[1], choices) or '.'}"
        # argparse's messages begin in lower case and end without a full stop
        sentence = message[:1].upper() + message[1:]
        if not sentence.endswith((".", "?")):
            sentence += "."
        command = self.prog.split()[1:]
        raise UsageError(f"{sentence} See 'qmigctl help{''.join(f' {one}' for one in command)}'.")


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE")
    return name, value


def _days(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of days") from None


def _plain(text: str) -> str:
    """Return a text of the declarations as it reads in a terminal.

    Management commands become the subcommands that give them.
    """

    def word(found: re.Match[str]) -> str:
        return f"'qmigctl {names[found[1]]}'" if found[1] in names else found[1]

    names = {command: name for name, (command, _) in SUBCOMMANDS.items()}
    return re.sub("^Return ", "Show ", re.sub(r"`([^`]*)`", word, text).replace("*", ""))


def _help(command: str, argument: str) -> str:
    """Return what the declaration says on an argument, for argparse."""
    member = next(one for one in COMMANDS[command].arguments if one.name == argument)
    return _plain(member.help).rstrip(".").replace("%", "%%")


def _guest(parser: argparse.ArgumentParser, command: str, **more: Any) -> None:
    parser.add_argument("guest", metavar="GUEST", help=_help(command, "guest"), **more)


def _tls_hostname(parser: argparse.ArgumentParser, command: str) -> None:
    name = "tls-hostname"
    parser.add_argument(f"--{name}", metavar="NAME", help=_help(command, name))


def _argv(parser: argparse.ArgumentParser, command: str) -> None:
    parser.add_argument(
        "--argv",
        metavar="WORD",
        nargs=argparse.REMAINDER,
        default=[],
        help=f"{_help(command, 'argv')}; all that follows belongs to it",
    )


def _migrate(parser: argparse.ArgumentParser) -> None:
    _guest(parser, "migrate")
    parser.add_argument("uri", metavar="URI", help=_help("migrate", "uri"))
    parser.add_argument(
        "--tunable",
        metavar="NAME=VALUE",
        action="append",
        type=_assignment,
        default=[],
        help="set a tunable (see 'qmigctl tunables'); can be repeated",
    )
    for name in ("prefer", "require", "exclude"):
        parser.add_argument(
            f"--{name}",
            metavar="F",
            action="append",
            default=[],
            help=f"a feature or path: {_help('migrate', name)}; can be repeated",
        )
    _tls_hostname(parser, "migrate")
    parser.add_argument("--legacy", metavar="WHAT", help=_help("migrate", "legacy"))
    _argv(parser, "migrate")
    parser.add_argument(
        "--detach", action="store_true", help="return once the migration was accepted"
    )


def _file(parser: argparse.ArgumentParser, command: str) -> None:
    _guest(parser, command)
    parser.add_argument(
        "file", metavar="FILE", type=os.path.abspath, help="the file, on the daemon's host"
    )
    parser.add_argument(
        "--tunable",
        metavar="NAME=VALUE",
        action="append",
        type=_assignment,
        default=[],
        help="set a tunable (see 'qmigctl tunables'); can be repeated",
    )
    parser.add_argument("--detach", action="store_true", help="return once it was accepted")


def _save(parser: argparse.ArgumentParser) -> None:
    _file(parser, "save")
    parser.add_argument(
        "--format", metavar="FORMAT", help=f"{_help('save', 'format')} ({', '.join(FORMATS)})"
    )
    parser.add_argument("--live", action="store_true", help=_help("save", "live"))
    parser.add_argument("--after", metavar="WHAT", help=_help("save", "after"))
    parser.add_argument(
        "--continue",
        dest="after",
        action="store_const",
        const="continue",
        help="the same as --after continue: the guest goes on, and its disks move away from what "
        "is in the file",
    )
    parser.add_argument("--replace", action="store_true", help=_help("save", "replace"))
    parser.add_argument(
        "--no-checksum", action="store_true", help="make no checksum of what is saved"
    )


def _restore(parser: argparse.ArgumentParser) -> None:
    _file(parser, "restore")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the file with its checksum"
    )


def _features(parser: argparse.ArgumentParser) -> None:
    _guest(parser, "query-features", nargs="?")
    parser.add_argument("uri", metavar="URI", nargs="?", help=_help("query-features", "uri"))
    _tls_hostname(parser, "query-features")
    _argv(parser, "query-features")


def _tunables(parser: argparse.ArgumentParser) -> None:
    _guest(parser, "query-tunables")


def _status(parser: argparse.ArgumentParser) -> None:
    _guest(parser, "query-migrate", nargs="?")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="follow the guest's migration to its end, as 'qmigctl migrate' does",
    )


def _postcopy(parser: argparse.ArgumentParser) -> None:
    _guest(parser, "migrate-start-postcopy")


def _cancel(parser: argparse.ArgumentParser) -> None:
    _guest(parser, "migrate-cancel")


def _set(parser: argparse.ArgumentParser) -> None:
    _guest(parser, "migrate-set-parameters")
    parser.add_argument(
        "tunable",
        metavar="NAME=VALUE",
        nargs="+",
        type=_assignment,
        help="a tunable and its new value (see 'qmigctl tunables')",
    )


def _guest_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=_help("guest-add", "name"))
    parser.add_argument("qmp", metavar="QMP", help=_help("guest-add", "qmp"))


def _guest_remove(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=_help("guest-remove", "name"))


def _nothing(parser: argparse.ArgumentParser) -> None:
    pass


#: What is to be said beside a declaration's text.
_MORE: Mapping[str, str] = {
    "migrate": "\n\nqmigctl follows it to its end, unless --detach is given. Ctrl-C ends the "
    "following and not the migration.",
    "save": "\n\nqmigctl follows it to its end, unless --detach is given. Ctrl-C ends the "
    "following and not the save.",
    "restore": "\n\nqmigctl follows it to its end, unless --detach is given. Ctrl-C ends the "
    "following and not the restore.",
}

#: Each subcommand: the management command that it gives, and what adds its arguments.
SUBCOMMANDS: Mapping[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "migrate": ("migrate", _migrate),
    "save": ("save", _save),
    "restore": ("restore", _restore),
    "status": ("query-migrate", _status),
    "postcopy": ("migrate-start-postcopy", _postcopy),
    "cancel": ("migrate-cancel", _cancel),
    "set": ("migrate-set-parameters", _set),
    "guests": ("query-guests", _nothing),
    "guest-add": ("guest-add", _guest_add),
    "guest-remove": ("guest-remove", _guest_remove),
    "features": ("query-features", _features),
    "tunables": ("query-tunables", _tunables),
}


def _pki(parser: argparse.ArgumentParser) -> None:
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument(
        "--dir",
        metavar="DIR",
        help="where the CA is (default: /etc/qmigd/pki for root, else qmigd/pki in the user's "
        "configuration directory)",
    )
    common.add_argument("--force", action="store_true", help="replace what is there already")
    parser.set_defaults(dir=None, force=False)
    actions = parser.add_subparsers(
        dest="action", metavar="ACTION", required=True, title="actions", parser_class=_Parser
    )
    for name, days, text in (
        ("init", 3650, "Make a CA: once for all hosts"),
        ("host", 730, "Make a host's certificate, signed by the CA"),
    ):
        action = actions.add_parser(
            name, help=text, description=f"{text}.", parents=[common], allow_abbrev=False
        )
        action.add_argument(
            "--days",
            metavar="N",
            type=_days,
            default=days,
            help=f"good for N days (default: {days})",
        )
        if name == "host":
            action.add_argument(
                "name",
                metavar="NAME",
                nargs="+",
                help="a DNS name or an IP address by which other hosts reach this one",
            )


def _connect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "uri",
        metavar="SOCKET",
        help="what the daemon of this host listens on for peers: a path, or unix:/path",
    )


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--fields", action="store_true", help="print the fields of the devices as well"
    )
    parser.add_argument(
        "--plot", metavar="FILE.svg", help="draw where the bytes went, into this file"
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="+",
        help="a file with a stream, or '-' for standard input; the multifd channels that belong "
        "to it, if there are any, are further files",
    )


#: The subcommands that need no management socket: what they do, and what adds their arguments.
LOCAL: Mapping[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "pki": (
        "Make certificates for TLS between hosts.\n\nThe CA belongs on one machine, which need "
        "be no hypervisor and need not run qmigd; its key never leaves it. A host gets its own "
        "certificate and key, and the CA's certificate.",
        _pki,
    ),
    "connect": (
        "Connect standard input and output to this host's daemon.\n\nIt is the far end of a "
        "program that carries a migration's connections: with "
        "'exec:ssh hostb qmigctl connect /run/qmigd/qmigd-peer.sock' as the URI, a guest is moved "
        "through nothing but ssh. It ends with the connection.",
        _connect,
    ),
    "inspect": (
        "Say what is in a migration stream or in the file of a saved guest.\n\nThe machine type, "
        "the blocks and pages of RAM, the passes over it, the sections with their sizes, what "
        "the devices' state is, and what 'qmigctl save' wrote in front of it. The file is a "
        "stream of QEMU's format, with or without mapped-ram, or was made by 'qmigctl save' in any "
        "format. A cut or damaged one is told up to where that is.",
        _inspect,
    ),
}


def make_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser, and those of the subcommands by their names.

    Parsing raises :class:`UsageError`, and SystemExit for ``--help`` and ``--version``.
    """
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument(
        "--socket",
        metavar="URI",
        help=f"the daemon's management socket, unix:/path (default: ${SOCKET_VARIABLE}, else "
        f"unix:/run/qmigd/qmigd.sock, or $XDG_RUNTIME_DIR for an ordinary user)",
    )
    common.add_argument("--json", action="store_true", help="print JSON, as the daemon gives it")
    parser = _Parser(
        "qmigctl",
        description="Moves QEMU guests between hosts on which qmigd runs.",
        epilog=f"See 'qmigctl help COMMAND' for each command.\n\n{_EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qmigctl {__version__}")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, title="commands", parser_class=_Parser
    )
    parsers = {}

    def add(name: str, text: str, epilog: str | None, parents: list[_Parser]) -> None:
        parsers[name] = commands.add_parser(
            name,
            help=text.split("\n")[0].rstrip(".").replace("%", "%%"),
            description=_wrapped(text),
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=parents,
            allow_abbrev=False,
        )

    for name, (command, add_arguments) in SUBCOMMANDS.items():
        add(name, _plain(COMMANDS[command].help) + _MORE.get(name, ""), _EPILOG, [common])
        add_arguments(parsers[name])
    for name, (text, add_arguments) in LOCAL.items():
        add(name, text, None, [])
        add_arguments(parsers[name])
    helper = commands.add_parser("help", help="Explain a command", allow_abbrev=False)
    helper.add_argument("topic", metavar="COMMAND", nargs="?", help="the command to explain")
    return parser, parsers


def _wrapped(text: str) -> str:
    return "\n\n".join(textwrap.fill(paragraph, 79) for paragraph in text.split("\n\n"))
