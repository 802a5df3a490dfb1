"""The source's pages by RDMA: written into the destination's RAM, and nothing else is.

All other parts of the stream, pages of zero bytes among them, stay in the main channel.  What
comes first is settled at the end of each pass, where three things are waited for::

    completions     the device has an acknowledgement for every page
    signal, HOOK    the destination finds the signal behind the last page, and the mark in
                    the stream behind all that was said of this pass
    ROUND           it has seen both

So a page of the next pass is not written before what the stream said of the same page in this
one, and the stream's end is not read before the last page is there.  A page that the workload
writes while the device reads it is dirty, and goes again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qmigd.errors import GuestError
from qmigd.guests.memory.channels import Channel, Lost, Pace
from qmigd.guests.memory.pairing import Hello, Kind, Message, Role, hear, piece_size, say
from qmigd.guests.memory.progress import Progress
from qmigd.guests.memory.ram import PAGE, Pages, runs
from qmigd.guests.memory.sending import MainSender, split_zeros
from qmigd.guests.memory.verbs import DEPTH, Link, Piece
from qmigd.stream.records import HOOK

if TYPE_CHECKING:
    from qmigd.guests.memory.machine import Machine

__all__ = ["RdmaSender"]

#: Pages that are looked at, and posted, one after the other.
_BATCH = 512
#: Requests that are posted together; as many again may be under way.
_TOGETHER = DEPTH // 2
#: Seconds that an answer may take: the destination may still have to load what came before.
_ANSWER = 30.0


class RdmaSender:
    """Writes pages through a queue pair."""

    def __init__(
        self,
        machine: Machine,
        main: MainSender,
        main_channel: Channel,
        channel: Channel,
        progress: Progress,
        pace: Pace,
        interrupted: Callable[[], bool],
        check: Callable[[], None],
    ) -> None:
        """:param channel: a second connection to the destination.
        :param check: raises when the migration is to end.
        :raises GuestError: RDMA cannot be had from this side.
        """
        self._machine = machine
        self._ram = machine.ram
        self._main = main
        self._main_channel = main_channel
        self._channel = channel
        self._progress = progress
        self._pace = pace
        self._interrupted = interrupted
        self._check = check
        self._link = Link(channel.sock.getsockname()[0].partition("%")[0])
        self._here = self._ram.host.ctypes.data
        self._there: int | None = None
        self._piece = piece_size(self._ram.size)
        count = -(-self._ram.size // self._piece)
        self._local_keys: list[int | None] = [None] * count
        self._remote_keys: list[int] = [0] * count
        self._marks = 0
        self._under_way: deque[tuple[int, int]] = deque()  # a mark, and how many requests it ends
        self._rounds = 0
        self._sent, self._busy = 0, 0.0  # bytes of this pass, and seconds for them

    def batch(self, left: int) -> int:
        return _BATCH

    def send(self, pages: Pages, present: NDArray[np.bool_] | None) -> None:
        self._pace.wait(self._interrupted)
        normal, zeros = split_zeros(self._ram, pages, present)
        if len(zeros):
            self._main.send_zeros(zeros)
        if not len(normal):
            return
        then = time.monotonic()
        self._register(np.unique(normal * PAGE // self._piece))
        pieces = list(self._pieces(normal))
        for at in range(0, len(pieces), _TOGETHER):
            self._post(pieces[at : at + _TOGETHER])
        self._busy += time.monotonic() - then
        size = len(normal) * PAGE
        self._sent += size
        self._pace.spend(size)
        self._progress.normal += len(normal)
        self._progress.transferred += size

    def sync(self) -> None:
        """Wait until all is there, and the destination has seen that this pass is over."""
        if self._there is None:
            self._connect()
        then = time.monotonic()
        self._settle(0)
        self._busy += time.monotonic() - then
        self._main.rate.sent(self._sent, self._busy)
        self._sent, self._busy = 0, 0.0
        self._marks += 1
        self._link.signal(self._marks)
        self._under_way.append((self._marks, 1))
        self._settle(0)
        self._progress.transferred += self._main_channel.send([*self._main.enter(), HOOK])
        self._main.leave()
        self._rounds += 1
        if (met := self._hear(Kind.ROUND).one) != self._rounds:
            raise Lost(f"the destination has met round {met}, and this one is {self._rounds}")

    def close(self) -> None:
        """Give the device and the memory back; what is still on its way is of no use any more."""
        self._link.close()

    # -- the other side

    def _connect(self) -> None:
        """Pair the queue pairs."""
        self._channel.sock.settimeout(_ANSWER)
        identity, size = self._machine.start.uuid, self._ram.size
        ours = Hello(Role.SOURCE, self._link.endpoint, identity, size, self._here)
        self._channel.send([ours.encode()])
        theirs = Hello.hear(self._channel, Role.DESTINATION)
        if (theirs.uuid, theirs.size) != (identity, size):
            raise Lost("the destination is another guest's")
        self._link.connect(theirs.endpoint)
        self._there = theirs.address
        if self._machine.settings.on("rdma-pin-all"):
            self._register(np.arange(len(self._local_keys)))

    def _register(self, pieces: NDArray[np.int64]) -> None:
        """Register pieces of RAM on both sides, as far as they are not yet."""
        missing = np.array([one for one in pieces.tolist() if self._local_keys[one] is None], int)
        for first, end in runs(missing):
            say(self._channel, Message(Kind.REGISTER, first, end - first))
            keys = self._hear(Kind.KEYS).keys
            if len(keys) != end - first:
                raise Lost(f"the destination has {len(keys)} keys for {end - first} pieces")
            self._remote_keys[first:end] = keys
            for one in range(first, end):
                start = one * self._piece
                size = min(self._piece, self._ram.size - start)
                self._local_keys[one] = self._link.use(self._here + start, size)

    def _hear(self, kind: Kind) -> Message:
        message = hear(self._channel)
        if message is None:
            raise Lost("the destination closed the connection")
        if message.kind == Kind.FAILED:
            raise GuestError(f"the destination failed: {message.text}")
        if message.kind != kind:
            raise Lost(f"the destination says {message.kind.name} where {kind.name} was due")
        return message

    # -- requests

    def _pieces(self, pages: Pages) -> Iterator[Piece]:
        """Give what is to be written: neighbours together, as far as one key goes."""
        assert self._there is not None
        for first, end in runs(pages):
            start, stop = first * PAGE, end * PAGE
            while start < stop:
                one = start // self._piece
                key = self._local_keys[one]
                assert key is not None
                size = min(stop, (one + 1) * self._piece) - start
                yield Piece(
                    self._here + start, key, self._there + start, self._remote_keys[one], size
                )
                start += size

    def _post(self, pieces: list[Piece]) -> None:
        self._settle(DEPTH - len(pieces))
        self._marks += 1
        self._link.write(pieces, self._marks)
        self._under_way.append((self._marks, len(pieces)))

    def _settle(self, left: int) -> None:
        """Return when no more than so many requests are under way.

        :raises Lost: one has failed.
        """
        while self._under_way and sum(count for _, count in self._under_way) > left:
            done, came = self._link.wait(self._channel.sock)
            for mark in done:
                # They are done in order.
                while self._under_way and self._under_way[0][0] <= mark:
                    self._under_way.popleft()
            if not done and not came:
                # The connection has ended: by who ends the migration here, or by the destination.
                self._check()
                self._hear(Kind.FAILED)
