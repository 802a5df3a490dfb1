"""An ssh tunnel in the relays' places: a private sshd, and a client for each channel."""

from __future__ import annotations

import socket

from tests.bench.course import Contestant, Place, Relays, wait_for_listener
from tests.rig.ssh import HOST, find, prepare

__all__ = ["SSH", "ssh"]

SSH = "ssh"


def ssh() -> Contestant:
    """Return it as a contestant.

    :raises Unavailable: there is no OpenSSH, and none can be fetched.
    """
    find()
    return Contestant(SSH, _start)


def _start(place: Place) -> Relays:
    directory = place.directory / "ssh"
    directory.mkdir()
    pair = prepare(directory)
    sink_path = str(place.directory / "sink")
    sink = place.sink(sink_path)
    far = place.popen(pair.server)
    wait_for_listener(far, socket.AF_INET, ("127.0.0.1", pair.port))
    near, paths = [], []
    for number in range(place.channels):
        paths.append(str(place.directory / f"source{number}"))
        near.append(place.popen([*pair.client, "-N", "-L", f"{paths[-1]}:{sink_path}", HOST]))
    for process, path in zip(near, paths, strict=True):
        wait_for_listener(process, socket.AF_UNIX, path)
    return Relays(paths, (*near, far), sink)
