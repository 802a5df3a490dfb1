"""Waiting for Deferreds: for several at once, and not for ever."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, FirstError, gatherResults
from twisted.internet.interfaces import IReactorTime

from .errors import DeadlineError

__all__ = ["together", "with_deadline"]

T = TypeVar("T")


async def together(waiting: Iterable[Deferred[Any]]) -> list[Any]:
    """Wait for all of them; returns their results in their order.

    Raises the error of the first one that fails, as it is.
    """
    try:
        return await gatherResults(waiting, consumeErrors=True)
    except FirstError as first:
        error = first.subFailure.value
        assert isinstance(error, Exception)
        raise error from None


async def with_deadline(clock: IReactorTime, waiting: Deferred[T], seconds: float, what: str) -> T:
    """Wait, but not for longer than ``seconds``.

    :raises DeadlineError: ``what`` did not come in time; ``waiting`` was cancelled.
    """
    late = False

    def expire() -> None:
        nonlocal late
        late = True
        waiting.cancel()

    call = clock.callLater(seconds, expire)
    try:
        return await waiting
    except Exception:
        if late:
            raise DeadlineError(f"{what} did not come within {seconds:g} seconds") from None
        raise
    finally:
        if call.active():
            call.cancel()
