"""Loads a stream: pages into the RAM, what the devices held into the guest.

In precopy pages are just put into the RAM.  From LISTEN on the guest may run, and a page
that it touches before it has come is a fault (:mod:`qmigd.guests.memory.faults`); then
pages are put in by the kernel, which wakes who waits.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qmigd.errors import StreamError
from qmigd.guests.memory.channels import Channel, Lost
from qmigd.guests.memory.devices import DEVICE, MACHINE, SIZE, State
from qmigd.guests.memory.faults import Faults
from qmigd.guests.memory.gathering import Gathering
from qmigd.guests.memory.landing import Landing
from qmigd.guests.memory.progress import Progress
from qmigd.guests.memory.ram import PAGE, runs
from qmigd.stream import events, return_path
from qmigd.stream.format import CommandNumber, RamBlock
from qmigd.stream.postcopy import read_discard
from qmigd.stream.reader import Reader

if TYPE_CHECKING:
    from qmigd.guests.memory.machine import Machine

__all__ = ["Receiver", "Torn"]

#: Bytes that are received at one time: so many that Python takes little time beside the
#: kernel, and no more than the CPU's cache has room for.
_RECEIVE = 2 << 20
#: The same in postcopy.
_POSTCOPY = 128 << 10
#: Seconds that the last page on the preempt channel may be behind the main channel's.
_OVERTAKEN = 30.0


class Torn(Exception):
    """The stream ended in postcopy: the guest is here, and pages of it are not."""


class Receiver:
    """Loads one stream."""

    def __init__(self, machine: Machine, progress: Progress) -> None:
        self._machine = machine
        self._ram = machine.ram
        self._progress = progress
        self._main: Channel | None = None
        self._speaks = False  # whether there is a return path
        self._saying = threading.Lock()
        self._device = bytearray()
        self._name = ""
        self._described = False
        self._postcopy = False
        self._received = np.zeros(machine.ram.pages, np.bool_)
        self._faults: Faults | None = None
        self._listening = threading.Event()  # the faults are there, or will never be
        self._overtaken = threading.Event()  # nothing more comes over the preempt channel
        self._gathering = Gathering(machine, self._received)
        self._landing: Landing | None = None
        self._reader = Reader(sizes={(DEVICE, 0): SIZE})

    @property
    def latencies(self) -> list[float]:
        """Seconds that the guest has waited for each page that it asked for."""
        return list(self._faults.latencies) if self._faults is not None else []

    def give_up(self) -> None:
        """Let go of a guest that has ended."""
        if self._faults is not None:
            self._faults.give_up()

    def close(self) -> None:
        """End what waits."""
        self._listening.set()
        self._gathering.close()
        if self._landing is not None:
            self._landing.close()
        if self._faults is not None:
            self._faults.close()

    # -- the main channel

    def load(self, channel: Channel, begun: bytes = b"") -> None:
        """Load it all, and let the guest run if it is to.

        :param begun: what was taken of it already.
        :raises StreamError: it is no stream.
        :raises Lost: it ended too early.
        :raises Torn: it ended too early, in postcopy.
        :raises ValueError: it is that of another guest.
        """
        self._main = channel
        self._progress.become("active")
        data = memoryview(bytearray(_RECEIVE))
        try:
            for event in self._reader.feed(begun):
                self._take(event)
            while not self._whole():
                if self._faults is None:
                    count = channel.receive_much(data)
                else:
                    # Less at a time: others want the interpreter meanwhile.
                    count = channel.receive_some(data[:_POSTCOPY])
                if not count:
                    if self._reader.ended:
                        break
                    for event in self._reader.close():
                        self._take(event)
                    break
                for event in self._reader.feed(data[:count]):
                    self._take(event)
        except (Lost, StreamError) as error:
            if self._postcopy:
                raise Torn(str(error)) from None
            self._say(return_path.Shut(1))
            raise
        except ValueError:
            self._say(return_path.Shut(1))
            raise
        if self._faults is not None:
            if self._machine.settings.on("postcopy-preempt") and not self._overtaken.wait(
                _OVERTAKEN
            ):
                raise Torn("the channel for pages that are waited for did not end")
            self._faults.finish()
        self._gathering.close()
        if self._landing is not None:
            self._landing.close()
        if not self._postcopy:
            self._machine.loaded()
        self._say(return_path.Shut(0))
        self._progress.become("completed")

    def _whole(self) -> bool:
        return self._reader.ended and (self._described or self._postcopy)

    def _take(self, event: events.Event) -> None:
        match event:
            case events.Pages(offsets=offsets, data=pages):
                self._put(offsets, pages)
            case events.Zeros(offsets=offsets, fill=fill):
                self._put_zeros(offsets, fill)
            case events.SectionStart(name=name):
                self._name = name
                self._device.clear()
            case events.DeviceData(data=piece):
                self._device += piece
            case events.SectionEnd():
                self._section_over()
            case events.Configuration(machine=machine):
                if machine != MACHINE:
                    raise ValueError(
                        f"Machine type received is '{machine}' and local is '{MACHINE}'"
                    )
            case events.RamBlocks(blocks=blocks):
                self._check_blocks(blocks)
            case events.MultifdFlush():
                self._gathering.meet()
            case events.Hook() if self._landing is not None:
                self._landing.meet()
            case events.Command(number=number, data=contents):
                self._command(number, contents)
            case events.Description():
                self._described = True
            case events.Xbzrle() | events.Compressed() | events.Hook():
                raise ValueError(f"{type(event).__name__} is nothing that a memory guest takes")

    def _check_blocks(self, blocks: tuple[RamBlock, ...]) -> None:
        wanted = [(self._ram.name, self._ram.size)]
        if (found := [(block.name, block.length) for block in blocks]) != wanted:
            raise ValueError(f"the guest has the RAM blocks {found}, and this one {wanted}")

    def _section_over(self) -> None:
        if self._name == DEVICE:
            self._machine.load(State.decode(bytes(self._device)))
        elif self._device:
            raise ValueError(f"the guest has a device {self._name}, which this one lacks")
        self._name = ""

    # -- pages

    def _put(self, offsets: NDArray[np.uint64], data: NDArray[np.uint8]) -> None:
        pages = (offsets // PAGE).astype(np.int64)
        if self._faults is not None:
            self._faults.place(pages, data)
            return
        at = 0
        for first, end in runs(pages):
            self._ram.put(first, data[at : at + end - first])
            at += end - first
        self._received[pages] = True

    def _put_zeros(self, offsets: NDArray[np.uint64], fill: int) -> None:
        pages = (offsets // PAGE).astype(np.int64)
        if fill:
            data = np.full((len(pages), PAGE), fill, np.uint8)
            self._put(offsets, data)
        elif self._faults is not None:
            self._faults.place(pages, None)
        else:
            # A hole reads as zero bytes, and takes no memory.
            for first, end in runs(np.sort(pages)):
                self._ram.discard(first, end)
            self._received[pages] = True

    # -- commands

    def _command(self, number: int, data: bytes) -> None:
        match number:
            case CommandNumber.OPEN_RETURN_PATH:
                self._speaks = True
            case CommandNumber.PING:
                self._say(return_path.Pong(int.from_bytes(data, "big")))
            case CommandNumber.POSTCOPY_ADVISE:
                if not self._machine.settings.on("postcopy-ram"):
                    raise ValueError("the source has postcopy-ram switched on, and this side not")
            case CommandNumber.POSTCOPY_RAM_DISCARD:
                self._discard(data)
            case CommandNumber.POSTCOPY_LISTEN:
                self._gathering.close()
                for first, end in runs(np.flatnonzero(~self._received)):
                    self._ram.discard(first, end)  # it may have been allocated beforehand
                self._faults = Faults(self._ram, self._received, self._ask)
                self._listening.set()
            case CommandNumber.POSTCOPY_RUN:
                self._postcopy = True
                self._progress.become("postcopy-active")
                self._machine.loaded()
            case CommandNumber.SWITCHOVER_START:
                pass
            case _:
                raise ValueError(f"command {number} is nothing that a memory guest knows")

    def _discard(self, data: bytes) -> None:
        discard = read_discard(data)
        if discard.block != self._ram.name:
            raise ValueError(f"there is no block {discard.block} to discard parts of")
        for start, length in discard.ranges.tolist():
            if start % PAGE or length % PAGE or start + length > self._ram.size:
                raise ValueError(f"{length} bytes from {start:#x} are no pages of the RAM")
            first, end = start // PAGE, (start + length) // PAGE
            self._ram.discard(first, end)
            self._received[first:end] = False

    def _ask(self, page: int) -> None:
        """The guest waits for a page."""
        self._say(return_path.PageRequest(self._ram.name, page * PAGE, PAGE))

    def _say(self, message: return_path.Message) -> None:
        """Say something on the return path; a broken one is noticed by who reads."""
        if not self._speaks or self._main is None:
            return
        with self._saying:
            try:
                self._main.send([return_path.encode(message)])
            except Lost:
                return

    # -- further channels, each with a thread of its own

    def take_multifd(self, channel: Channel, index: int) -> None:
        """Take the pages of a multifd channel from here on."""
        self._gathering.take(channel, index)

    def take_rdma(self, channel: Channel) -> Landing:
        """Return what takes pages that are written by RDMA, to be served."""
        self._landing = Landing(self._machine, channel)
        return self._landing

    def take_preempt(self, channel: Channel) -> None:
        """Take the pages that were waited for."""
        reader = Reader(
            header=False, blocks=(RamBlock(self._ram.name, self._ram.size),), records_only=True
        )
        data = memoryview(bytearray(_RECEIVE))
        try:
            while not reader.ended and (count := channel.receive_some(data)):
                for event in reader.feed(data[:count]):
                    if isinstance(event, events.Pages | events.Zeros):
                        self._wait_for_faults()
                    self._take(event)
            if not reader.ended:
                raise Lost("the channel ended too early")
            self._overtaken.set()
        except (Lost, StreamError, ValueError):
            channel.shut()
            if self._main is not None:
                self._main.shut()

    def _wait_for_faults(self) -> None:
        """Pages here may overtake LISTEN, in another thread."""
        self._listening.wait()
        if self._faults is None:
            raise Lost("the stream ended before it came to postcopy")
