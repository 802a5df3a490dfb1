"""The destination's multifd channels: a thread each, which puts pages straight into the RAM.

A packet with SYNC says that what the channel brings after it belongs to a later pass.  So its
thread waits there, until all channels have come so far and the main channel's FLUSH has too.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qmigd.errors import StreamError
from qmigd.guests.memory.channels import Channel, Lost
from qmigd.guests.memory.ram import PAGE, Pages, runs
from qmigd.stream import multifd
from qmigd.stream.records import view_of

if TYPE_CHECKING:
    from qmigd.guests.memory.machine import Machine

__all__ = ["Gathering"]

#: Seconds that the slowest channel may be behind the others.
_MEET = 60.0


class Gathering:
    """All channels of one migration."""

    def __init__(self, machine: Machine, received: NDArray[np.bool_]) -> None:
        """:param received: which pages have come; kept up to date."""
        self._machine = machine
        self._ram = machine.ram
        self._received = received
        self._channels: dict[int, Channel] = {}
        self._state = threading.Condition()
        self._arrived = 0  # channels that wait at their SYNC
        self._round = 0
        self._closed = False
        self._failure: str = ""

    def take(self, channel: Channel, index: int) -> None:
        """Take what comes through a channel."""
        self._channels[index] = channel
        threading.Thread(
            target=self._run, args=(channel, index), name=f"memory-multifd-{index}", daemon=True
        ).start()

    def meet(self) -> None:
        """Wait until all that was sent before has arrived on every channel.

        :raises Lost: a channel broke.
        """
        count = self._machine.settings["multifd-channels"]
        if not self._machine.settings.on("multifd"):
            return
        with self._state:
            met = self._state.wait_for(
                lambda: self._arrived == count or self._failure or self._closed, _MEET
            )
            if self._failure:
                raise Lost(self._failure)
            if not met:
                raise Lost(f"its multifd channels did not come together within {_MEET:g} s")
            self._arrived = 0
            self._round += 1
            self._state.notify_all()

    def close(self) -> None:
        """End the threads."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        for channel in list(self._channels.values()):
            channel.shut()

    def _run(self, channel: Channel, index: int) -> None:
        try:
            self._receive(channel)
        except (Lost, StreamError) as error:
            with self._state:
                self._failure = self._failure or f"multifd channel {index}: {error}"
                self._state.notify_all()
        finally:
            channel.close()

    def _receive(self, channel: Channel) -> None:
        compression = self._machine.settings["multifd-compression"]
        unpack = None if compression == "none" else multifd.Decompressor(compression)
        blocks = {self._ram.name: self._ram.size}
        # That of a device's state, which would be refused, is shorter.
        head = memoryview(bytearray(multifd.page_packet_size(PAGE)))
        space = np.empty((multifd.PACKET_SIZE // PAGE, PAGE), np.uint8)
        there = channel.receive(head)
        while there:
            multifd.packet_size(head[: multifd.HEAD_SIZE], PAGE)
            packet = multifd.read_packet(head, PAGE, 0, blocks)
            if not isinstance(packet, multifd.PagePacket):
                raise Lost("it brings the state of a device that this guest lacks")
            if packet.compression != compression and len(packet.normal):
                raise Lost(f"its pages are compressed by {packet.compression}, not {compression}")
            normal = (packet.normal // PAGE).astype(np.int64)
            ahead = False
            if not len(normal):
                pass
            elif unpack is not None:
                data = unpack(channel.take(packet.payload), len(normal) * PAGE)
                self._put(normal, np.frombuffer(data, np.uint8).reshape(-1, PAGE))
            elif (places := self._ram.places(runs(normal))) is None:
                rows = space[: len(normal)]
                if not channel.receive(view_of(rows)):
                    raise Lost("it ended in a packet")
                self._put(normal, rows)
            elif packet.sync:
                if not channel.receive(*places):
                    raise Lost("it ended in a packet")
                self._received[normal] = True
            else:
                # The next packet as well, since each call has to wait for the interpreter's lock.
                ahead, there = True, channel.receive(*places, head)
                self._received[normal] = True
            if len(packet.zero):
                zero = (packet.zero // PAGE).astype(np.int64)
                for first, end in runs(np.sort(zero)):
                    self._ram.discard(first, end)
                self._received[zero] = True
            if packet.sync:
                self._wait()
            if not ahead:
                there = channel.receive(head)
        if not self._closed:
            raise Lost("it ended before the stream did")

    def _put(self, pages: Pages, data: NDArray[np.uint8]) -> None:
        at = 0
        for first, end in runs(pages):
            self._ram.put(first, data[at : at + end - first])
            at += end - first
        self._received[pages] = True

    def _wait(self) -> None:
        with self._state:
            round_ = self._round
            self._arrived += 1
            self._state.notify_all()
            self._state.wait_for(lambda: self._round != round_ or self._closed)
