"""Greeting and Reply: how a connection begins (docs/protocol, "The opening").

::

    dst -> src  Greeting   "QEMU-MIGRATE"   n:u8  version:u8 * n   m:u32  feature:string * m
    src -> dst  Reply      "QEMU-MIGRATE"   version:u8             k:u32  feature:string * k

The layout of the Greeting is the same in every version of the handshake, for it
comes before the version is chosen; that of the Reply is, up to its version.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from qmigd.errors import LocalError, ProtocolError
from qmigd.stream.format import MAGIC as STREAM_MAGIC
from qmigd.wire.limits import MAX_FEATURES, MAX_OPENING, MAX_VERSIONS
from qmigd.wire.reading import Reading, encode_string, exactly, names

__all__ = [
    "BINDING_SIZE",
    "MAGIC",
    "STREAM_MAGIC",
    "TLS",
    "VERSION",
    "Greeting",
    "Reply",
    "binding",
    "check_version",
    "read_greeting",
    "read_reply_after_magic",
]

#: How a Greeting and a Reply begin.
MAGIC = b"QEMU-MIGRATE"

#: How QMP's own greeting begins, that of a QEMU or of a qmigd's management socket.
_QMP: Final = b'{"QMP"'

#: The version that this package speaks.
VERSION = 1

#: The one feature that changes the handshake itself: where the Reply selects it, all that
#: follows the Reply goes in TLS.
TLS: Final = "tls"

#: Bytes of a binding: what SHA-256 gives.
BINDING_SIZE: Final = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Greeting:
    """What the destination says first: its versions, and the features it offers."""

    versions: tuple[int, ...]
    features: tuple[str, ...]

    def encode(self) -> bytes:
        """Return the wire form.

        :raises LocalError: a limit is exceeded, or a name is unfit or repeated.
        """
        if not 1 <= len(self.versions) <= MAX_VERSIONS or not all(
            1 <= version <= 255 for version in self.versions
        ):
            raise LocalError(
                f"A Greeting has 1 to {MAX_VERSIONS} versions between 1 and 255, "
                f"not {list(self.versions)}.",
                code="too-many",
            )
        head = MAGIC + bytes([len(self.versions), *self.versions])
        return _with_features(head, self.features, "a Greeting")


@dataclass(frozen=True)
class Reply:
    """What the source answers: the version chosen, and the features selected."""

    version: int
    features: tuple[str, ...]

    def encode(self) -> bytes:
        """Return the wire form.

        :raises LocalError: a limit is exceeded, or a name is unfit or repeated.
        """
        return _with_features(MAGIC + bytes([self.version]), self.features, "a Reply")


def binding(greeting: Greeting, reply: Reply) -> bytes:
    """Return the hash over what was said in clear, before TLS (docs/protocol, BINDING).

    An item has one wire form only, so that nobody has to keep the bytes that came.
    """
    return hashlib.sha256(greeting.encode() + reply.encode()).digest()


def _with_features(head: bytes, features: tuple[str, ...], what: str) -> bytes:
    if len(features) > MAX_FEATURES:
        raise LocalError(
            f"{len(features)} features do not fit in {what}; {MAX_FEATURES} do.", code="too-many"
        )
    if len(set(features)) < len(features):
        raise LocalError(f"A feature stands twice in {what}.", code="repeated-feature")
    strings = b"".join(encode_string(name, "the name of a feature") for name in features)
    data = head + struct.pack(">I", len(features)) + strings
    if len(data) > MAX_OPENING:
        raise LocalError(
            f"The features make {what} of {len(data)} bytes; {MAX_OPENING} are allowed.",
            code="too-long",
        )
    return data


def read_greeting(versions: Collection[int]) -> Reading[Greeting]:
    """Read a Greeting, on the source.

    :param versions: those that this side speaks.
    :raises ProtocolError: ``bad-magic``, ``too-many``, ``no-common-version``,
        ``bad-string``, ``repeated-feature`` or ``too-long``.
    """
    got = b""
    while got != MAGIC:
        got += yield len(MAGIC) - len(got)
        if not MAGIC.startswith(got):
            who = "Nothing that speaks this protocol is listening there"
            if got.startswith(_QMP):
                who = "A QMP socket is there, and no port that a qmigd listens on for its peers"
            raise ProtocolError(
                f"{who}: the Greeting should begin with {ascii(MAGIC)}, but {ascii(got)} came.",
                code="bad-magic",
            )
    count = (yield from exactly(1))[0]
    if count > MAX_VERSIONS:
        raise ProtocolError(
            f"The Greeting announces {count} versions; {MAX_VERSIONS} are allowed.",
            code="too-many",
        )
    rest = yield from exactly(count + 4)
    offered = tuple(rest[:count])
    if not set(offered) & set(versions):
        raise ProtocolError(
            f"The destination speaks the versions {_listed(offered)} of the handshake, "
            f"this side {_listed(versions)}: none in common.",
            code="no-common-version",
        )
    (total,) = struct.unpack(">I", rest[count:])
    return Greeting(offered, (yield from _features(total, "The Greeting", 17 + count)))


def read_reply_after_magic(versions: Collection[int]) -> Reading[Reply]:
    """Read a Reply whose magic has been read already, on the destination.

    :param versions: those in this side's Greeting.
    :raises ProtocolError: ``no-common-version``, ``too-many``, ``bad-string``,
        ``repeated-feature`` or ``too-long``.
    """
    version = (yield from exactly(1))[0]
    check_version(version, versions, "The Reply")
    (count,) = struct.unpack(">I", (yield from exactly(4)))
    return Reply(version, (yield from _features(count, "The Reply", 17)))


def check_version(version: int, versions: Collection[int], what: str) -> None:
    """Refuse a version that was not in the Greeting.

    :raises ProtocolError: ``no-common-version``.
    """
    if version not in versions:
        raise ProtocolError(
            f"{what} asks for version {version} of the handshake; this side speaks "
            f"{_listed(versions)}.",
            code="no-common-version",
        )


def _features(count: int, what: str, already: int) -> Reading[tuple[str, ...]]:
    if count > MAX_FEATURES:
        raise ProtocolError(
            f"{what} announces {count} features; {MAX_FEATURES} are allowed.", code="too-many"
        )
    return (yield from names(count, what, already))


def _listed(versions: Collection[int]) -> str:
    return ", ".join(map(str, sorted(set(versions)))) or "none"
