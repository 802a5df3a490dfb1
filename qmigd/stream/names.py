"""Names of devices and blocks of RAM: counted in the stream, padded in multifd's packets."""

from __future__ import annotations

from qmigd.errors import StreamError
from qmigd.stream.format import MAX_STRING
from qmigd.stream.pieces import Buffer
from qmigd.stream.window import text

__all__ = ["counted", "read_counted", "read_padded", "to_bytes"]


def to_bytes(name: str) -> bytes:
    """Return a name's bytes.

    :raises ValueError: it is longer than :data:`MAX_STRING`, or empty.
    """
    data = name.encode()
    if not 1 <= len(data) <= MAX_STRING:
        raise ValueError(f"{name[:40]!r} has not 1 to {MAX_STRING} bytes.")
    return data


def counted(name: str) -> bytes:
    """Return a name with its length in front.

    :raises ValueError: see :func:`to_bytes`.
    """
    data = to_bytes(name)
    return bytes([len(data)]) + data


def read_counted(data: Buffer, at: int) -> str:
    """Read a name with its length in front, which is all of ``data``.

    :param at: where ``data`` is, for the error.
    :raises StreamError: it is none.
    """
    if not len(data) or len(data) != 1 + data[0]:
        announced = data[0] if len(data) else 0
        raise StreamError(
            at, f"a name of {announced} bytes behind its length", f"{len(data)} bytes in all"
        )
    return text(bytes(data[1:]), at + 1, "a name")


def read_padded(data: bytes, at: int) -> str:
    """Read a name with zeros behind it.

    :raises StreamError: it is none.
    """
    name, zero, _ = data.partition(b"\0")
    if not zero:
        raise StreamError(at, f"a name of less than {len(data)} bytes, then zeros", "no zero")
    return text(name, at, "a name")
