"""qmigctl with the daemon: connects, has a subcommand carried out, and ends with its exit code.

Whatever goes wrong, in the subcommand or here, arrives in one place (:func:`_session`).
"""

from __future__ import annotations

import argparse
import os
import signal
import stat
from typing import Any, NoReturn

from twisted.internet import task
from twisted.internet.defer import CancelledError, Deferred

from ..api import SOCKET_VARIABLE, default_socket, is_qmigd
from ..errors import DeadlineError, GuestError, GuestGone, QmigdError
from ..qmp.client import QMPRefusal
from ..qmp.connecting import connect
from .commands import RUN, Session
from .ending import INTERRUPTED, Ending, bug, fail
from .options import Exit

__all__ = ["run"]

#: Seconds that the daemon has for an answer.  It has deadlines of its own for
#: QEMU and for the peer, and says which of them failed; this one is for itself.
_DEADLINE = 60.0


def run(options: argparse.Namespace) -> NoReturn:
    """Carry a subcommand out.

    :raises SystemExit: with the exit code.
    """
    task.react(_session, (options,))


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
    elif not stat.S_ISSOCK(os.stat(path).st_mode):
        text = f"{path} is no socket ({other})."
    elif isinstance(error, GuestGone):
        text = f"Nobody listens on {path}: qmigd has ended, or listens elsewhere ({other})."
    else:
        text = f"What listens on {path} does not greet as qmigd does ({other})."
    return Ending(Exit.UNREACHABLE, "unreachable", text)


def _not_qmigd(address: str) -> Ending:
    """Return the sentence for somebody else who speaks QMP."""
    text = (
        f"{address.removeprefix('unix:')} is the QMP socket of a guest, and not qmigd's; "
        f"'qmigctl guest-add NAME {address}' tells qmigd of it."
    )
    return Ending(Exit.UNREACHABLE, "unreachable", text)


async def _run(reactor: Any, options: argparse.Namespace) -> Exit:
    """Connect, and carry one subcommand out; returns the exit code."""
    address = _address(options.socket)
    try:
        client = await connect(reactor, address, deadline=_DEADLINE)
    except GuestError as error:
        raise _unreachable(address, error) from None
    try:
        if not is_qmigd(client.greeting):
            raise _not_qmigd(address)
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
        code = fail(ending, options.json)
    except CancelledError:
        code = fail(INTERRUPTED, options.json)
    except Exception as error:
        code = fail(bug(error), options.json)
    raise SystemExit(int(code))
