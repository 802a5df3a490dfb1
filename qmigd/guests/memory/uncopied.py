"""Sends without a copy: the kernel takes the pages from where they are (MSG_ZEROCOPY).

It says later that it is done with them.  What a page holds goes out as it is then: if that was
written after it was looked for, it is dirty and goes again.
"""

from __future__ import annotations

import errno
import select
from collections.abc import Sequence
from typing import Any

from qmigd.guests.memory.channels import Channel, Lost, strip
from qmigd.transports.zero_copy import MSG_ZEROCOPY, completions, enable

__all__ = ["ZeroCopy"]

#: Milliseconds after which one looks whether the channel is still wanted.
_LOOK = 1000


class ZeroCopy:
    """Sends on one channel without a copy, as far as the kernel goes along.

    :ivar missed: sends that it copied all the same.
    """

    def __init__(self, channel: Channel) -> None:
        """:raises OSError: this socket cannot do it."""
        self._channel = channel
        enable(channel.sock)
        self._errors = select.poll()
        self._errors.register(channel.sock, 0)
        self._begun = 0
        self._done = 0
        self.missed = 0

    def send(self, buffers: Sequence[Any]) -> None:
        """Send them; they are in use until :meth:`settle`.

        :raises Lost: the connection broke.
        """
        left = [memoryview(buffer).cast("B") for buffer in buffers]
        sock = self._channel.sock
        while left:
            try:
                count = sock.sendmsg(left, [], MSG_ZEROCOPY)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise Lost(error.strerror or str(error)) from None
                # So much is locked already that the limit is reached: wait, or copy.
                if self._done < self._begun:
                    self._reap()
                    continue
                self._channel.send(left)
                self.missed += 1
                return
            self._channel.sent += count
            self._begun += 1
            strip(left, count)
        self._reap(wait=False)

    def settle(self) -> None:
        """Return when the kernel is done with all of it.

        :raises Lost: the connection broke.
        """
        while self._done < self._begun:
            self._reap()

    def _reap(self, *, wait: bool = True) -> None:
        """Take what the kernel has completed off the socket's error queue."""
        try:
            found = completions(self._channel.sock)
        except OSError as error:
            raise Lost(error.strerror or str(error)) from None
        if found is None and wait:
            if self._channel.closed:
                raise Lost("it was closed")
            # Nothing but an error is waited for, and a completion is told as one.
            if any(events & select.POLLHUP for _, events in self._errors.poll(_LOOK)):
                raise Lost("it was shut down")
        for low, high, copied in found or ():
            self._done += ((high - low) & 0xFFFFFFFF) + 1
            self.missed += copied
