"""Waiting until something is true, woken by events and not by the clock.

Whatever the rig hears (a line on a serial port, a QMP event, a line in a log,
the end of a process) is *news*; each piece of it wakes everybody who waits, and
they look again at what they wait for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["DEADLINE", "Hang", "ask_until", "tell", "wait_until"]

T = TypeVar("T")

#: Seconds after which a wait is taken for a hang.
DEADLINE = 60.0

_changed = threading.Condition()
_count = 0


class Hang(AssertionError):
    """What was waited for did not come."""


def tell() -> None:
    """Wake everybody who waits: something has changed."""
    global _count
    with _changed:
        _count += 1
        _changed.notify_all()


def wait_until(
    condition: Callable[[], T],
    what: str | Callable[[], str],
    *,
    deadline: float = DEADLINE,
) -> T:
    """Return what ``condition()`` returns as soon as that is true.

    :param what: what is waited for, for the failure's text; a callable is asked
        for it only then.
    :param deadline: seconds; after them there is no hope any more.
    :raises Hang: the deadline has passed.
    """
    end = time.monotonic() + deadline
    while True:
        with _changed:
            seen = _count
        result = condition()
        if result:
            return result
        if not _later_than(seen, end):
            text = what if isinstance(what, str) else what()
            raise Hang(f"Waited {deadline:g} s in vain: {text}.")


def ask_until(
    condition: Callable[[], T],
    what: str | Callable[[], str],
    *,
    deadline: float = DEADLINE,
) -> T:
    """Return what ``condition()`` returns as soon as that is true, asking again at once.

    It is for what nobody tells of; the question should be one that somebody else has
    to answer, so that this process does not just spin.

    :raises Hang: the deadline has passed.
    """
    end = time.monotonic() + deadline
    while not (result := condition()):
        if time.monotonic() > end:
            text = what if isinstance(what, str) else what()
            raise Hang(f"Asked for {deadline:g} s in vain: {text}.")
    return result


def _later_than(seen: int, end: float) -> bool:
    """Wait for news after ``seen``; false if there are none until ``end``."""
    with _changed:
        return _changed.wait_for(lambda: _count != seen, end - time.monotonic())
