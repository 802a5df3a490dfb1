"""The destination's side of RDMA: its RAM is written to by the source's device.

A thread of its own serves the connection that pairs the queue pairs (:mod:`.pairing`), and
registers RAM as the source asks for it.  What has been written there is noticed only by
:meth:`Landing.meet`, where the stream says that a pass is over.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

from qmigd.errors import GuestError
from qmigd.guests.memory.channels import Channel, Lost
from qmigd.guests.memory.pairing import (
    MAGIC,
    Hello,
    Kind,
    Message,
    Role,
    hear,
    piece_size,
    say,
)
from qmigd.guests.memory.ram import PAGE
from qmigd.guests.memory.verbs import Link

if TYPE_CHECKING:
    from qmigd.guests.memory.machine import Machine

__all__ = ["Landing"]

#: Seconds that it may be behind the stream, which the source goes on with after it.
_BEHIND = 30.0


class Landing:
    """What one source writes to."""

    def __init__(self, machine: Machine, channel: Channel) -> None:
        """:param channel: the connection that pairs the queue pairs, after its magic."""
        self._machine = machine
        self._ram = machine.ram
        self._channel = channel
        self._here = self._ram.host.ctypes.data
        self._piece = piece_size(self._ram.size)
        self._keys: dict[int, int] = {}
        self._lock = threading.Lock()  # of the link
        self._link: Link | None = None
        self._closed = False
        self._signals = 0
        self._rounds = 0
        self._saying = threading.Lock()

    def serve(self) -> None:
        """Do what the source asks for, until it has no more questions or :meth:`close`.

        :raises Lost: the connection broke, or what came over it makes no sense.
        :raises GuestError: RDMA cannot be had on this side.
        """
        try:
            self._pair()
            while (message := hear(self._channel)) is not None:
                if message.kind != Kind.REGISTER:
                    raise Lost(f"the source says {message.kind.name} where REGISTER was due")
                keys = self._register(message.one, message.two)
                self._say(Message(Kind.KEYS, keys=keys))
        except (GuestError, Lost) as error:
            if self._closed:
                return
            text = error.text if isinstance(error, GuestError) else str(error)
            with contextlib.suppress(Lost):
                self._say(Message(Kind.FAILED, text=text))
            raise

    def meet(self) -> None:
        """Return when all that the source has written in this pass is in the RAM.

        :raises Lost: it does not get there.
        """
        # The source asks for nothing before it has the answer to this, and so needs no lock.
        with self._lock:
            link = self._check()
            if link is None:
                raise Lost("the source has written something before there is a queue pair")
            if not self._signals:
                end = time.monotonic() + _BEHIND
                _, self._signals = link.wait(self._channel.sock, _BEHIND)
                if not self._signals:
                    self._check()
                    if time.monotonic() < end:
                        raise Lost("the source went away before all that it sent by RDMA was there")
                    raise Lost(f"what was sent by RDMA is not there after {_BEHIND:g} s")
            self._signals -= 1
        self._rounds += 1
        self._say(Message(Kind.ROUND, self._rounds))

    def close(self) -> None:
        """The source writes no more from here on."""
        self._closed = True
        # Whoever waits for the device has the lock until it sees that.
        self._channel.shut()
        with self._lock:
            if self._link is not None:
                self._link.close()
                self._link = None
                self._ram.unpin()

    def _say(self, message: Message) -> None:
        with self._saying:
            say(self._channel, message)

    def _pair(self) -> None:
        theirs = Hello.hear(self._channel, Role.SOURCE, MAGIC)
        identity, size = self._machine.start.uuid, self._ram.size
        if (theirs.uuid, theirs.size) != (identity, size):
            raise Lost("it is another guest's")
        with self._lock:
            self._check()
            self._link = Link(self._channel.sock.getsockname()[0].partition("%")[0])
            self._link.connect(theirs.endpoint)
            ours = Hello(Role.DESTINATION, self._link.endpoint, identity, size, self._here)
        self._channel.send([ours.encode()])

    def _register(self, first: int, count: int) -> tuple[int, ...]:
        """Return the keys of pieces of RAM."""
        if not count or (first + count - 1) * self._piece >= self._ram.size:
            raise Lost(f"there are no pieces {first} to {first + count - 1} of the RAM")
        with self._lock:
            link = self._check()
            assert link is not None
            for one in range(first, first + count):
                if one not in self._keys:
                    start = one * self._piece
                    size = min(self._piece, self._ram.size - start)
                    self._ram.pin(start // PAGE, (start + size) // PAGE)
                    self._keys[one] = link.lend(self._here + start, size)
            return tuple(self._keys[one] for one in range(first, first + count))

    def _check(self) -> Link | None:
        if self._closed:
            raise Lost("it is over")
        return self._link
