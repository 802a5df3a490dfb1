"""What is left to do for a guest whose QEMU is not done when its migration is over for qmigd.

QEMU may hang for minutes in a connection that is no more, or before a disk that does not
answer; it is waited for then, with its guest in hand (:func:`finish_late`).

Or it goes on, because it is in postcopy.  Such a guest is the destination's, and the two
QEMUs may still get to the end: by themselves, or because somebody has them recover
(``migrate-recover``, and ``migrate`` with ``resume``).  Until then they refuse other
capabilities, and need those that they have.  So what was set is put back once QEMU is done
(:func:`part_late`).  Meanwhile no other migration gets the guest, but its QMP socket is free
for whoever sees to it: qmigd connects for a look at a time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

from twisted.internet.task import deferLater
from twisted.logger import Logger

from ..errors import DeadlineError, GuestBusy, QmigdError
from .move import Move

__all__ = ["finish_late", "goes_on", "part_late"]

log = Logger()

#: Seconds between two looks at a QEMU that goes on.
_LOOK_LATE = 1.0


async def finish_late(move: Move, bring_back: Callable[[], Awaitable[str]]) -> None:
    """For as long as it takes, where QEMU was not done in time.  Never raises.

    The guest remains in the migration's hands until then: QEMU would not begin another.

    :param bring_back: returns what has become of the guest; tried again after each
        ``DeadlineError``.
    """
    step = ""
    try:
        while not step:
            await move.rest()
            with suppress(DeadlineError):
                step = await bring_back()
    except QmigdError as error:
        step = f"the guest's process could not be asked: {error.text}"
    except Exception:
        log.failure("late end of {migration}", migration=move.record.name)
        step = "qmigd itself failed; its log says where"
    log.info("guest {guest}: {step}", guest=move.record.guest, step=step)
    move.record.update(step=step)


def goes_on(move: Move) -> bool:
    """Whether QEMU, at the last look, was in a postcopy that has not ended."""
    held = move.guest is not None and bool(move.saved)
    return held and move.qemu_status.startswith("postcopy")


async def part_late(move: Move) -> None:
    """Leave QEMU as it was before the migration, once it is done.  Never raises."""
    log.info(
        "guest {guest}: its process is {status}; what was set for the migration is put back when "
        "that has ended",
        guest=move.record.guest,
        status=move.qemu_status,
    )
    try:
        while not await _parted(move):
            await deferLater(move.services.reactor, _LOOK_LATE)
    except QmigdError as error:
        log.info("guest {guest}: {error}", guest=move.record.guest, error=error.text)
    except Exception:
        log.failure("late end of {migration}", migration=move.record.name)
    move.leave()


async def _parted(move: Move) -> bool:
    """Have a look; returns whether QEMU is done.

    :raises QmigdError: it is gone.
    """
    guest = move.guest
    assert guest is not None
    guest.detach()
    # Somebody else may have the socket just now.
    with suppress(DeadlineError, GuestBusy):
        await guest.attach()
        if await move.is_over():
            await move.put_back()
            return True
    guest.detach()
    return False
