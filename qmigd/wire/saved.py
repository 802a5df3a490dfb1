"""The head of a saved guest's file: what a greeting would have said (docs/saved-guests).

::

    0    magic        "QMIGD-SAVED" and a newline, 12 bytes
    12   version      u16: 1
    14   state        u16: 1 is complete, 0 is still being written
    16   size         u32, bytes of the contents
    20   reserved     u32: 0
    24   offset       u64, where QEMU's part begins; a multiple of 4096
    32   length       u64, its bytes: up to the end of the file
    40   checksum     32 bytes, of QEMU's part; zeros: none was made
    72   proof        SHA-256 of the bytes 0 to 71 and of the contents
    104  contents     JSON, an object
    ...  zeros        up to the offset

All integers are big-endian.  Nothing here does any I/O: a reader gives the first
:data:`FIXED` bytes to :func:`begin`, which says how many more are wanted, and those to
:func:`finish`.  So whatever a file claims, no more than :data:`MAX_CONTENTS` bytes of it
are read before the head has been proved.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from qmigd.errors import FileError, ProtocolError
from qmigd.interfaces import FORMATS
from qmigd.wire.bodies import decode_object, encode_object
from qmigd.wire.limits import MAX_BODY, MAX_GUEST

__all__ = [
    "ALIGNMENT",
    "FIXED",
    "MAGIC",
    "MAX_CONTENTS",
    "NO_CHECKSUM",
    "VERSION",
    "Beginning",
    "Head",
    "begin",
    "encode",
    "finish",
    "offset_for",
]

MAGIC: Final = b"QMIGD-SAVED\n"
VERSION: Final = 1

_STRUCT: Final = struct.Struct("!12sHHIIQQ32s")
_PROOF: Final = hashlib.sha256().digest_size

#: Bytes in front of the contents.
FIXED: Final = _STRUCT.size + _PROOF

#: QEMU's part begins at a multiple of this: a page, and a block of any file system.
ALIGNMENT: Final = 4096

#: Bytes of the contents: the guest's description has as many as in GUEST, the rest is little.
MAX_CONTENTS: Final = MAX_GUEST + MAX_BODY

#: Bytes of the whole head, padding included.
_MAX_OFFSET: Final = -(-(FIXED + MAX_CONTENTS) // ALIGNMENT) * ALIGNMENT

NO_CHECKSUM: Final = bytes(32)

_WHAT: Final = "the head"
_COMPLETE: Final = 1


@dataclass(frozen=True)
class Beginning:
    """The fixed part of a head, good as far as it can be judged by itself.

    :ivar size: bytes of the contents, which come next.
    """

    size: int
    offset: int
    length: int
    checksum: bytes
    raw: bytes


@dataclass(frozen=True)
class Head:
    """A whole head.

    :ivar format: one of :data:`~qmigd.interfaces.FORMATS`.
    :ivar features: QEMU's capabilities that were used.
    :ivar run: whether the guest ran.
    :ivar guest: what a preflight compares (docs/protocol, GUEST).
    :ivar saved: when, in seconds since 1970.
    :ivar by: the qmigd that wrote it.
    :ivar offset: where QEMU's part begins in the file.
    :ivar length: its bytes.
    :ivar checksum: of QEMU's part, :data:`NO_CHECKSUM` if none was made.
    """

    format: str
    features: tuple[str, ...]
    run: bool
    guest: Mapping[str, Any]
    saved: float
    by: str
    offset: int = 0
    length: int = 0
    checksum: bytes = NO_CHECKSUM

    def contents(self) -> bytes:
        """The contents, JSON.

        :raises LocalError: they are larger than a reader takes.
        """
        body = {
            "format": self.format,
            "features": list(self.features),
            "run": self.run,
            "saved": self.saved,
            "qmigd": self.by,
            "guest": dict(self.guest),
        }
        data = encode_object(body, _WHAT)
        if len(data) > MAX_CONTENTS:
            raise FileError(
                f"the description of the guest takes {len(data)} bytes, and a saved guest's "
                f"file has room for {MAX_CONTENTS}"
            )
        return data


def offset_for(head: Head) -> int:
    """Return where QEMU's part begins behind this head."""
    return -(-(FIXED + len(head.contents())) // ALIGNMENT) * ALIGNMENT


def encode(head: Head, *, complete: bool) -> bytes:
    """Return the head as it stands in the file, up to ``head.offset``.

    :param complete: everything behind it is there.
    """
    contents = head.contents()
    fixed = _STRUCT.pack(
        MAGIC,
        VERSION,
        _COMPLETE if complete else 0,
        len(contents),
        0,
        head.offset,
        head.length,
        head.checksum,
    )
    proof = hashlib.sha256(fixed + contents).digest()
    return (fixed + proof + contents).ljust(head.offset, b"\0")


def begin(data: bytes, size: int) -> Beginning:
    """Look at the first :data:`FIXED` bytes of a file.

    :param size: bytes of the whole file.
    :raises FileError: they begin no saved guest that can be read; half a sentence says why.
    """
    if not data.startswith(MAGIC[: len(data)]) or not data:
        raise FileError("it is no saved guest: it does not begin with QMIGD-SAVED")
    if len(data) < FIXED:
        raise FileError(f"it is cut: a saved guest's head has more than {len(data)} bytes")
    _, version, state, contents, _, offset, length, checksum = _STRUCT.unpack_from(data)
    if version != VERSION:
        raise FileError(
            f"it is of version {version}, and this qmigd reads version {VERSION}: restore it "
            f"with the qmigd that saved it, or a newer one"
        )
    if state != _COMPLETE:
        raise FileError("it was never finished: what saved it was interrupted")
    if not 2 <= contents <= MAX_CONTENTS or not FIXED + contents <= offset <= _MAX_OFFSET:
        raise FileError("its head is damaged: its sizes are none that qmigd writes")
    if offset % ALIGNMENT:
        raise FileError("its head is damaged: QEMU's part does not begin at a page")
    if offset + length != size:
        raise FileError(
            f"it has {size} bytes where {offset + length} were saved: it was cut, or "
            f"something was added to it"
        )
    return Beginning(contents, offset, length, checksum, bytes(data[:FIXED]))


def finish(beginning: Beginning, data: bytes) -> Head:
    """Take in the contents, ``beginning.size`` bytes.

    :raises FileError: they are not what was written.
    """
    fixed, proof = beginning.raw[: _STRUCT.size], beginning.raw[_STRUCT.size :]
    if len(data) != beginning.size or hashlib.sha256(fixed + data).digest() != proof:
        raise FileError("its head is damaged: its checksum is wrong")
    try:
        body = decode_object(data, _WHAT)
    except ProtocolError as error:
        raise FileError(f"its head makes no sense: {error.text}") from None
    return Head(
        format=_member(body, "format", str),
        features=tuple(map(str, _member(body, "features", list))),
        run=_member(body, "run", bool),
        guest=_member(body, "guest", dict),
        saved=float(_member(body, "saved", (int, float))),
        by=_member(body, "qmigd", str),
        offset=beginning.offset,
        length=beginning.length,
        checksum=beginning.checksum,
    )


def _member(body: Mapping[str, Any], name: str, kind: Any) -> Any:
    value = body.get(name)
    if not isinstance(value, kind) or (name == "format" and value not in FORMATS):
        raise FileError(f"its head makes no sense: its {name!r} is none that qmigd writes")
    return value
