"""The connection that pairs two queue pairs, and what is said over it.

All of a migration by ``rdma:`` but the pages themselves goes over TCP: the stream over the
main channel, as ever, and over this one what the devices have to know of each other.  All
integers are big-endian::

    source                        destination
    HELLO               ---->
                        <----     HELLO
    REGISTER first n    ---->                     n pieces of RAM are to be written to
                        <----     KEYS  n keys
                                  ROUND number    all that was written before has been found
                        <----     FAILED reason

    HELLO     magic "QMRD"  version:u8  role:u8 (1 source, 2 destination)  mtu:u8  0:u8
              qpn:u32  psn:u32  gid[16]  uuid[16]  size:u64  address:u64
    others    type:u8  one:u32  two:u32  and, by type, what follows

The UUID is the guest's; size and address are those of its RAM where this side writes and
reads it.  RAM is registered in pieces of :func:`piece_size` bytes.  KEYS has a u32 for each
piece after it, and FAILED a text of ``one`` bytes, UTF-8.
"""

from __future__ import annotations

import enum
import struct
import uuid
from dataclasses import dataclass
from typing import Final

from qmigd.guests.memory.channels import Channel, Lost

__all__ = ["MAGIC", "Endpoint", "Hello", "Kind", "Message", "Role", "hear", "piece_size", "say"]

#: What the connection begins with.
MAGIC: Final = b"QMRD"
_VERSION: Final = 1
_HELLO: Final = struct.Struct(">4sBBBxII16s16sQQ")
_MESSAGE: Final = struct.Struct(">BII")
_NUMBER: Final = 24  # bits of a queue pair's number and of a packet's
#: Path MTUs as verbs number them: 256 to 4096 bytes.
_MTUS: Final = range(1, 6)
#: Bytes of a reason at the most.
_REASON: Final = 1000
#: Bytes of a piece at the least, and how many pieces there are at the most.
_PIECE: Final = 1 << 20
_PIECES: Final = 1024


class Role(enum.IntEnum):
    """Which side says HELLO."""

    SOURCE = 1
    DESTINATION = 2


class Kind(enum.IntEnum):
    """What a message after HELLO is."""

    REGISTER = 1
    KEYS = 2
    ROUND = 3
    FAILED = 4


def piece_size(size: int) -> int:
    """Return how many bytes of RAM are registered together: a power of two.

    :param size: of the RAM.
    """
    piece = _PIECE
    while piece * _PIECES < size:
        piece *= 2
    return piece


@dataclass(frozen=True)
class Endpoint:
    """A queue pair, as the other one has to know it.

    :ivar qpn: its number.
    :ivar psn: the number of its first packet.
    :ivar gid: of the port that it is on.
    :ivar mtu: the most that the port can send in a packet, as verbs number it.
    """

    qpn: int
    psn: int
    gid: bytes
    mtu: int


@dataclass(frozen=True)
class Hello:
    """The first thing that either side says."""

    role: Role
    endpoint: Endpoint
    uuid: uuid.UUID
    size: int
    address: int

    def encode(self) -> bytes:
        end = self.endpoint
        head = (MAGIC, _VERSION, self.role, end.mtu, end.qpn, end.psn, end.gid)
        return _HELLO.pack(*head, self.uuid.bytes, self.size, self.address)

    @classmethod
    def hear(cls, channel: Channel, role: Role, begun: bytes = b"") -> Hello:
        """Receive it.

        :param role: of the other side.
        :param begun: what has been received of it already.
        :raises Lost: nothing came, or something else.
        """
        data = begun + channel.take(_HELLO.size - len(begun))
        if len(data) < _HELLO.size:
            raise Lost("the other side closed the connection")
        magic, version, said, mtu, qpn, psn, gid, identity, size, address = _HELLO.unpack(data)
        if (magic, version, said) != (MAGIC, _VERSION, role):
            raise Lost(f"it begins with {data[:6]!r}, which is not version {_VERSION} of {role!r}")
        if mtu not in _MTUS or (qpn | psn) >> _NUMBER:
            raise Lost("it names no queue pair that there could be")
        if address + size >> 64:
            raise Lost("its RAM is nowhere")
        end = Endpoint(qpn, psn, gid, mtu)
        return cls(Role(said), end, uuid.UUID(bytes=identity), size, address)


@dataclass(frozen=True)
class Message:
    """Anything that comes after HELLO.

    :ivar text: of FAILED.
    """

    kind: Kind
    one: int = 0
    two: int = 0
    keys: tuple[int, ...] = ()
    text: str = ""


def say(channel: Channel, message: Message) -> None:
    """Send a message.

    :raises Lost: the connection broke.
    """
    one, two, rest = message.one, message.two, b""
    match message.kind:
        case Kind.KEYS:
            one, rest = len(message.keys), struct.pack(f">{len(message.keys)}I", *message.keys)
        case Kind.FAILED:
            rest = message.text.encode()[:_REASON]
            one = len(rest)
    channel.send([_MESSAGE.pack(message.kind, one, two) + rest])


def hear(channel: Channel) -> Message | None:
    """Receive a message; ``None`` at the end.

    :raises Lost: the connection broke, or what came is none.
    """
    data = channel.take(_MESSAGE.size)
    if not data:
        return None
    number, one, two = _MESSAGE.unpack(data)
    match number:
        case Kind.REGISTER | Kind.ROUND:
            return Message(Kind(number), one, two)
        case Kind.KEYS if one <= _PIECES:
            keys = channel.take(4 * one)
            if len(keys) == 4 * one:
                return Message(Kind.KEYS, keys=struct.unpack(f">{one}I", keys))
        case Kind.FAILED if one <= _REASON:
            return Message(Kind.FAILED, text=channel.take(one).decode(errors="replace"))
    raise Lost(f"it says {data.hex()}, which is nothing to be said here")
