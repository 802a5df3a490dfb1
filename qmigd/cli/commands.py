"""What each subcommand does: it asks the daemon, prints, and returns the exit code."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from twisted.internet.defer import CancelledError

from ..errors import DeadlineError, GuestError, MigrationError
from ..qmp.client import QMPClient
from . import render
from .ending import Ending
from .options import Exit
from .output import write
from .progress import Display, LinesDisplay, NoDisplay, TerminalDisplay, watch

__all__ = ["RUN", "Session"]


class Session:
    """What a subcommand works with."""

    def __init__(self, reactor: Any, client: QMPClient, options: argparse.Namespace) -> None:
        self.reactor = reactor
        self.client = client
        self.options = options

    async def ask(self, command: str, **arguments: Any) -> Any:
        """Give a command; arguments that are None are left out."""
        given = {name: value for name, value in arguments.items() if value is not None}
        return await self.client.execute(command, **given)

    def print(self, answer: Any, text: str) -> None:
        """Print the daemon's answer, or what it comes to for people."""
        write(sys.stdout, json.dumps(answer, indent=2) if self.options.json else text)

    @property
    def width(self) -> int | None:
        """The width of the terminal; None where there is none."""
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else None

    def display(self) -> Display:
        """Return what shows a migration to whoever looks at the output."""
        if self.options.json:
            return NoDisplay()
        if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            return TerminalDisplay(sys.stdout)
        return LinesDisplay(sys.stdout)


async def _migrate(session: Session) -> Exit:
    options = session.options
    answer = await session.ask(
        "migrate",
        guest=options.guest,
        uri=options.uri,
        tunables=_tunables(options.tunable) or None,
        prefer=options.prefer or None,
        require=options.require or None,
        exclude=options.exclude or None,
        legacy=options.legacy,
        argv=options.argv or None,
        **_hostname(options),
    )
    if options.detach:
        session.print(
            answer,
            f"The migration of {options.guest} has begun; follow it with 'qmigctl status --watch "
            f"{options.guest}'.",
        )
        return Exit.OK
    return await _follow(session, answer["id"], "source", options.guest)


async def _save(session: Session) -> Exit:
    options = session.options
    answer = await session.ask(
        "save",
        guest=options.guest,
        file=options.file,
        format=options.format,
        live=options.live or None,
        after=options.after,
        replace=options.replace or None,
        checksum=False if options.no_checksum else None,
        tunables=_tunables(options.tunable) or None,
    )
    return await _file_work(session, answer, "source", "save")


async def _restore(session: Session) -> Exit:
    options = session.options
    answer = await session.ask(
        "restore",
        guest=options.guest,
        file=options.file,
        verify=False if options.no_verify else None,
        tunables=_tunables(options.tunable) or None,
    )
    return await _file_work(session, answer, "destination", "restore")


async def _file_work(session: Session, answer: Mapping[str, Any], role: str, what: str) -> Exit:
    """Follow a save or a restore, if that is wanted."""
    guest = session.options.guest
    if session.options.detach:
        session.print(
            answer,
            f"The {what} of {guest} has begun; follow it with 'qmigctl status --watch {guest}'.",
        )
        return Exit.OK
    return await _follow(session, answer["id"], role, guest)


async def _follow(session: Session, migration: str, role: str, guest: str) -> Exit:
    """Show a migration until it has ended; returns the exit code."""
    try:
        entry = await watch(session.reactor, session.client, migration, role, session.display())
    except CancelledError:
        again = f"Watch it with 'qmigctl status --watch {guest}'"
        stop = f", or stop it with 'qmigctl cancel {guest}'" if role == "source" else ""
        raise Ending(
            Exit.UNKNOWN,
            "interrupted",
            f"No longer watching; the migration of {guest} goes on. {again}{stop}.",
        ) from None
    except (GuestError, DeadlineError, MigrationError):
        raise Ending(
            Exit.UNKNOWN,
            "lost",
            f"The daemon does not answer any more; what became of the migration of {guest} is "
            f"not known. 'qmigctl guests' on both hosts shows where the guest is.",
        ) from None
    return _finish(session, entry)


def _finish(session: Session, entry: Mapping[str, Any]) -> Exit:
    """Print the end of a migration; returns the exit code."""
    guest, status = entry["guest"], entry["status"]
    if status == "completed":
        session.print(entry, render.summary(entry, session.width))
        return Exit.OK
    passed = entry.get("owner") == "destination"
    what = "migration"
    if "file" in entry:
        what = "save" if entry["role"] == "source" else "restore"
    reason = entry.get("error", {}).get("desc", "")
    if status == "cancelled":
        code, text = Exit.CANCELLED, f"The {what} of {guest} was cancelled."
    else:
        code = Exit.PASSED_ON if passed else Exit.FAILED
        text = f"The {what} of {guest} failed: {reason or entry['step']}"
    if session.options.json:
        session.print(entry, "")
    else:
        write(sys.stderr, f"qmigctl: {render.clean(text)}")
    return code


async def _status(session: Session) -> Exit:
    guest = session.options.guest
    entries = await session.ask("query-migrate", guest=guest)
    if not session.options.watch:
        session.print(entries, render.migrations(entries, session.width))
        return Exit.OK
    if not entries:
        raise Ending(
            Exit.REFUSED,
            "migration",
            f"There is no migration{f' of {guest}' if guest else ''} to watch.",
        )
    # the one that runs, else the latest
    entry = next((one for one in reversed(entries) if "ended" not in one), entries[-1])
    return await _follow(session, entry["id"], entry["role"], entry["guest"])


async def _features(session: Session) -> Exit:
    options = session.options
    answer = await session.ask(
        "query-features",
        guest=options.guest,
        uri=options.uri,
        argv=options.argv or None,
        **_hostname(options),
    )
    session.print(answer, render.features(answer, session.width))
    return Exit.OK


async def _guests(session: Session) -> Exit:
    answer = await session.ask("query-guests")
    session.print(answer, render.guests(answer, session.width))
    return Exit.OK


async def _tunables_of(session: Session) -> Exit:
    answer = await session.ask("query-tunables", guest=session.options.guest)
    session.print(answer, render.tunables(answer, session.width))
    return Exit.OK


async def _postcopy(session: Session) -> Exit:
    guest = session.options.guest
    answer = await session.ask("migrate-start-postcopy", guest=guest)
    session.print(answer, f"{guest} is being switched to postcopy.")
    return Exit.OK


async def _cancel(session: Session) -> Exit:
    guest = session.options.guest
    answer = await session.ask("migrate-cancel", guest=guest)
    session.print(answer, f"The migration of {guest} is being cancelled.")
    return Exit.OK


async def _set(session: Session) -> Exit:
    options = session.options
    tunables = _tunables(options.tunable)
    answer = await session.ask("migrate-set-parameters", guest=options.guest, tunables=tunables)
    session.print(answer, f"Set {', '.join(tunables)} for the migration of {options.guest}.")
    return Exit.OK


async def _guest_add(session: Session) -> Exit:
    options = session.options
    answer = await session.ask("guest-add", name=options.name, qmp=options.qmp)
    state = f"{options.name} is registered; it is {answer['state']}."
    if reason := answer.get("reason"):
        state = f"{options.name} is registered, but {answer['state']}: {reason}"
    session.print(answer, state)
    return Exit.OK


async def _guest_remove(session: Session) -> Exit:
    name = session.options.name
    answer = await session.ask("guest-remove", name=name)
    session.print(answer, f"{name} is forgotten; its process goes on.")
    return Exit.OK


#: The subcommands by their names.
RUN: Mapping[str, Callable[[Session], Awaitable[Exit]]] = {
    "migrate": _migrate,
    "save": _save,
    "restore": _restore,
    "status": _status,
    "postcopy": _postcopy,
    "cancel": _cancel,
    "set": _set,
    "guests": _guests,
    "guest-add": _guest_add,
    "guest-remove": _guest_remove,
    "features": _features,
    "tunables": _tunables_of,
}


def _hostname(options: argparse.Namespace) -> dict[str, str | None]:
    return {"tls-hostname": options.tls_hostname}


def _tunables(given: Sequence[tuple[str, str]]) -> dict[str, str]:
    tunables = dict(given)
    if len(tunables) < len(given):
        names = [name for name, _ in given]
        twice = next(name for name in names if names.count(name) > 1)
        raise Ending(Exit.REFUSED, "usage", f"The tunable '{twice}' is given twice.")
    return tunables
