"""A relay's channels: how far each is, and what becomes of them, as the relay's owner is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qmigd.channels.pump import Pump
from qmigd.channels.tls import PeerSocket

__all__ = [
    "Channel",
    "ChannelEnded",
    "ChannelHeld",
    "ChannelLost",
    "ChannelRefused",
    "ChannelState",
    "RelayEvent",
]


@dataclass(frozen=True)
class RelayEvent:
    """What a relay tells its owner.

    :ivar channel: name and index.
    :ivar reason: for people.
    """

    channel: tuple[str, int] | None
    reason: str


@dataclass(frozen=True)
class ChannelLost(RelayEvent):
    """The peer's side of a channel broke, or could not be opened.

    The guest's side is closed when the owner returns, unless the relay is on hold.
    """


@dataclass(frozen=True)
class ChannelHeld(RelayEvent):
    """The peer has closed its side of a channel, and QEMU is not told, being on hold."""


@dataclass(frozen=True)
class ChannelEnded(RelayEvent):
    """Nothing is left of a channel: no socket and no thread."""


@dataclass(frozen=True)
class ChannelRefused(RelayEvent):
    """QEMU opened one more connection than planned, which was closed."""


@dataclass(frozen=True)
class ChannelState:
    """One channel, as far as it is.

    :ivar sent: bytes of the guest's stream to the peer.
    :ivar received: bytes of the guest's stream from the peer.
    :ivar state: ``opening``: one end is there; ``lost``: the peer's end broke and the
        guest's is held open.
    """

    name: str
    index: int
    state: Literal["opening", "open", "lost", "ended"]
    sent: int = 0
    received: int = 0


class Channel:
    """A channel whose one end is there."""

    def __init__(self, name: str, index: int, first: PeerSocket) -> None:
        self.name = name
        self.index = index
        self.first: PeerSocket | None = first
        self.pump: Pump | None = None
        self.lost = False

    @property
    def id(self) -> tuple[str, int]:
        return (self.name, self.index)

    def state(self) -> ChannelState:
        pump = self.pump
        if pump is None:
            what: Literal["opening", "open", "lost", "ended"] = "opening"
            if self.first is None:
                what = "ended"
            elif self.lost:
                what = "lost"
            return ChannelState(self.name, self.index, what)
        what = "ended" if pump.ended is not None else "lost" if pump.lost is not None else "open"
        return ChannelState(self.name, self.index, what, pump.sent, pump.received)
