"""Watching a migration: the loop that asks, and the two ways of showing what it learns.

The daemon's events say *when* something changed; what it changed to is always
asked for with ``query-migrate``, twice a second at least.  So a lost event
costs half a second, and there is one place that reads an entry.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

from ..errors import MigrationError
from ..qmp.client import QMPClient
from .render import clean, details

__all__ = ["Display", "LinesDisplay", "NoDisplay", "TerminalDisplay", "watch"]

#: Seconds between two looks at a migration in which no event comes.
_INTERVAL = 0.5
#: Seconds after which plain output says something although nothing has changed.
_SILENCE = 10.0
#: Columns of the bar.
_BAR = 50

_Entry = Mapping[str, Any]


class Display(Protocol):
    """Shows a migration while it runs."""

    def show(self, entry: _Entry) -> None:
        """Show the entry of ``query-migrate``."""

    def close(self) -> None:
        """Leave the terminal in good order."""


async def watch(
    clock: IReactorTime, client: QMPClient, migration: str, role: str | None, display: Display
) -> dict[str, Any]:
    """Follow a migration to its end; returns its last entry.

    :param role: ``"source"`` or ``"destination"``, for the case that one daemon is
        both; ``None``: whichever there is.
    :raises GuestGone: the connection to the daemon was lost.
    """
    wake = _Wake(clock)

    def event(name: str, data: dict[str, Any], at: float) -> None:
        if data.get("id") == migration:
            wake.now()

    unsubscribe = client.subscribe(event)
    try:
        while True:
            entries = await client.execute("query-migrate", id=migration)
            entry = next((one for one in entries if role in (None, one["role"])), None)
            if entry is None:
                raise MigrationError(f"The daemon knows nothing of migration {migration} any more.")
            display.show(entry)
            if "ended" in entry:
                return dict(entry)
            await wake.wait(_INTERVAL)
    finally:
        unsubscribe()
        display.close()


class _Wake:
    """A nap that can be cut short, also before it begins."""

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self._early = False
        self._waiting: Deferred[None] | None = None

    def now(self) -> None:
        if self._waiting is None:
            self._early = True
        else:
            waiting, self._waiting = self._waiting, None
            waiting.callback(None)

    async def wait(self, seconds: float) -> None:
        if self._early:
            self._early = False
            return
        self._waiting = Deferred()
        timer = self._clock.callLater(seconds, self.now)
        try:
            await self._waiting
        finally:
            self._waiting = None
            if timer.active():
                timer.cancel()


class NoDisplay:
    """For ``--json``: nothing until the end."""

    def show(self, entry: _Entry) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing."""


class LinesDisplay:
    """For anything that is no terminal: a line for each change, and now and then one between."""

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._last: tuple[object, ...] = ()
        self._said = 0.0

    def show(self, entry: _Entry) -> None:
        now = self._clock()
        ram = entry.get("ram", {})
        state = (entry["status"], entry["step"], ram.get("dirty-sync-count"))
        if state == self._last and now - self._said < _SILENCE:
            return
        self._last, self._said = state, now
        words = [f"{entry['guest']}: {entry['status']}, {entry['step']}", *details(entry)]
        self._out.write(clean("; ".join(words)) + "\n")
        self._out.flush()

    def close(self) -> None:
        """Do nothing."""


class TerminalDisplay:
    """For a terminal: a bar for the RAM that the destination has, and what goes on."""

    def __init__(self, out: TextIO) -> None:
        # only here: it takes longer to load than most commands take to run
        from rich.console import Console
        from rich.live import Live

        # No automatic refresh: that would be a thread, beside a reactor.
        self._live = Live(
            console=Console(file=out, force_terminal=True),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def show(self, entry: _Entry) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        ram = entry.get("ram", {})
        total = ram.get("total", 0)
        done = total - ram.get("remaining", total)
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=max(total, 1), completed=done, width=_BAR),
            Text(f"{100 * done / total:3.0f}%" if total else ""),
        )
        arrow = "to" if entry["role"] == "source" else "from"
        self._live.start()
        self._live.update(
            Group(
                Text(clean(f"{entry['guest']} {arrow} {entry['peer']}: {entry['step']}"), "bold"),
                bar,
                Text(clean(", ".join(details(entry)))),
            ),
            refresh=True,
        )

    def close(self) -> None:
        self._live.stop()
