"""How the pages in a channel's packets are compressed: a stream that is flushed behind each packet.

:class:`Compressor` makes it and :class:`Decompressor` takes it; each belongs to one channel, from
its first packet on.

Source: migration/multifd.h, multifd-zlib.c and multifd-zstd.c of QEMU.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol

from qmigd.errors import StreamError
from qmigd.stream.pieces import Buffer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["COMPRESSIONS", "FLAGS", "Compressor", "Decompressor"]

#: By ``multifd-compression``; there are qpl (4), uadk (8) and qatzip (16) as well, which take
#: hardware.
COMPRESSIONS: Final[Mapping[str, int]] = {"none": 0, "zlib": 1 << 1, "zstd": 2 << 1}

#: The same, the other way round.
FLAGS: Final[Mapping[int, str]] = {flag: name for name, flag in COMPRESSIONS.items()}


#: What zstd's level 20 has, the highest that QEMU takes: memory that a frame makes one allocate.
_WITHIN: Final = {int(zstd.DecompressionParameter.window_log_max): 25}


class Compressor:
    """Compresses the pages of one channel."""

    def __init__(self, compression: str, level: int) -> None:
        """:param compression: ``zlib`` with levels 0 to 9, or ``zstd`` with 0 to 20."""
        self._compress: Callable[[Any], bytes]
        self._flush: Callable[[], bytes]
        if compression == "zlib":
            deflate = zlib.compressobj(level)
            self._compress = deflate.compress
            self._flush = lambda: deflate.flush(zlib.Z_SYNC_FLUSH)
        else:
            packer = zstd.ZstdCompressor(level=level)
            self._compress = packer.compress
            self._flush = lambda: packer.flush(packer.FLUSH_BLOCK)

    def __call__(self, pages: Iterable[Buffer]) -> bytes:
        """Return what a packet with these pages has behind it."""
        return b"".join([*map(self._compress, pages), self._flush()])


class _Decompresses(Protocol):
    def decompress(self, data: Any, /, max_length: int) -> bytes: ...


class Decompressor:
    """Unpacks the pages of one channel."""

    def __init__(self, compression: str) -> None:
        """:param compression: ``zlib`` or ``zstd``."""
        self._what = compression
        self._how: _Decompresses = (
            zlib.decompressobj()
            if compression == "zlib"
            else zstd.ZstdDecompressor(options=_WITHIN)
        )

    def __call__(self, data: Buffer, expected: int, offset: int = 0) -> bytes:
        """Return the pages behind one packet.

        :param expected: bytes of these pages; hardly more is ever unpacked.
        :param offset: where ``data`` is, for the error.
        :raises StreamError: it is not that.
        """
        try:
            pages = self._how.decompress(data, max_length=expected + 1)
        except (zlib.error, zstd.ZstdError, EOFError) as error:
            raise StreamError(offset, f"pages compressed with {self._what}", str(error)) from None
        if len(pages) != expected:
            found = f"{len(pages)}" if len(pages) < expected else "more"
            raise StreamError(offset, f"{expected} bytes of pages, compressed", found)
        return pages
