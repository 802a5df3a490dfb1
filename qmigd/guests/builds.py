"""What a QEMU was built with, as far as neither its capabilities nor its schema tell.

QEMU 7.2 to 11.1 list the capability ``rdma-pin-all`` and take the address ``rdma:``
whether or not they were built with RDMA.  What tells is QEMU's object model: a build with
RDMA has the type of its channel.  Two questions would answer and must not be asked:

- ``qom-list-types`` loads every module on the disk first, and a QEMU whose package was
  upgraded while it ran aborts over that (``module_load_dso`` in util/module.c);
- ``qom-list-properties`` makes an object of the type.

``device-list-properties`` only looks the type up: one that there is, but is no device, is
refused with another error class than one that there is not.

What answers otherwise than a QEMU does is no build's, and is asked each time: that it is a
device, or that it is not there and, after the words that QEMU has for that, why not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from qmigd.interfaces import Answer, No, Yes
from qmigd.qmp.client import QMPClient, QMPRefusal
from qmigd.waiting import together

__all__ = ["TYPES", "missing", "types"]

#: The types that are asked for, and what a QEMU lacks that has not got them.
TYPES: Mapping[str, str] = {
    "qio-channel-rdma": "it was built without RDMA",
    "tls-creds-x509": "it was built without TLS",
}

#: QEMU's error class for a type that it does not have.
_NOT_THERE = "DeviceNotFound"

#: What is known already, by build: each question costs a QEMU some 0.2 ms.
_known: dict[str, dict[str, Answer]] = {}


def missing(name: str, reason: str = "") -> str:
    """Return QEMU's words for a type that it does not have, with a reason that QEMU never has.

    :param reason: half a sentence; empty: the words are QEMU's own.
    """
    return f"Device '{name}' not found" + (f": {reason}" if reason else "")


async def types(client: QMPClient) -> dict[str, Answer]:
    """Return which of :data:`TYPES` this QEMU has; what it does not tell is absent.

    :raises GuestError: the QEMU does not answer any more.
    """
    build = str(client.greeting["version"])
    if build in _known:
        return _known[build]
    answers = await together([_has(client, name) for name in TYPES])
    found = {
        name: answer for name, (answer, _) in zip(TYPES, answers, strict=True) if answer is not None
    }
    if all(built for _, built in answers):
        _known[build] = found
    return found


def _has(client: QMPClient, name: str) -> Deferred[tuple[Answer | None, bool]]:
    """Return whether it has a type, and whether that is for how it was built."""

    def refused(failure: Failure) -> tuple[Answer | None, bool]:
        failure.trap(QMPRefusal)
        refusal = failure.value
        assert isinstance(refusal, QMPRefusal)
        if refusal.kind == "CommandNotFound":
            return None, True
        if refusal.kind != _NOT_THERE:
            return Yes(), True
        reason = refusal.desc.partition(f"{missing(name)}: ")[2]
        return No(reason or TYPES[name]), not reason

    def answered(_: Any) -> tuple[Answer | None, bool]:
        return Yes(), False

    return client.execute("device-list-properties", typename=name).addCallbacks(answered, refused)
