"""Reading one item of the wire piece by piece, and never a byte too many.

A *reading* is a generator that knows the layout of one item.  It yields how
many bytes it can use at most, and is sent between one and that many; in the end
it returns the item.  It never asks for more than certainly belongs to the item,
so whoever reads from the socket by :attr:`Decoder.wanted` leaves what follows
the item where it is, for instance the first bytes of QEMU's stream.

A reading raises :class:`~qmigd.errors.ProtocolError` as soon as the bytes can
no longer become a good item, without waiting for the rest.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Generic, TypeAlias, TypeVar

from qmigd.errors import LocalError, ProtocolError
from qmigd.wire.limits import MAX_OPENING, MAX_STRING

__all__ = [
    "Decoder",
    "Reading",
    "check_string",
    "decode_string",
    "encode_string",
    "exactly",
    "names",
]

T = TypeVar("T")

#: Yields how many bytes it can use, is sent some of them, returns the item.
Reading: TypeAlias = Generator[int, bytes, T]


class Decoder(Generic[T]):
    """Drives the reading of one item.

    :ivar wanted: how many bytes may be read from the socket now; 0 once the
        item is complete, or has been refused.
    :ivar taken: how many bytes of the item are in, an upper bound of what the
        decoder holds.
    :ivar done: whether the item is complete.
    """

    def __init__(self, reading: Reading[T]) -> None:
        self._reading = reading
        self._item: T
        self.done = False
        self.taken = 0
        self.wanted = next(reading)

    def feed(self, data: bytes) -> int:
        """Take bytes for the item from the front of ``data``.

        :returns: how many were taken; fewer than all only if the item is complete.
        :raises ProtocolError: these bytes cannot become a good item.
        """
        offset = 0
        while self.wanted and offset < len(data):
            piece = data[offset : offset + self.wanted]
            offset += len(piece)
            self.taken += len(piece)
            try:
                self.wanted = self._reading.send(piece)
            except StopIteration as end:
                self.wanted = 0
                self.done = True
                self._item = end.value
            except ProtocolError:
                self.wanted = 0
                raise
        return offset

    @property
    def item(self) -> T:
        """The item, once ``done``."""
        return self._item


def exactly(count: int) -> Reading[bytes]:
    """Read ``count`` bytes."""
    got = bytearray()
    while len(got) < count:
        got += yield count - len(got)
    return bytes(got)


def names(count: int, what: str, already: int) -> Reading[tuple[str, ...]]:
    """Read ``count`` strings, no two alike.

    :param what: the item they are in, for the texts of errors.
    :param already: bytes of the item before them, which count for its limit.
    :raises ProtocolError: ``bad-string``, ``repeated-feature`` or ``too-long``.
    """
    found: dict[str, None] = {}
    length = (yield from exactly(1))[0] if count else 0
    already += 1
    for left in reversed(range(count)):
        if length == 0:
            raise ProtocolError(
                f"{what} has an empty string; a string has 1 to {MAX_STRING} bytes.",
                code="bad-string",
            )
        # Where another string follows, its length byte comes for certain.
        more = 1 if left else 0
        already += length + more
        if already > MAX_OPENING:
            raise ProtocolError(f"{what} is longer than {MAX_OPENING} bytes.", code="too-long")
        data = yield from exactly(length + more)
        name = check_string(data[:length], what)
        if name in found:
            raise ProtocolError(f"{what} names {name!r} twice.", code="repeated-feature")
        found[name] = None
        length = data[-1]
    return tuple(found)


def check_string(data: bytes, what: str) -> str:
    """Return the string whose bytes are ``data``.

    :raises ProtocolError: ``bad-string``: not printable ASCII without spaces.
    """
    if not all(0x21 <= byte <= 0x7E for byte in data):
        raise ProtocolError(
            f"{what} has a string with other bytes than printable ASCII without spaces: "
            f"{ascii(data[:40])}.",
            code="bad-string",
        )
    return data.decode("ascii")


def decode_string(data: bytes, what: str) -> tuple[str, bytes]:
    """Cut a string off the front of ``data``, which is complete; returns it and the rest.

    :raises ProtocolError: ``bad-string``.
    """
    if not data or data[0] == 0 or len(data) < 1 + data[0]:
        raise ProtocolError(
            f"{what} should begin with a string (one byte with its length, 1 to "
            f"{MAX_STRING}, then that many bytes), but that is empty or cut short.",
            code="bad-string",
        )
    end = 1 + data[0]
    return check_string(data[1:end], what), data[end:]


def encode_string(value: str, what: str) -> bytes:
    """Return the wire form of ``value``.

    :raises LocalError: it is empty, too long, or not printable ASCII without spaces.
    """
    if not 1 <= len(value) <= MAX_STRING or not all("!" <= char <= "~" for char in value):
        raise LocalError(
            f"{value!r} cannot be {what}: 1 to {MAX_STRING} printable ASCII characters "
            "without spaces are allowed.",
            code="bad-string",
        )
    return bytes([len(value)]) + value.encode("ascii")
