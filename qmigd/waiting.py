"""Waiting: for several Deferreds at once, not for ever, and for what blocks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, FirstError, gatherResults
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from .errors import DeadlineError

__all__ = ["in_thread", "together", "with_deadline"]

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


def in_thread(reactor: Any, name: str, work: Callable[[], T]) -> Deferred[T]:
    """Have something that blocks done in a thread of its own; fires with what it returned.

    The thread does not keep the process from ending.

    :raises RuntimeError: the system has no thread left.
    """
    done: Deferred[T] = Deferred(lambda _: None)

    def settle(result: T | Failure) -> None:
        if not done.called:
            done.callback(result)

    def run() -> None:
        result: T | Failure
        try:
            result = work()
        except BaseException:
            result = Failure()
        reactor.callFromThread(settle, result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done
