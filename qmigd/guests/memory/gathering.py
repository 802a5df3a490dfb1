"""The destination's multifd channels: their pages go straight into the RAM.

A packet with SYNC says that what the channel brings after it belongs to a later pass.  So it is
left alone there until all channels have come so far and the main channel's FLUSH has too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qmigd.errors import StreamError
from qmigd.guests.memory.channels import Channel, Lost
from qmigd.guests.memory.inlets import Inlet, Server
from qmigd.guests.memory.ram import PAGE, runs
from qmigd.stream import multifd
from qmigd.stream.records import view_of

if TYPE_CHECKING:
    from qmigd.guests.memory.machine import Machine

__all__ = ["Gathering"]

#: Seconds that the slowest channel may be behind the others.
_MEET = 60.0

#: First page and end of pages in a row.
_Run = tuple[int, int]


class Gathering:
    """All channels of one migration."""

    def __init__(self, machine: Machine, received: NDArray[np.bool_]) -> None:
        """:param received: which pages have come; kept up to date."""
        self._machine = machine
        self._ram = machine.ram
        self._received = received
        self._servers: list[Server] = []
        self._taken = 0  # channels
        self._state = threading.Condition()
        self._arrived = 0  # channels that wait at their SYNC
        self._closed = False
        self._failure: str = ""

    def take(self, channel: Channel, index: int) -> None:
        """Take what comes through a channel."""
        inlet = Inlet(channel, index, self._steps())
        with self._state:
            if self._closed:
                channel.close()
                return
            most = self._most()
            if self._taken < most:
                self._servers.append(Server(f"memory-multifd-{self._taken}", self._look))
            self._servers[self._taken % most].watch(inlet)
            self._taken += 1

    def _most(self) -> int:
        """Return how many threads are of use: to decompress pages one for each CPU, and to take
        them as they come half as many, since the network has as much to do for them.
        """
        cpus = len(os.sched_getaffinity(0))
        compressed = self._machine.settings["multifd-compression"] != "none"
        return cpus if compressed else max(1, cpus // 2)

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
            if self._closed:
                return
            for server in self._servers:
                server.step()

    def close(self) -> None:
        """End the threads."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            self._state.notify_all()
            for server in self._servers:
                server.close()

    def _look(self, server: Server, inlet: Inlet) -> None:
        """Take what a channel has brought."""
        failure = ""
        try:
            if inlet.advance():
                return
        except (Lost, StreamError, OSError, ValueError) as error:
            failure = f"multifd channel {inlet.index}: {error}"
            inlet.channel.shut()
        server.leave(inlet)
        with self._state:
            if failure:
                self._failure = self._failure or failure
            else:
                self._arrived += 1
            self._state.notify_all()

    # -- the packets

    def _steps(self) -> Iterator[list[memoryview]]:
        """Give what a channel is to fill next, each time; nothing where all have to meet first."""
        compression = self._machine.settings["multifd-compression"]
        unpack = None if compression == "none" else multifd.Decompressor(compression)
        blocks = {self._ram.name: self._ram.size}
        # That of a device's state, which would be refused, is shorter.
        head = memoryview(bytearray(multifd.page_packet_size(PAGE)))
        space = np.empty((multifd.PACKET_SIZE // PAGE, PAGE), np.uint8)
        plain = unpack is None and self._ram.allocated
        full = multifd.FullPackets(head, PAGE, self._ram.name, self._ram.size)
        yield [head]
        while True:
            if plain and (first := full.first()) is not None:
                yield [self._ram.bytes[first : first + full.size], head]
                self._note([(first // PAGE, (first + full.size) // PAGE)])
                continue
            multifd.packet_size(head[: multifd.HEAD_SIZE], PAGE)
            packet = multifd.read_packet(head, PAGE, 0, blocks)
            if not isinstance(packet, multifd.PagePacket):
                raise Lost("it brings the state of a device that this guest lacks")
            if packet.compression != compression and len(packet.normal):
                raise Lost(f"its pages are compressed by {packet.compression}, not {compression}")
            # The next packet comes with the pages of this one, where there are any.
            then = [] if packet.sync else [head]
            if size := len(packet.normal):
                pages = runs((packet.normal // PAGE).view(np.int64))
                if unpack is not None:
                    packed = bytearray(packet.payload)
                    yield [memoryview(packed), *then]
                    data = unpack(packed, size * PAGE)
                    self._put(pages, np.frombuffer(data, np.uint8).reshape(-1, PAGE))
                elif (places := self._ram.places(pages)) is None:
                    yield [view_of(space[:size]), *then]
                    self._put(pages, space[:size])
                else:
                    yield [*places, *then]
                self._note(pages)
            if len(packet.zero):
                zero = runs(np.sort((packet.zero // PAGE).view(np.int64)))
                for first, end in zero:
                    self._ram.discard(first, end)
                self._note(zero)
            if packet.sync:
                yield []
            if packet.sync or not size:
                yield [head]

    def _put(self, pages: list[_Run], data: NDArray[np.uint8]) -> None:
        at = 0
        for first, end in pages:
            self._ram.put(first, data[at : at + end - first])
            at += end - first

    def _note(self, pages: list[_Run]) -> None:
        """These have come."""
        for first, end in pages:
            self._received[first:end] = True
