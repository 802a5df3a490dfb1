"""``zerocopy`` towards the network: MSG_ZEROCOPY, out of a ring of buffers.

The kernel sends out of the buffer itself, and says on the socket's error queue when it
has done with it, that is when the peer has acknowledged the bytes; until then the buffer
is not written to.  What is in the ring counts as sent and against the socket's own send
buffer, so that no more is on its way than with copying.

Pages are pinned and completions cost, which is why small writes are copied
(``_WORTH_IT``).  Where the kernel copies nevertheless, as it does for every receiver on the same
host, its completions say so, and after some of them the rest of the stream is copied.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import socket
from typing import Final

from qmigd.channels.movers.common import BUFFER_SIZE, Count, End, said
from qmigd.channels.movers.copying import copy
from qmigd.channels.movers.ring import Ring
from qmigd.transports.zero_copy import MSG_ZEROCOPY, completions, enable

__all__ = ["COPIED_ENOUGH", "Sending", "send"]

#: The ring: what the kernel allows a TCP connection to have on its way by default
#: (net.ipv4.tcp_wmem), in buffers of half the size of a copy's.
_BUFFERS: Final = 8
_SIZE: Final = BUFFER_SIZE // 2

#: Bytes from which on sending without a copy is worth the pinning, by the kernel's own
#: documentation (msg_zerocopy.rst: "over around 10 KB").
_WORTH_IT: Final = 10 << 10

#: After so many completions in a row that tell of a copy, it is copied openly.
COPIED_ENOUGH: Final = 16


def send(source: socket.socket, sink: socket.socket, count: Count) -> End:
    """Move bytes to a TCP socket without copying them on the way out."""
    try:
        enable(sink)
        area = mmap.mmap(-1, _BUFFERS * _SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return copy(source, sink, count)
    # What is still being sent when this returns is pinned: letting go of the mapping
    # takes the pages from us, not from the kernel.
    sending = Sending(sink)
    view = memoryview(area)
    buffers = [view[at : at + _SIZE] for at in range(0, len(area), _SIZE)]
    while sending.ring.copied < COPIED_ENOUGH:
        try:
            sending.wait_for_buffer()
        except OSError as error:
            return End("sink", said(error))
        buffer = buffers[sending.ring.current]
        try:
            size = source.recv_into(buffer)
        except OSError as error:
            return End("source", said(error))
        if not size:
            return End("eof")
        try:
            sending.send(buffer[:size])
        except OSError as error:
            return End("sink", said(error))
        count(size)
    return copy(source, sink, count)


class Sending:
    """A TCP socket that is sent to without copying."""

    def __init__(self, sink: socket.socket) -> None:
        self.ring = Ring(_BUFFERS)
        self._sink = sink
        # Nothing but what is always told: completions, as an error, and the end.
        self._poll = select.poll()
        self._poll.register(sink, 0)

    def wait_for_buffer(self) -> None:
        """Wait until the kernel has done with the buffer whose turn it is.

        :raises OSError: the connection is lost.
        """
        while not self.ring.free:
            self.wait()

    def send_when_free(self, data: memoryview) -> None:
        """Send bytes that never change, no more of them at a time than a ring has buffers.

        :raises OSError: the connection is lost.
        """
        self.wait_for_buffer()
        self.send(data)

    def send(self, data: memoryview) -> None:
        """Send the current buffer's bytes, and turn to the next one.

        :raises OSError: the connection is lost.
        """
        if len(data) < _WORTH_IT:
            self._sink.sendall(data)
            return
        while data:
            try:
                taken = self._sink.send(data, MSG_ZEROCOPY)
            except OSError as error:
                # net.core.optmem_max or RLIMIT_MEMLOCK is used up, by this connection or
                # by others.
                if error.errno != errno.ENOBUFS:
                    raise
                if not self.ring.outstanding:
                    self._sink.sendall(data)
                    break
                self.wait()
                continue
            self.ring.sent()
            data = data[taken:]
        self.ring.turn()
        self._reap()

    def wait(self) -> None:
        """Wait for a completion.

        :raises OSError: the connection is lost.
        """
        for _, events in self._poll.poll():
            if self._reap():
                continue
            # It was woken, but by no completion: the connection has ended.
            if failed := self._sink.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(failed, os.strerror(failed))
            if events & select.POLLHUP:
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def _reap(self) -> bool:
        """Read the completions that are there; returns whether there were any."""
        some = False
        while (found := completions(self._sink)) is not None:
            some = True
            for low, high, copied in found:
                self.ring.completed(low, high, copied)
        return some
