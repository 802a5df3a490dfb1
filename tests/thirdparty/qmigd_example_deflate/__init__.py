"""``__org.example_deflate``: every channel of the relay is compressed with deflate.

An example of a feature for qmigd, and of a codec.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from zope.interface import implementer

from qmigd.interfaces import RELAY, Feature, GuestFacts, Host, ICodec

__all__ = ["Codec", "Deflate", "feature"]

#: zlib's fastest.  A relay is seldom short of CPU and short of network at once.
LEVEL = 1


class Deflate(Feature):
    """Only a relay sees the bytes, so it is the one path that can carry this."""

    name = "__org.example_deflate"
    summary = "compresses every channel with deflate"
    paths = frozenset({RELAY})

    def propose(self, guest: GuestFacts, host: Host, tunables: Mapping[str, Any]) -> dict[str, Any]:
        return {"level": LEVEL}

    def answer(self, guest: GuestFacts, host: Host, proposal: Mapping[str, Any]) -> dict[str, Any]:
        level = proposal.get("level")
        if not isinstance(level, int) or not 1 <= level <= 9:
            raise ValueError("its 'level' is not a number from 1 to 9")
        return {"level": level}

    def accept(self, proposal: Mapping[str, Any], agreement: Mapping[str, Any]) -> None:
        if agreement != proposal:
            raise ValueError(f"{dict(proposal)} was proposed, not {dict(agreement)}")

    def codec(self, agreement: Mapping[str, Any]) -> Callable[[], ICodec]:
        return partial(Codec, agreement["level"])


@implementer(ICodec)
class Codec:
    """One direction of one channel."""

    def __init__(self, level: int) -> None:
        self._deflate = zlib.compressobj(level)
        self._inflate = zlib.decompressobj()

    def encode(self, data: memoryview) -> bytes:
        # The flush is what lets the peer decode all of it now.
        return self._deflate.compress(data) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def finish(self) -> bytes:
        return self._deflate.flush()

    def decode(self, data: memoryview) -> bytes:
        if self._inflate.eof:
            raise ValueError("there is something behind the end of the compressed stream")
        try:
            return self._inflate.decompress(data)
        except zlib.error as error:
            raise ValueError(str(error)) from None


feature = Deflate()
