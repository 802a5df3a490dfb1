"""``__org.example_crc``: every channel of the relay carries checksums."""

# -- the feature

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from zope.interface import implementer

from qmigd.interfaces import RELAY, Feature, GuestFacts, Host, ICodec

CHECKSUMS = {"crc32": zlib.crc32, "adler32": zlib.adler32}


class Checksums(Feature):
    name = "__org.example_crc"
    summary = "every channel carries checksums, so that nothing arrives garbled"
    paths = frozenset({RELAY})

    # -- what both sides agree on

    def propose(self, guest: GuestFacts, host: Host, tunables: Mapping[str, Any]) -> dict[str, Any]:
        return {"checksums": list(CHECKSUMS)}

    def answer(self, guest: GuestFacts, host: Host, proposal: Mapping[str, Any]) -> dict[str, Any]:
        for name in proposal.get("checksums", ()):
            if name in CHECKSUMS:
                return {"checksum": name}
        raise ValueError("there is no checksum among them that both sides know")

    def accept(self, proposal: Mapping[str, Any], agreement: Mapping[str, Any]) -> None:
        if agreement.get("checksum") not in proposal["checksums"]:
            raise ValueError("it wants a checksum that was not proposed")

    # -- what is done with the bytes

    def codec(self, agreement: Mapping[str, Any]) -> Callable[[], ICodec]:
        return lambda: Framed(CHECKSUMS[agreement["checksum"]])


# -- the codec

HEAD = struct.Struct(">II")  # bytes that follow, and their checksum


@implementer(ICodec)
class Framed:
    """One direction of one channel: pieces of the stream, each behind its checksum."""

    def __init__(self, checksum: Callable[[bytes], int]) -> None:
        self._checksum = checksum
        self._rest = b""

    def encode(self, data: memoryview) -> bytes:
        piece = bytes(data)
        return HEAD.pack(len(piece), self._checksum(piece)) + piece

    def finish(self) -> bytes:
        return b""

    def decode(self, data: memoryview) -> bytes:
        self._rest += data
        whole = b""
        while len(self._rest) >= HEAD.size:
            size, checksum = HEAD.unpack_from(self._rest)
            piece = self._rest[HEAD.size : HEAD.size + size]
            if len(piece) < size:
                break
            if self._checksum(piece) != checksum:
                raise ValueError("what has arrived is not what was sent")
            whole += piece
            self._rest = self._rest[HEAD.size + size :]
        return whole


# -- its end

feature = Checksums()
