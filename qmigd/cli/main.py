"""``qmigctl``: reads the command line, connects, and ends with an exit code.

Whatever goes wrong, in the subcommands or here, arrives in one place
(:func:`_session`) and becomes one sentence on stderr, or with ``--json`` one
object on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from twisted.internet.defer import CancelledError, Deferred

from ..api import SOCKET_VARIABLE, default_socket, nearest
from ..errors import DeadlineError, GuestError, GuestGone, QmigdError
from ..qmp.client import QMPRefusal, connect
from . import far_end, pki, render
from .commands import RUN, Ending, Session, write
from .options import LOCAL, Exit, UsageError, make_parser

__all__ = ["main"]

#: Seconds that the daemon has for an answer.  It has deadlines of its own for
#: QEMU and for the peer, and says which of them failed; this one is for itself.
_DEADLINE = 60.0

_INTERRUPTED = Ending(
    Exit.UNKNOWN,
    "interrupted",
    "Interrupted before qmigd had answered; whether it did what was asked is not known.",
)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run qmigctl; the process's own arguments where none are given."""
    given = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        # a guest's name that the terminal cannot show is no reason to fail
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        options = _parse(given)
        if options.command in LOCAL:
            sys.exit(_local(options))
        # Late, so that "--help" is quick.
        from twisted.internet import task

        task.react(_session, (options,))
    except Ending as ending:
        sys.exit(_fail(ending, "--json" in given))
    except KeyboardInterrupt:
        # before the reactor runs; after that, signals have handlers of their own
        sys.exit(_fail(_INTERRUPTED, "--json" in given))


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


def _address(given: str | None) -> str:
    """Return the management socket's URI; a bare path will do as well.

    :raises Ending: it is no unix socket.
    """
    address = given or os.environ.get(SOCKET_VARIABLE) or default_socket(os.environ, os.getuid())
    if address.startswith(("/", "./", "../")):
        address = f"unix:{address}"
    if not address.startswith("unix:") or address == "unix:":
        raise Ending(
            Exit.REFUSED, "usage", f"'{address}' is no management socket; it must be unix:/path."
        )
    return address


def _unreachable(address: str, error: QmigdError) -> Ending:
    """Return the sentence for a management socket that nobody answers on."""
    path = address.removeprefix("unix:")
    other = f"'--socket', or {SOCKET_VARIABLE} in the environment, names another one"
    directory = os.path.dirname(path) or "."
    hidden = os.path.isdir(directory) and not os.access(directory, os.X_OK)
    if hidden or (os.path.lexists(path) and not os.access(path, os.W_OK)):
        text = f"You may not connect to {path}; run qmigctl as the user that qmigd runs as."
    elif not os.path.lexists(path):
        text = f"There is no socket {path}: qmigd does not run, or listens elsewhere ({other})."
    elif isinstance(error, GuestGone):
        text = f"Nobody listens on {path}: qmigd has ended, or listens elsewhere ({other})."
    else:
        text = f"What listens on {path} does not answer as qmigd does."
    return Ending(Exit.UNREACHABLE, "unreachable", text)


async def _run(reactor: Any, options: argparse.Namespace) -> Exit:
    """Connect, and carry one subcommand out; returns the exit code."""
    address = _address(options.socket)
    try:
        client = await connect(reactor, address, deadline=_DEADLINE)
    except GuestError as error:
        raise _unreachable(address, error) from None
    try:
        return await RUN[options.command](Session(reactor, client, options))
    except QMPRefusal as error:
        raise Ending(Exit.REFUSED, error.code, error.desc) from None
    except DeadlineError:
        raise Ending(
            Exit.UNREACHABLE, "deadline", f"qmigd did not answer within {_DEADLINE:g} s."
        ) from None
    except GuestGone:
        raise Ending(
            Exit.UNREACHABLE, "unreachable", "qmigd closed the connection before it had answered."
        ) from None
    except QmigdError as error:
        raise Ending(Exit.REFUSED, error.code, error.text) from None
    finally:
        client.close()


_LOCAL: Mapping[str, Callable[[argparse.Namespace], Exit]] = {
    "pki": pki.run,
    "connect": far_end.run,
}


def _local(options: argparse.Namespace) -> Exit:
    """Carry out a subcommand that needs no management socket; returns the exit code."""
    try:
        return _LOCAL[options.command](options)
    except Ending as ending:
        return _fail(ending, options.json)
    except QmigdError as error:
        return _fail(Ending(Exit.REFUSED, error.code, error.text), options.json)
    except Exception as error:
        return _fail(_bug(error), options.json)


def _bug(error: Exception) -> Ending:
    return Ending(Exit.BUG, "internal", f"An error inside qmigctl, {type(error).__name__}: {error}")


async def _session(reactor: Any, options: argparse.Namespace) -> NoReturn:
    """Run until the end or a signal."""
    work = Deferred.fromCoroutine(_run(reactor, options))

    def interrupted(number: int, frame: object) -> None:
        reactor.callFromThread(work.cancel)

    def install() -> None:
        # once the reactor has installed its own, which would end it without a word
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupted)

    reactor.callWhenRunning(install)
    try:
        code = await work
    except Ending as ending:
        code = _fail(ending, options.json)
    except CancelledError:
        code = _fail(_INTERRUPTED, options.json)
    except BrokenPipeError:
        # Whoever read the output has gone; Python must not find that out once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.UNKNOWN
    except Exception as error:
        code = _fail(_bug(error), options.json)
    raise SystemExit(int(code))


def _fail(error: Ending, as_json: bool) -> Exit:
    if as_json:
        write(
            sys.stdout, json.dumps({"error": {"class": error.kind, "desc": error.text}}, indent=2)
        )
    else:
        write(sys.stderr, f"qmigctl: {render.clean(error.text)}")
    return error.code


if __name__ == "__main__":
    main()
