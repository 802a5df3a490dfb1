"""Which buffers the kernel still sends out of: bookkeeping for MSG_ZEROCOPY, without I/O.

The kernel numbers the calls on a socket that sent with MSG_ZEROCOPY and took something,
from 0 on, in 32 bits that wrap around.  Its completions name ranges of those numbers, both
ends included; they come in any order, and one may cover many calls
(Documentation/networking/msg_zerocopy.rst of Linux).  Buffers are taken in turn; one is
free again when all calls that sent out of it are complete.
"""

from __future__ import annotations

from collections import deque
from typing import Final

__all__ = ["Ring"]

_NUMBERS: Final = 1 << 32


class Ring:
    """So many buffers, known by their numbers from 0 on.

    :ivar copied: completions in a row, one for each call, that said that the kernel has
        copied the bytes after all.
    """

    def __init__(self, buffers: int, first: int = 0) -> None:
        """:param first: the number of the socket's next call."""
        self.copied = 0
        self._buffers = buffers
        self._current = 0
        self._next = first
        # Calls that are not complete, the oldest first: number and buffer.  They complete
        # in order but for exceptions, so that looking from the left is quick.
        self._calls: deque[tuple[int, int]] = deque()
        self._busy = [0] * buffers

    @property
    def current(self) -> int:
        """The buffer whose turn it is."""
        return self._current

    @property
    def free(self) -> bool:
        """Whether the kernel has done with the buffer whose turn it is."""
        return not self._busy[self._current]

    @property
    def outstanding(self) -> int:
        """Calls that are not complete."""
        return len(self._calls)

    def sent(self) -> None:
        """A call has sent out of the current buffer."""
        self._calls.append((self._next, self._current))
        self._busy[self._current] += 1
        self._next = (self._next + 1) % _NUMBERS

    def turn(self) -> None:
        """All of the current buffer is sent: it is the next one's turn."""
        self._current = (self._current + 1) % self._buffers

    def completed(self, low: int, high: int, copied: bool) -> None:
        """The calls from ``low`` to ``high`` are complete.

        Numbers of calls that were never made, or are complete already, are passed over.

        :param copied: the kernel has copied their bytes.
        """
        span = (high - low) % _NUMBERS
        passed: list[tuple[int, int]] = []
        done = 0
        while self._calls:
            number, buffer = self._calls.popleft()
            if (number - low) % _NUMBERS <= span:
                self._busy[buffer] -= 1
                done += 1
            else:
                passed.append((number, buffer))
                if done:
                    # It is behind the range, and so are all that follow.
                    break
        self._calls.extendleft(reversed(passed))
        if done:
            self.copied = self.copied + done if copied else 0
