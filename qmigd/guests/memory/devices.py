"""The guest's devices: what moves at the end, when the guest stands still.

There is one, ``workload``: how far the virtual CPU has counted and written, what it is
doing, whether it runs, and where it has run before.  Its section is a structure of fixed
size, and the description at the end of the stream says what is where, as QEMU's does.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DEVICE", "MACHINE", "SIZE", "VERSION", "State", "description"]

#: The machine type, with the version of what is in here.
MACHINE = "qmigd-memory-1"
#: Name of the device's section, and its version.
DEVICE = "workload"
VERSION = 1

_PROGRAM = 256
_HISTORY = 2048
_STATE = struct.Struct(f">QQB{_PROGRAM}s{_HISTORY}s")
#: Bytes of the section's contents.
SIZE = _STATE.size
#: Places that are remembered.
_PLACES = 12


@dataclass
class State:
    """What the device's section holds.

    :ivar ticks: ticks that the virtual CPU has counted.
    :ivar written: the number of its last write.
    :ivar running: whether the guest runs, or has been stopped by somebody.
    :ivar program: what it is doing (:meth:`qmigd.guests.memory.options.Options.program`).
    :ivar history: where it has run, each with the first and the last tick there.
    """

    ticks: int
    written: int
    running: bool
    program: dict[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)

    def encode(self) -> bytes:
        """Return the section's contents."""
        return _STATE.pack(
            *(self.ticks, self.written, self.running),
            json.dumps(self.program).encode().ljust(_PROGRAM, b"\0"),
            json.dumps(self.history[-_PLACES:]).encode().ljust(_HISTORY, b"\0"),
        )

    @classmethod
    def decode(cls, data: bytes) -> State:
        """Read what :meth:`encode` has made.

        :raises ValueError: it is something else.
        """
        if len(data) != _STATE.size:
            raise ValueError(f"the device {DEVICE} has {len(data)} bytes, not {_STATE.size}")
        ticks, written, running, program, history = _STATE.unpack(data)
        try:
            return cls(
                *(ticks, written, bool(running)),
                json.loads(program.rstrip(b"\0")),
                json.loads(history.rstrip(b"\0")),
            )
        except ValueError as error:
            raise ValueError(f"the state of the device {DEVICE} is not JSON: {error}") from None


def description(page_size: int) -> bytes:
    """Return what the sections mean, the JSON at the end of the stream."""
    fields = [
        {"name": "ticks", "type": "uint64", "size": 8},
        {"name": "written", "type": "uint64", "size": 8},
        {"name": "running", "type": "bool", "size": 1},
        {"name": "program", "type": "buffer", "size": _PROGRAM},
        {"name": "history", "type": "buffer", "size": _HISTORY},
    ]
    device = {
        "name": DEVICE,
        "instance_id": 0,
        "vmsd_name": DEVICE,
        "version": VERSION,
        "fields": fields,
    }
    return json.dumps({"page_size": page_size, "devices": [device]}).encode()
