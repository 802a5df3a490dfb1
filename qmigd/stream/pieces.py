"""What a decoder is built on that takes bytes in pieces of any size.

Its format is a generator that yields how many bytes it wants next and is sent exactly that many.
Where these have come in several pieces, what there is of them is kept and no more.  So a format has
to bound what it asks for, and need not fear that anything is allocated on the word of a length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import Any, Generic, TypeAlias, TypeVar

from qmigd.errors import StreamError

__all__ = ["Buffer", "Decoder", "Format"]

E = TypeVar("E")

#: What can be fed.  It has to stay as it is for as long as anybody has what was made of it,
#: because views of it are handed on and not copies.
Buffer: TypeAlias = bytes | bytearray | memoryview

#: Yields how many bytes it wants, at least 1, and is sent a view of that many.
Format: TypeAlias = Generator[int, memoryview, Any]


class Decoder(ABC, Generic[E]):
    """Takes what comes, and gives what it means.

    :ivar position: the offset of the first byte that is wanted now, or worked on.
    """

    def __init__(self, what: str) -> None:
        """:param what: what is being read, for the message that it is cut: "the return path"."""
        self.position = 0
        self._what = what
        self._rest = bytearray()
        self._refused = False
        self._events: list[E] = []
        #: Whether the end may come here.
        self._between = True
        self._reading = self._format()
        self._wanted = next(self._reading)

    @abstractmethod
    def _format(self) -> Format:
        """Read, and append to ``_events``."""

    @property
    def missing(self) -> int:
        """How many bytes have to come before anything happens."""
        return self._wanted - len(self._rest)

    def feed(self, data: Buffer) -> Iterator[E]:
        """Take what has come next, and return what is complete.

        ``data`` has to stay as it is while what is returned is in use.

        :raises StreamError: it makes no sense, once all that came before it has been returned;
            nothing more can be fed then.
        """
        failed = None
        if self._refused:
            failed = StreamError(self.position, "nothing more after an error", "more")
        try:
            if failed is None:
                self._take(memoryview(data).cast("B"))
        except StreamError as error:
            self._refused = True
            failed = error
        events = self._events.copy()
        self._events.clear()  # and not another list: the format may have got hold of this one
        return _deliver(events, failed)

    def end(self) -> None:
        """Say that nothing more comes.

        :raises StreamError: it is cut.
        """
        if self._rest or not self._between:
            raise StreamError(
                self.position + len(self._rest),
                f"{self.missing} more bytes of {self._what}",
                "its end",
            )

    def _take(self, view: memoryview) -> None:
        if self._rest:
            count = self.missing
            self._rest += view[:count]
            view = view[count:]
            if self.missing:
                return
            piece, self._rest = self._rest, bytearray()
            self._send(memoryview(piece))
        while len(view) >= (count := self._wanted):
            self._send(view[:count])
            view = view[count:]
        self._rest += view

    def _send(self, piece: memoryview) -> None:
        # The position is that of the piece until the format has done with it.
        self._wanted, self.position = self._reading.send(piece), self.position + len(piece)


def _deliver(events: list[E], failed: StreamError | None) -> Iterator[E]:
    yield from events
    if failed is not None:
        raise failed
