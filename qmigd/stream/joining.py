"""A migration over several channels as if it had gone through one.

What went through the main channel and what went through the ones of multifd has an order only at
certain points: there each channel has a packet with SYNC, and the main channel MULTIFD_FLUSH, or
with QEMUs and machine types before 8.1 the end of each section of RAM.  At such a point
:func:`join` puts in all pages that came before it.  Which it is shows in the first section of RAM:
it has a MULTIFD_FLUSH or none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from qmigd.errors import StreamError
from qmigd.stream.events import Event, MultifdFlush, Pages, SectionEnd, SectionStart, Zeros
from qmigd.stream.format import RAM_NAME
from qmigd.stream.multifd import DeviceState, Initial, PageData

__all__ = ["Packets", "join"]

#: What an ``Unpacker`` returns.
Packets: TypeAlias = Iterable[Initial | PageData | DeviceState]


def join(main: Iterable[Event], channels: Sequence[Packets]) -> Iterator[Event]:
    """Return the events that there would be with one channel.

    The events of pages from a channel of multifd have their offset in that channel.

    :param main: of the main channel.
    :param channels: all others, in any order.  Of each no more is taken than is needed next.
    :raises StreamError: the channels do not fit together.
    :raises ValueError: there is state of devices in a channel of multifd, which one channel
        cannot have.
    """
    waiting = [iter(channel) for channel in channels]
    inside = ""
    flushes: bool | None = None
    flushed = False
    for event in main:
        if isinstance(event, SectionStart):
            inside = event.name
        if isinstance(event, MultifdFlush):
            flushed = True
            yield from _up_to_sync(waiting, event)
            continue
        if isinstance(event, SectionEnd) and inside == RAM_NAME:
            if flushes is None:
                flushes = flushed
            if not flushes:
                yield from _up_to_sync(waiting, event)
        yield event
    for channel in waiting:
        for packet in channel:
            if isinstance(packet, PageData) and (len(packet.packet.normal) or packet.packet.sync):
                raise StreamError(packet.at, "the end of the channel", "more pages")


def _up_to_sync(
    channels: list[Iterator[Initial | PageData | DeviceState]], where: MultifdFlush | SectionEnd
) -> Iterator[Event]:
    for channel in channels:
        for packet in channel:
            if isinstance(packet, DeviceState):
                raise ValueError("State of devices that came in packets does not fit in a stream.")
            if isinstance(packet, Initial):
                continue
            yield from _events(packet)
            if packet.packet.sync:
                break
        else:
            raise StreamError(where.at, "a packet with SYNC in each channel for this", "an end")


def _events(data: PageData) -> Iterator[Event]:
    packet = data.packet
    if len(packet.normal):
        yield Pages(data.at, packet.block, packet.normal, data.data)
    if len(packet.zero):
        yield Zeros(data.at, packet.block, packet.zero)
