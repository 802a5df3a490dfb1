"""What of a stream is at hand: the bytes that were fed last, and where they are in it.

A reader is made of generators.  They ask the window for bytes; where there are not enough, they
yield None, and go on when more was fed.  What is kept for that is the beginning of one record,
which is copied, so that whoever feeds may use the same buffer again; everything else is looked at
in place.  So no length in a stream makes anybody allocate anything: what is kept has come.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeAlias, TypeVar

from qmigd.errors import StreamError
from qmigd.stream.events import Event

__all__ = ["Steps", "Window"]

_T = TypeVar("_T")

#: What a reader is made of: yields events, and None where it needs more bytes.
Steps: TypeAlias = Generator[Event | None, None, _T]


class Window:
    """The bytes that are at hand.

    :ivar view: they, and some before.
    :ivar index: where in ``view`` the next byte is.
    :ivar limit: where the part of the stream ends within which one must remain; None: nowhere.
    :ivar closed: nothing more will come.
    """

    def __init__(self, start: int) -> None:
        """:param start: the offset that the first byte is said to have."""
        self.view = memoryview(b"")
        self.index = 0
        self.limit: int | None = None
        self.closed = False
        self._base = start
        self._rest = memoryview(b"")

    @property
    def position(self) -> int:
        """The offset of the next byte."""
        return self._base + self.index

    @property
    def available(self) -> int:
        """How many bytes are at hand; those within the limit count."""
        size = len(self.view) - self.index
        return size if self.limit is None else min(size, self.limit - self.position)

    def feed(self, data: memoryview) -> None:
        """Add bytes; all that were fed before have been taken or kept."""
        self._rest = data

    def keep(self) -> None:
        """Copy what is left, so that the buffer that was fed can be used for other things."""
        self._replace(memoryview(bytes(self.view[self.index :])))
        self._rest = memoryview(b"")

    def skip(self, count: int) -> None:
        """Go on behind bytes that are not fed; none may be at hand."""
        self._base += count

    def need(self, count: int, expected: str) -> Steps[None]:
        """Wait until ``count`` bytes are at hand, which should be no more than a record has.

        :param expected: what they are to be, for the error.
        :raises StreamError: they do not come.
        """
        while len(self.view) - self.index < count:
            self._check(count, expected)
            if not self._refill(count):
                if self.closed:
                    raise StreamError(self.position, expected, _the_end(self.available))
                yield None
        self._check(count, expected)

    def more(self, count: int = 1) -> Steps[bool]:
        """Wait until ``count`` bytes are at hand; returns False where the stream ends before."""
        while len(self.view) - self.index < count:
            if not self._refill(count):
                if self.closed:
                    return False
                yield None
        return True

    def some(self, expected: str) -> Steps[int]:
        """Wait until something is at hand; returns how many bytes that is.

        :raises StreamError: nothing comes.
        """
        if not self.available:
            yield from self.need(1, expected)
        return self.available

    def take(self, count: int) -> bytes:
        """Take bytes that are at hand."""
        index = self.index
        self.index = index + count
        return bytes(self.view[index : self.index])

    def look(self, count: int, ahead: int = 0) -> bytes:
        """Look at bytes that are at hand, and leave them.

        :param ahead: how many to leave out before them.
        """
        index = self.index + ahead
        return bytes(self.view[index : index + count])

    def flags(self, ahead: int, mask: int) -> int:
        """Look at the low bits of the eight bytes behind ``ahead`` others, all being at hand."""
        start = self.index + ahead
        return int.from_bytes(self.view[start : start + 8], "big") & mask

    def bytes(self, count: int, expected: str) -> Steps[bytes]:
        """Take ``count`` bytes, which should be no more than a record has."""
        yield from self.need(count, expected)
        return self.take(count)

    def integer(self, count: int, expected: str) -> Steps[int]:
        """Take an integer of ``count`` bytes."""
        yield from self.need(count, expected)
        return int.from_bytes(self.take(count), "big")

    def string(self, expected: str) -> Steps[str]:
        """Take a counted string."""
        at = self.position
        size = yield from self.integer(1, f"the length of {expected}")
        data = yield from self.bytes(size, f"{size} bytes of {expected}")
        return text(data, at, expected)

    def _check(self, count: int, expected: str) -> None:
        if self.limit is not None and self.position + count > self.limit:
            left = self.limit - self.position
            raise StreamError(self.position, expected, f"the end of the package after {left} bytes")

    def _refill(self, count: int) -> bool:
        """Take from what was fed and is not at hand yet; returns whether there was any.

        :param count: so many bytes are wanted in one piece.
        """
        if not self._rest:
            return False
        left = len(self.view) - self.index
        if left:
            wanted = max(count - left, 1)
            joined = self.look(left) + bytes(self._rest[:wanted])
            self._rest = self._rest[wanted:]
            self._replace(memoryview(joined))
        else:
            whole, self._rest = self._rest, memoryview(b"")
            self._replace(whole)
        return True

    def _replace(self, view: memoryview) -> None:
        self._base += self.index
        self.index = 0
        self.view = view


def text(data: bytes, at: int, expected: str) -> str:
    """Return a name out of the stream.

    :raises StreamError: there is anything in it that no name has.
    """
    try:
        name = data.decode()
    except UnicodeDecodeError:
        name = ""
    if not name or not name.isprintable():
        raise StreamError(at, expected, repr(data) if data else "an empty one")
    return name


def _the_end(after: int) -> str:
    return f"the end after {after} bytes" if after else "the end"
