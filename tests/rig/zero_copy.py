"""Measurements of zero copy that a daemon is given, in place of its own."""

from __future__ import annotations

from pathlib import Path

from qmigd.channels.calibration import DIRECTIONS, Calibration, Cost
from qmigd.daemon.zero_copy import write
from qmigd.interfaces import MOVERS
from tests.rig.daemons import Daemon

__all__ = ["measured", "remember"]


def measured(**ratios: float) -> Calibration:
    """Return a measurement in which each of these movers costs so much of what a copy does.

    The others are missing from the kernel.
    """
    costs = {
        name: Cost(0.5 * ratio, ratio, ratio) for name, ratio in {"copy": 1.0, **ratios}.items()
    }
    lacking = {name: "not here" for name in MOVERS if name not in costs}
    return Calibration(dict.fromkeys(DIRECTIONS, costs), dict.fromkeys(DIRECTIONS, lacking))


def remember(daemon: Daemon, found: Calibration) -> None:
    """Have a daemon that was not started yet find a measurement of this kernel."""
    state = Path(daemon.config["daemon"]["state-dir"])
    state.mkdir(mode=0o700, exist_ok=True)
    write(state / "zero-copy.json", found)
