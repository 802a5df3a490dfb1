"""What moves a stream's bytes in this host's relays: configured, remembered, or measured.

Measuring takes less than a second of CPU time, once for each kernel and kind of CPU: it is
done in a thread beside the daemon, nothing waits for it, and until it is done relays
copy.  What was measured stays in ``STATE-DIR/zero-copy.json``; a file that cannot be read, or is
about another kernel or CPU, counts for nothing and is replaced.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThreadPool
from twisted.logger import Logger

from ..channels.calibration import DIRECTIONS, Calibration, Cancelled, Cost, Measuring
from ..channels.movers.probing import Direction, obstacle
from ..interfaces import COPY, KERNEL, MOVERS, POLICY, No, ZeroCopy
from .config_values import MEASURE, OFF

__all__ = ["Movers", "decide", "identity", "read", "write"]

log = Logger()

#: Changes when what was measured before does not hold any more for the movers of today.
_FORMAT = 1


class Movers:
    """Finds out what moves bytes at the least cost."""

    def __init__(
        self,
        reactor: Any,
        state_dir: Path,
        wanted: str,
        learn: Callable[[ZeroCopy], None],
    ) -> None:
        """
        :param wanted: ``zero-copy`` of the configuration.
        :param learn: told of the answer, more than once if it changes.
        """
        self._reactor = reactor
        self._path = state_dir / "zero-copy.json"
        self._wanted = wanted
        self._learn = learn
        self._measuring: Measuring | None = None
        self._done: Deferred[None] | None = None

    def start(self) -> None:
        """Tell what is known, and begin to measure if that is nothing."""
        if self._wanted == OFF:
            self._learn(
                ZeroCopy(obstacle=No('it is switched off: zero-copy = "off" in [daemon]', POLICY))
            )
        elif self._wanted != MEASURE:
            self._learn(_forced(self._wanted))
        elif (known := read(self._path)) is not None:
            self._told(known)
        else:
            self._measuring = Measuring()
            self._done = Deferred.fromCoroutine(self._measure(self._measuring))

    def stop(self) -> Deferred[None]:
        """Measure no more; fires when nothing is left of it."""
        if self._measuring is not None:
            self._measuring.cancel()
        done: Deferred[None] = Deferred()
        if self._done is None:
            done.callback(None)
        else:
            self._done.chainDeferred(done)
        return done

    async def _measure(self, measuring: Measuring) -> None:
        try:
            found = await deferToThreadPool(
                self._reactor, self._reactor.getThreadPool(), measuring.measure
            )
        except Cancelled:
            return
        except OSError as error:
            log.warn("what zero copy would gain could not be measured: {error}", error=str(error))
            self._learn(ZeroCopy(obstacle=No(f"what it gains could not be measured: {error}")))
            return
        except Exception:
            log.failure("measuring what zero copy would gain")
            return
        finally:
            self._measuring = self._done = None
        try:
            write(self._path, found)
        except OSError as error:
            log.warn(
                "{path} cannot be written, so that the next start measures again: {error}",
                path=str(self._path),
                error=error.strerror,
            )
        self._told(found)

    def _told(self, found: Calibration) -> None:
        decided = decide(found)
        log.info(
            "a relay sends by {send} ({sending}) and receives by {receive} ({receiving})",
            send=decided.send,
            sending=found.says("send"),
            receive=decided.receive,
            receiving=found.says("receive"),
        )
        self._learn(decided)


def decide(found: Calibration) -> ZeroCopy:
    """What follows from a measurement."""
    return ZeroCopy(
        found.best("send"),
        found.best("receive"),
        No(
            "a copy is cheaper on this kernel "
            f"(to send {found.says('send')}; to receive {found.says('receive')})",
            KERNEL,
        ),
    )


def _forced(mover: str) -> ZeroCopy:
    """What follows from a mover in the configuration, as far as the kernel has it."""
    obstacles: dict[Direction, str | None] = {
        direction: obstacle(mover, direction) for direction in DIRECTIONS
    }
    takes = {direction: COPY if why else mover for direction, why in obstacles.items()}
    why = next(filter(None, obstacles.values()), "")
    return ZeroCopy(
        takes["send"], takes["receive"], No(f"{mover} is configured, but {why}", KERNEL)
    )


def identity() -> dict[str, str]:
    """What a measurement holds for: the kernel, its build included, and the kind of CPU."""
    system = os.uname()
    return {"kernel": f"{system.release} {system.version}", "cpu": _cpu()}


def _cpu() -> str:
    # On some architectures /proc/cpuinfo names no model.
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def write(path: Path, found: Calibration) -> None:
    """Keep a measurement of this host.

    :raises OSError: it cannot be written.
    """
    document = {"format": _FORMAT, **identity(), **asdict(found)}
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def read(path: Path) -> Calibration | None:
    """Return what is kept, if there is something and it is about this host."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if {key: document[key] for key in ("format", *identity())} != {
            "format": _FORMAT,
            **identity(),
        }:
            log.info("{path} is about another kernel or CPU: measuring anew", path=str(path))
            return None
        return Calibration(
            {direction: _costs(document["costs"][direction]) for direction in DIRECTIONS},
            {direction: _obstacles(document["obstacles"][direction]) for direction in DIRECTIONS},
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        log.warn("{path} cannot be read: measuring anew", path=str(path))
        return None


def _costs(found: Mapping[str, Any]) -> dict[str, Cost]:
    """:raises ValueError: these are no costs; also KeyError, TypeError, AttributeError."""
    costs = {
        name: Cost(float(one["cpu"]), float(one["ratio"]), float(one["quartile"]))
        for name, one in found.items()
    }
    numbers = [number for cost in costs.values() for number in astuple(cost)]
    if COPY not in costs or not costs.keys() <= {*MOVERS}:
        raise ValueError("the movers are not these")
    if not all(math.isfinite(number) and number > 0 for number in numbers):
        raise ValueError("a cost is no number of seconds")
    return costs


def _obstacles(found: Mapping[str, Any]) -> dict[str, str]:
    if not all(isinstance(reason, str) for reason in found.values()):
        raise ValueError("a reason is no text")
    return dict(found)
