"""Several codecs on one channel, as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from zope.interface import implementer

from qmigd.interfaces import ICodec

__all__ = ["chain"]


def chain(makers: Sequence[Callable[[], ICodec]]) -> Callable[[], ICodec] | None:
    """Put codecs in a row; ``None`` for an empty one.

    :param makers: of each codec, in the order in which they encode; the same on both
        sides.
    :return: what makes the codec of one direction of one channel.
    """
    if not makers:
        return None
    if len(makers) == 1:
        return makers[0]
    return lambda: _Chain([make() for make in makers])


@implementer(ICodec)
class _Chain:
    def __init__(self, codecs: Sequence[ICodec]) -> None:
        self._codecs = codecs

    def encode(self, data: memoryview) -> bytes:
        out = data
        for codec in self._codecs:
            out = memoryview(codec.encode(out))
        return bytes(out)

    def finish(self) -> bytes:
        # What one has left goes through those after it before they end themselves.
        left = b""
        for codec in self._codecs:
            encoded = codec.encode(memoryview(left)) if left else b""
            left = encoded + codec.finish()
        return left

    def decode(self, data: memoryview) -> bytes:
        out = data
        for codec in reversed(self._codecs):
            out = memoryview(codec.decode(out))
        return bytes(out)
