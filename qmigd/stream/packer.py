"""Makes the packets of a multifd channel (:mod:`qmigd.stream.packets`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qmigd.stream.format import DEFAULT_PAGE_SIZE
from qmigd.stream.names import to_bytes
from qmigd.stream.packets import (
    DEVICE,
    DEVICE_STATE,
    MAGIC,
    PACKET_SIZE,
    PAGES,
    SYNC,
    VERSION,
    page_packet_size,
)
from qmigd.stream.packing import COMPRESSIONS, Compressor
from qmigd.stream.pieces import Buffer

__all__ = ["Packer", "runs"]


class Packer:
    """Makes the packets that go through one channel.

    :ivar room: pages that fit in one packet.
    """

    def __init__(
        self, *, page_size: int = DEFAULT_PAGE_SIZE, compression: str = "none", level: int = 1
    ) -> None:
        """Both ends have to have the same of these, but for the level.

        :param page_size: the target's, in bytes.
        :param compression: a key of :data:`COMPRESSIONS`.
        """
        self.room = PACKET_SIZE // page_size
        self._page_size = page_size
        self._flags = COMPRESSIONS[compression]
        # What differs from one packet to the next, and where PAGES has it.
        self._differs = np.dtype(
            {
                "names": ["normal", "size", "number", "offsets"],
                "formats": [">u4", ">u4", ">u8", (">u8", self.room)],
                "offsets": [16, 20, 24, PAGES.size],
                "itemsize": page_packet_size(page_size),
            }
        )
        self._compress = None if compression == "none" else Compressor(compression, level)

    def pages(
        self,
        number: int,
        block: str,
        normal: ArrayLike,
        data: Sequence[Buffer],
        zero: ArrayLike = (),
        *,
        sync: bool = False,
    ) -> list[Buffer]:
        """Return a packet with pages, up to :attr:`room` of both kinds.

        :param number: of the packet, counted over all channels.
        :param block: name of the block of RAM.
        :param normal: offsets of the pages in ``data``.
        :param data: these pages one after the other, in buffers of any size; without
            compression they are handed on and not copied (see :func:`runs`).
        :param zero: offsets of pages that are zero.  QEMU knows them from 9.0 on.
        :param sync: as QEMUs before 9.0 do it; for later ones see :meth:`sync`.
        :raises ValueError: these are too many pages, or not the data of these.
        """
        first, second = np.asarray(normal, ">u8"), np.asarray(zero, ">u8")
        if len(first) + len(second) > self.room:
            raise ValueError(f"{len(first) + len(second)} pages do not fit in a packet.")
        if sum(memoryview(part).nbytes for part in data) != len(first) * self._page_size:
            raise ValueError(f"The data is not that of {len(first)} pages.")
        payload: list[Buffer] = list(data)
        size = len(first) * self._page_size
        if self._compress is not None and len(first):
            payload = [packed := self._compress(data)]
            size = len(packed)
        flags = self._flags | (SYNC if sync else 0)
        head = self._head(flags, number, self.room, len(first), len(second), size, block)
        places = first.tobytes() + second.tobytes()
        head[PAGES.size : PAGES.size + len(places)] = places
        return [head, *payload]

    def heads(self, number: int, block: str, normal: ArrayLike) -> NDArray[np.uint8]:
        """Return packets for any number of pages, without the pages: a packet in each row.

        Each has :attr:`room` pages but the last, and they go behind it as they are.

        :param number: of the first packet; the others follow.
        :param block: name of the block of RAM.
        :param normal: offsets of the pages.
        :raises ValueError: pages are compressed here.
        """
        if self._compress is not None:
            raise ValueError("Pages that are compressed need a packet each time.")
        places = np.asarray(normal)
        full, rest = divmod(len(places), self.room)
        size = self.room * self._page_size
        whole = self._head(self._flags, 0, self.room, self.room, 0, size, block)
        heads = np.empty((full + (rest > 0), len(whole)), np.uint8)
        heads[:] = np.frombuffer(whole, np.uint8)
        fields = heads.view(self._differs)[:, 0]
        fields["number"] = np.arange(number, number + len(heads))
        fields["offsets"][:full] = places[: full * self.room].reshape(full, self.room)
        if rest:
            last = fields[-1]
            last["normal"], last["size"] = rest, rest * self._page_size
            last["offsets"][:rest] = places[-rest:]
        return heads

    def sync(self, number: int) -> Buffer:
        """Return a packet that only says SYNC, as QEMU has them from 9.0 on."""
        return self._head(SYNC, number, 0, 0, 0, 0, "")

    def device_state(self, device: str, instance: int, data: Buffer) -> list[Buffer]:
        """Return a packet with all, or some, of a device's state (QEMU 10.0)."""
        name = to_bytes(device)
        head = DEVICE.pack(MAGIC, VERSION, DEVICE_STATE, name, instance, len(data))
        return [head, data] if len(data) else [head]

    def _head(
        self, flags: int, number: int, room: int, normal: int, zero: int, size: int, block: str
    ) -> bytearray:
        head = bytearray(self._differs.itemsize)
        PAGES.pack_into(
            head,
            0,
            MAGIC,
            VERSION,
            flags,
            room,
            normal,
            size,
            number,
            zero,
            to_bytes(block) if block else b"",
        )
        return head


def runs(ram: Buffer, offsets: ArrayLike, page_size: int = DEFAULT_PAGE_SIZE) -> list[memoryview]:
    """Return views of pages of RAM, one for each run of neighbours.

    :param ram: of the block.
    :param offsets: of the pages, in bytes; any order.
    """
    places = np.asarray(offsets, np.int64)
    if not len(places):
        return []
    view = memoryview(ram)
    breaks = np.flatnonzero(places[1:] != places[:-1] + page_size) + 1
    if not len(breaks):
        return [view[int(places[0]) : int(places[-1]) + page_size]]
    starts = places[np.concatenate(([0], breaks))].tolist()
    ends = places[np.concatenate((breaks - 1, [-1]))].tolist()
    return [view[start : end + page_size] for start, end in zip(starts, ends, strict=True)]
