"""The switch to postcopy, at a moment when something is left for postcopy to do.

QEMU newer than 10.0, asked for postcopy, switches even where no page of RAM is left to be
sent; an older one completes by precopy then.  A stream without a page to discard breaks
the load: the destination comes to LISTEN, notes that it listens, makes up for the
preparation that goes with the first discard, and notes down that state over the other.
It then refuses RUN ("CMD_POSTCOPY_RUN in wrong postcopy state", which nobody gets to see),
and either fails or waits for ever in ``inmigrate``.

Once the guest has been stopped, nothing makes a new page dirty, and the iteration that is
under way, up to 50 ms of it, may send the last one while the command is on its way.  So
the stream is held first: at a bandwidth of next to nothing QEMU does not go on with an
iteration, and looks every 100 ms whether it is to switch.  Then what is left stays left.
Where too little is, QEMU is left to itself for a moment: it completes, or it finds what
the guest had dirtied since it last looked for that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

from ..backend import Guest
from ..errors import GuestError
from ..interfaces import Settings

__all__ = ["BANDWIDTH", "HELD", "LEFT", "Hold", "start_postcopy"]

#: The parameter that holds the stream.
BANDWIDTH = "max-bandwidth"

#: Bytes a second at which QEMU does not go on: one each time that it looks, ten a second.
HELD = 10

#: Bytes of RAM that are enough to switch.  QEMU 11.1.3, held, still sent 32 pages each time
#: that it looked; this is twice as much.
LEFT = 64 * 4096

#: Seconds between two looks.
_POLL = 0.005


class Hold:
    """Has the stream of a guest's outgoing migration stand still, from take to drop."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._before: Settings | None = None

    async def take(self) -> None:
        """Hold it."""
        self._before, _ = await self._guest.apply(Settings({}, {BANDWIDTH: HELD}))

    async def drop(self) -> None:
        """Let it flow as before; harmless when it is not held, or the guest is gone."""
        before, self._before = self._before, None
        if before is not None:
            with suppress(GuestError):
                await self._guest.apply(before)


async def start_postcopy(
    guest: Guest, hold: Hold | None, sleep: Callable[[float], Awaitable[object]]
) -> None:
    """Switch a guest that was stopped; where it is held, returns once QEMU has done so.

    :param hold: taken; ``None``: its QEMU does not need it.
    :param sleep: for so many seconds.
    :raises GuestError: it does not switch any more: everything has been sent, or it failed.
    """
    if hold is None:
        await guest.start_postcopy()
        return
    while True:
        progress = await guest.query_migrate()
        if progress["status"] != "active":
            raise GuestError(f"the migration of guest {guest.name} is {progress['status']}")
        if progress.get("ram", {}).get("remaining", 0) >= LEFT:
            break
        await hold.drop()
        await sleep(_POLL)
        await hold.take()
    await guest.start_postcopy()
    while (await guest.query_migrate())["status"] == "active":
        await sleep(_POLL)
