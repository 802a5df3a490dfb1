"""The role header: how a payload channel begins (docs/protocol, "Payload channels").

::

    "QEMU-CHANNEL"(12)  version:u8  migration:16  channel:string  index:u16  proof:32

``proof`` is the HMAC-SHA256 of everything before it under the secret that the
destination gave out in PREPARED: only who negotiated the migration can add a
channel to it, and neither name nor index can be changed on the way.
"""

from __future__ import annotations

import hmac
import struct
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

from qmigd.errors import LocalError, ProtocolError
from qmigd.wire.greeting import VERSION, check_version
from qmigd.wire.reading import Reading, check_string, encode_string, exactly

__all__ = ["CHANNEL_MAGIC", "PROOF_SIZE", "SECRET_SIZE", "RoleHeader", "read_role_after_magic"]

#: How a role header begins.
CHANNEL_MAGIC: Final = b"QEMU-CHANNEL"

#: Bytes of a proof: what SHA-256 gives.
PROOF_SIZE: Final = 32

#: Bytes of a migration's secret.
SECRET_SIZE: Final = 32


@dataclass(frozen=True)
class RoleHeader:
    """Which channel of which migration a connection is.

    :ivar migration: the migration's id, never all zero.
    :ivar channel: the channel's name.
    :ivar index: which of the channels of that name, from 0.
    """

    migration: uuid.UUID
    channel: str
    index: int
    proof: bytes = field(default=b"", repr=False)
    version: int = VERSION

    def prove(self, secret: bytes) -> RoleHeader:
        """Return the same header with the proof of ``secret``.

        :raises LocalError: a field is not fit for the wire.
        """
        return RoleHeader(
            self.migration, self.channel, self.index, self._proof(secret), self.version
        )

    def verify(self, secret: bytes) -> bool:
        """Say whether the proof is that of ``secret``; takes the same time either way."""
        return hmac.compare_digest(self.proof, self._proof(secret))

    def encode(self) -> bytes:
        """Return the wire form.

        :raises LocalError: a field is not fit for the wire, or there is no proof.
        """
        if len(self.proof) != PROOF_SIZE:
            raise LocalError("A role header cannot be sent without its proof.", code="bad-proof")
        return self._proven() + self.proof

    def _proof(self, secret: bytes) -> bytes:
        return hmac.digest(secret, self._proven(), "sha256")

    def _proven(self) -> bytes:
        if not self.migration.int or not 0 <= self.index <= 0xFFFF:
            raise LocalError(
                "A role header has a migration id that is not zero and an index of 16 bits.",
                code="bad-role",
            )
        return (
            CHANNEL_MAGIC
            + bytes([self.version])
            + self.migration.bytes
            + encode_string(self.channel, "the name of a channel")
            + struct.pack(">H", self.index)
        )


def read_role_after_magic(versions: Collection[int]) -> Reading[RoleHeader]:
    """Read a role header whose magic has been read already.

    :raises ProtocolError: ``no-common-version``, ``bad-role`` or ``bad-string``.
    """
    what = "The role header"
    version = (yield from exactly(1))[0]
    check_version(version, versions, what)
    # The id, and the length of the name.
    fixed = yield from exactly(17)
    migration = uuid.UUID(bytes=fixed[:16])
    if not migration.int:
        raise ProtocolError(f"{what} has a migration id of zero.", code="bad-role")
    length = fixed[16]
    if not length:
        raise ProtocolError(f"{what} has an empty channel name.", code="bad-string")
    rest = yield from exactly(length + 2 + PROOF_SIZE)
    channel = check_string(rest[:length], what)
    (index,) = struct.unpack(">H", rest[length : length + 2])
    return RoleHeader(migration, channel, index, rest[length + 2 :], version)
