"""Threads that serve several connections each, and fill buffers with what these bring.

A thread that has more than one connection seldom has to sleep, and the interpreter goes from
one thread to the next less often than with a thread for each.  It is woken up, and looks at a
connection, only when much of what it waits for is there.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable, Iterator

from qmigd.guests.memory.channels import Channel

__all__ = ["Inlet", "Server"]

#: Bytes that are worth a look at a connection, if it is to bring as many; fewer than a sender may
#: have on its way, who would wait for us otherwise (_QUEUED in channels).
_ENOUGH = 128 << 10


class Inlet:
    """A connection, and what it is to fill.

    :ivar wanted: bytes that it is still to bring for that.
    """

    def __init__(self, channel: Channel, index: int, steps: Iterator[list[memoryview]]) -> None:
        """:param index: the channel's number, for messages.
        :param steps: gives what is to be filled next, each time; nothing where the connection
            has to be left alone until :meth:`step` is called.
        """
        self.channel = channel
        self.index = index
        self.descriptor = channel.sock.fileno()
        self._steps = steps
        self._left: list[memoryview] = []
        self.wanted = 0
        self.step()

    def step(self) -> None:
        """Go on with what is to be filled next."""
        self._left = next(self._steps)
        self.wanted = sum(map(len, self._left))
        self._expect()

    def advance(self) -> bool:
        """Take what there is; returns whether more is to come.

        :raises Lost: the connection broke or ended.
        """
        self.wanted -= self.channel.fill(self._left)
        if self.wanted:
            self._expect()
        else:
            self.step()
        return self.wanted > 0

    def _expect(self) -> None:
        self.channel.expect(min(self.wanted, _ENOUGH))


class Server:
    """A thread that looks at connections when they bring something."""

    def __init__(self, name: str, look: Callable[[Server, Inlet], None]) -> None:
        """:param look: called in the thread with this, and what has brought something."""
        self._look = look
        self._inlets: dict[int, Inlet] = {}
        self._closed = False
        self._poll = select.epoll()
        self._over, self._end = os.pipe()
        self._poll.register(self._over, select.EPOLLIN)
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def watch(self, inlet: Inlet) -> None:
        """Look at it from now on."""
        self._inlets[inlet.descriptor] = inlet
        self._poll.register(inlet.descriptor, select.EPOLLIN)

    def step(self) -> None:
        """Look at all again, which were left alone: they go on with what is to be filled next."""
        for inlet in list(self._inlets.values()):
            inlet.step()
            self.watch(inlet)

    def leave(self, inlet: Inlet) -> None:
        """Leave it alone."""
        with contextlib.suppress(OSError):  # it may be closed
            self._poll.unregister(inlet.descriptor)

    def close(self) -> None:
        """End the thread, and the connections; not to be called again."""
        self._closed = True
        for inlet in list(self._inlets.values()):
            inlet.channel.shut()
        os.close(self._end)  # which the thread sees

    def _serve(self) -> None:
        while not self._closed:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._over:
                    self._look(self, self._inlets[descriptor])
        for inlet in self._inlets.values():
            inlet.channel.close()
        self._poll.close()
        os.close(self._over)
