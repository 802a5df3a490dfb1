"""auto-converge: a guest that dirties its RAM faster than it can be sent is slowed down."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qmigd.guests.memory.machine import Machine

__all__ = ["Throttle"]

#: Passes in a row in which too much was dirtied before something is done (QEMU has the same).
_PASSES = 2


class Throttle:
    """Looks at each pass.

    :ivar per_cent: of its time that the virtual CPU does without.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._many = 0
        self.per_cent = 0

    def passed(self, dirtied: int, sent: int) -> None:
        """A pass is over.

        :param dirtied: bytes that were dirtied in it.
        :param sent: bytes that were sent.
        """
        settings = self._machine.settings
        if not settings.on("auto-converge"):
            return
        if dirtied * 100 <= sent * settings["throttle-trigger-threshold"]:
            return
        self._many += 1
        if self._many < _PASSES:
            return
        self._many = 0
        if not self.per_cent:
            self.per_cent = settings["cpu-throttle-initial"]
        else:
            self.per_cent += settings["cpu-throttle-increment"]
        self.per_cent = min(self.per_cent, settings["max-cpu-throttle"])
        self._machine.throttle(self.per_cent)
