"""What a QEMU was built with, as far as neither its capabilities nor its schema tell.

QEMU 7.2 to 11.1 list the capability ``rdma-pin-all`` and take the address ``rdma:``
whether or not they were built with RDMA.  What tells is QEMU's object model: a build with
RDMA has the type of its channel.  Two questions would answer and must not be asked:

- ``qom-list-types`` loads every module on the disk first, and a QEMU whose package was
  upgraded while it ran aborts over that (``module_load_dso`` in util/module.c);
- ``qom-list-properties`` makes an object of the type.

``device-list-properties`` only looks the type up: one that there is, but is no device, is
refused with another error class than one that there is not.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from qmigd.qmp.client import QMPClient, QMPRefusal
from qmigd.waiting import together

__all__ = ["TYPES", "types"]

#: The types that are asked for.
TYPES = ("qio-channel-rdma", "tls-creds-x509")

#: QEMU's error class for a type that it does not have.
_NOT_THERE = "DeviceNotFound"

#: What is known already, by build: each question costs a QEMU some 0.2 ms.
_known: dict[str, dict[str, bool]] = {}


async def types(client: QMPClient) -> dict[str, bool]:
    """Return which of :data:`TYPES` this QEMU has; what it does not tell is absent.

    :raises GuestError: the QEMU does not answer any more.
    """
    build = str(client.greeting["version"])
    if build not in _known:
        answers = await together([_has(client, name) for name in TYPES])
        _known[build] = {
            name: there for name, there in zip(TYPES, answers, strict=True) if there is not None
        }
    return _known[build]


def _has(client: QMPClient, name: str) -> Deferred[bool | None]:
    def refused(failure: Failure) -> bool | None:
        failure.trap(QMPRefusal)
        refusal = failure.value
        assert isinstance(refusal, QMPRefusal)
        if refusal.kind == "CommandNotFound":
            return None
        return refusal.kind != _NOT_THERE

    def answered(_: Any) -> bool | None:
        return True  # it is a device, then

    return client.execute("device-list-properties", typename=name).addCallbacks(answered, refused)
