"""qmigd as a contestant: :mod:`tests.bench.sides` in the places of the two relays."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial

from tests.bench.course import Contestant, Place, Relays, line
from tests.bench.sides import ADDRESS, How
from tests.rig.certificates import Authority

__all__ = ["How", "contestant"]

_SIDES = "sides.py"


def contestant(name: str, how: How) -> Contestant:
    """Return qmigd as a contestant."""
    return Contestant(name, partial(_start, how))


def _start(how: How, place: Place) -> Relays:
    directory, handed = str(place.directory), how.path == "handover"
    Authority(directory).host(ADDRESS)
    words = (directory, str(place.channels), json.dumps(asdict(how)))
    sink_path = str(place.directory / "sink")
    if handed:
        sink = place.sink(sink_path, handed=True)
    far = place.spawn(_SIDES, "destination", *words, sink_path)
    port, path = line(far).split()
    if not handed:
        sink = place.sink(path)
    near = place.spawn(_SIDES, "origin", *words, port)
    return Relays([line(near)], (near, far), sink, handed)
