"""``qmigctl``: reads the command line, connects, and ends with an exit code.

Whatever goes wrong becomes one sentence on stderr, or with ``--json`` one object on
stdout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..api import nearest
from ..errors import QmigdError
from .ending import INTERRUPTED, Ending, bug, fail
from .options import LOCAL, Exit, UsageError, make_parser
from .output import prepare

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run qmigctl; the process's own arguments where none are given."""
    given = sys.argv[1:] if argv is None else argv
    prepare()
    try:
        try:
            options = _parse(given)
        finally:
            sys.stdout.flush()  # the help
        if options.command in LOCAL:
            sys.exit(_local(options))
        # Late, so that what needs no daemon is quick, and small.
        from . import session

        session.run(options)
    except Ending as ending:
        sys.exit(fail(ending, "--json" in given))
    except KeyboardInterrupt:
        # before the reactor runs; after that, signals have handlers of their own
        sys.exit(fail(INTERRUPTED, "--json" in given))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    :raises Ending: it is wrong.
    :raises SystemExit: it asked for help, which has been printed.
    """
    parser, parsers = make_parser()
    try:
        options = parser.parse_args(argv)
    except UsageError as error:
        raise Ending(Exit.REFUSED, "usage", str(error)) from None
    if options.command == "help":
        if options.topic is not None and options.topic not in parsers:
            raise Ending(
                Exit.REFUSED,
                "usage",
                f"There is no command '{options.topic}'{nearest(options.topic, parsers) or '.'}",
            )
        parsers.get(options.topic, parser).print_help()
        raise SystemExit(Exit.OK)
    options.json = getattr(options, "json", False)
    options.socket = getattr(options, "socket", None)
    return options


def _local(options: argparse.Namespace) -> Exit:
    """Carry out a subcommand that needs no management socket; returns the exit code."""
    try:
        if options.command == "connect":
            from . import far_end

            return far_end.run(options)
        if options.command == "inspect":
            from . import inspecting

            return inspecting.run(options)
        from . import pki

        return pki.run(options)
    except Ending as ending:
        return fail(ending, options.json)
    except QmigdError as error:
        return fail(Ending(Exit.REFUSED, error.code, error.text), options.json)
    except Exception as error:
        return fail(bug(error), options.json)


if __name__ == "__main__":
    main()
