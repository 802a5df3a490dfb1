"""What a handshake tells its owner.

A peer's JSON is handed over as it came: an object within the limits of the
wire, its keys not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qmigd.wire.role import RoleHeader

__all__ = [
    "Asked",
    "CancelAsked",
    "ChannelAttached",
    "ChannelOpened",
    "Event",
    "Failed",
    "FeatureSaid",
    "Greeted",
    "GuestDescribed",
    "Heartbeat",
    "Outcome",
    "PrepareAsked",
    "Prepared",
    "Released",
    "Secured",
    "Selected",
    "Started",
    "StatusSaid",
]


@dataclass(frozen=True)
class Event:
    """The root of all events."""


@dataclass(frozen=True)
class Failed(Event):
    """It is over.  Send what there is to send, then close the connection.

    :ivar code: what a program reads (docs/protocol, "Errors").
    :ivar text: what a person reads.
    :ivar remote: the peer said so in an ERROR; else this side found it.
    """

    code: str
    text: str
    remote: bool


@dataclass(frozen=True)
class Greeted(Event):
    """On the source: the destination's versions and the features it offers.

    Features that this side has never heard of are among them.
    """

    versions: tuple[int, ...]
    features: tuple[str, ...]


@dataclass(frozen=True)
class Secured(Event):
    """On the source: TLS is there, and nobody has changed what was said before it."""


@dataclass(frozen=True)
class Selected(Event):
    """On the destination: the version chosen, and the features out of the offer."""

    version: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class GuestDescribed(Event):
    """On the destination: the source's description of its guest."""

    description: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class FeatureSaid(Event):
    """The peer's parameters for a selected feature, once for each.

    :ivar withdrawn: why the peer goes on without the feature; ``None`` if it does not.
    """

    name: str
    parameters: Mapping[str, Any]

    @property
    def withdrawn(self) -> str | None:
        return self.parameters.get("withdrawn")


@dataclass(frozen=True)
class Asked(Event):
    """On the destination: what became of a guest?  Answer with ``outcome()`` or ``error()``."""

    body: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class PrepareAsked(Event):
    """On the destination: answer with ``prepared()``, or with ``error()``."""

    body: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Prepared(Event):
    """On the source: the destination is ready; ``start()`` is next."""

    # Not shown: the secret is in it.
    body: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Started(Event):
    """On the destination: START came.

    :ivar baseline: the stream follows on this very connection; the handshake
        is done with it.
    """

    baseline: bool


@dataclass(frozen=True)
class ChannelOpened(Event):
    """On the destination: the connection is a payload channel, if its proof holds.

    Answer with ``attached()`` or with ``error()``.
    """

    role: RoleHeader


@dataclass(frozen=True)
class ChannelAttached(Event):
    """On the side that opened a payload channel: from here it carries payload."""


@dataclass(frozen=True)
class Heartbeat(Event):
    """The peer lives."""


@dataclass(frozen=True)
class StatusSaid(Event):
    """How the peer sees the migration."""

    body: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class CancelAsked(Event):
    """On the destination: the source wants an end of it."""

    reason: str


@dataclass(frozen=True)
class Released(Event):
    """On the destination: the guest is this side's from now on.  Comes once."""

    body: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Outcome(Event):
    """On the source: how it ended; the destination's last message."""

    body: Mapping[str, Any] = field(repr=False)
