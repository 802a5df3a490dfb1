"""The messages of a control connection (docs/protocol, "Messages").

``type:u16 length:u32 body``, all of it big-endian: the framing of QEMU's
return path, with room for the description of a guest.  Each message is a frozen
dataclass; those whose body is JSON carry it as the mapping ``body``.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar, Final

from qmigd.errors import LocalError, ProtocolError
from qmigd.wire.bodies import decode_object, encode_object
from qmigd.wire.greeting import BINDING_SIZE, STREAM_MAGIC
from qmigd.wire.limits import MAX_BODY, MAX_GUEST
from qmigd.wire.reading import Reading, decode_string, encode_string, exactly

__all__ = [
    "HEADER_SIZE",
    "Ask",
    "Attached",
    "Binding",
    "Cancel",
    "Error",
    "Feature",
    "Guest",
    "Heartbeat",
    "Message",
    "MessageType",
    "Outcome",
    "Prepare",
    "Prepared",
    "Release",
    "Start",
    "Status",
    "body_limit",
    "read_body",
    "read_message",
]

#: Bytes of a message before its body.
HEADER_SIZE: Final = 6


class MessageType(IntEnum):
    """The first two bytes of a message."""

    ERROR = 1
    GUEST = 2
    FEATURE = 3
    PREPARE = 4
    PREPARED = 5
    START = 6
    ATTACHED = 7
    HEARTBEAT = 8
    STATUS = 9
    CANCEL = 10
    RELEASE = 11
    OUTCOME = 12
    ASK = 13
    BINDING = 14


_EMPTY = frozenset({MessageType.START, MessageType.ATTACHED, MessageType.HEARTBEAT})


def body_limit(kind: MessageType) -> int:
    """Return how many bytes the body of a message may have."""
    if kind in _EMPTY:
        return 0
    if kind is MessageType.BINDING:
        return BINDING_SIZE
    return MAX_GUEST if kind is MessageType.GUEST else MAX_BODY


@dataclass(frozen=True)
class Message(ABC):
    """One message; :attr:`KIND` is its type."""

    KIND: ClassVar[MessageType]

    @abstractmethod
    def encode_body(self) -> bytes:
        """Return the body.

        :raises LocalError: something in it cannot be written.
        """

    @classmethod
    @abstractmethod
    def decode_body(cls, body: bytes) -> Message:
        """Return the message that has this body, of a permitted length.

        :raises ProtocolError: ``bad-string`` or ``bad-json``.
        """

    def encode(self) -> bytes:
        """Return the wire form.

        :raises LocalError: the body is too long, or cannot be written.
        """
        body = self.encode_body()
        limit = body_limit(self.KIND)
        if len(body) > limit:
            raise LocalError(
                f"{self.KIND.name} would have a body of {len(body)} bytes; {limit} are allowed.",
                code="too-long",
            )
        return struct.pack(">HI", self.KIND, len(body)) + body


@dataclass(frozen=True)
class _Empty(Message):
    def encode_body(self) -> bytes:
        return b""

    @classmethod
    def decode_body(cls, body: bytes) -> Message:
        return cls()


@dataclass(frozen=True)
class _Json(Message):
    # Not shown: bodies are long, and that of PREPARED has the secret in it.
    body: Mapping[str, Any] = field(repr=False)

    def encode_body(self) -> bytes:
        return encode_object(self.body, self.KIND.name)

    @classmethod
    def decode_body(cls, body: bytes) -> Message:
        return cls(decode_object(body, cls.KIND.name))


@dataclass(frozen=True)
class Error(Message):
    """The sender gives up, and why; it closes the connection after this message."""

    KIND = MessageType.ERROR
    code: str
    text: str

    def encode_body(self) -> bytes:
        code = encode_string(self.code, "the code of an error")
        # Whatever the text, the error is said: cut rather than refused.
        text = self.text.encode("utf-8", "replace")[: MAX_BODY - len(code)]
        return code + text.decode("utf-8", "ignore").encode()

    @classmethod
    def decode_body(cls, body: bytes) -> Message:
        code, rest = decode_string(body, "ERROR")
        return cls(code, _text(rest))


@dataclass(frozen=True)
class Guest(_Json):
    """Which guest it is about, and what that is like."""

    KIND = MessageType.GUEST


@dataclass(frozen=True)
class Feature(Message):
    """What one side says about one selected feature; the plugin reads it.

    One key of ``body`` is the core's: ``withdrawn``, the reason, a string.
    """

    KIND = MessageType.FEATURE
    name: str
    body: Mapping[str, Any]

    def encode_body(self) -> bytes:
        name = encode_string(self.name, "the name of a feature")
        body = encode_object(self.body, f"FEATURE {self.name}")
        withdrawn = self.body.get("withdrawn", "-")
        if not isinstance(withdrawn, str) or not withdrawn:
            raise LocalError(
                f"The key withdrawn in FEATURE {self.name} has to be a reason, a string.",
                code="bad-json",
            )
        return name + body

    @classmethod
    def decode_body(cls, body: bytes) -> Message:
        name, rest = decode_string(body, "FEATURE")
        parameters = decode_object(rest, f"FEATURE {name}")
        withdrawn = parameters.get("withdrawn", "-")
        if not isinstance(withdrawn, str) or not withdrawn:
            raise ProtocolError(
                f"The key withdrawn in FEATURE {name} has to be a reason, a string.",
                code="bad-json",
            )
        return cls(name, parameters)


@dataclass(frozen=True)
class Prepare(_Json):
    """The source has said what it wants; the destination is to prepare itself."""

    KIND = MessageType.PREPARE


@dataclass(frozen=True)
class Prepared(_Json):
    """The destination is ready, and how it will be done."""

    KIND = MessageType.PREPARED


@dataclass(frozen=True)
class Start(_Empty):
    """From here the stream may flow."""

    KIND = MessageType.START


@dataclass(frozen=True)
class Attached(_Empty):
    """The role header is accepted: from here the payload may flow."""

    KIND = MessageType.ATTACHED


@dataclass(frozen=True)
class Heartbeat(_Empty):
    """The sender lives."""

    KIND = MessageType.HEARTBEAT


@dataclass(frozen=True)
class Status(_Json):
    """How far the migration is, as the sender sees it."""

    KIND = MessageType.STATUS


@dataclass(frozen=True)
class Cancel(Message):
    """The source wants an end of it."""

    KIND = MessageType.CANCEL
    reason: str

    def encode_body(self) -> bytes:
        return self.reason.encode("utf-8", "replace")

    @classmethod
    def decode_body(cls, body: bytes) -> Message:
        return cls(_text(body))


@dataclass(frozen=True)
class Release(_Json):
    """With this message the guest is the destination's, and no longer the source's."""

    KIND = MessageType.RELEASE


@dataclass(frozen=True)
class Outcome(_Json):
    """How the migration ended on the destination, its last message."""

    KIND = MessageType.OUTCOME


@dataclass(frozen=True)
class Ask(_Json):
    """The source asks what became of a guest that it released on a connection now lost."""

    KIND = MessageType.ASK


@dataclass(frozen=True)
class Binding(Message):
    """The first message in TLS: the sender's hash over what was said before, in clear."""

    KIND = MessageType.BINDING
    hash: bytes

    def encode_body(self) -> bytes:
        return self.hash

    @classmethod
    def decode_body(cls, body: bytes) -> Message:
        return cls(body)


_CLASSES: Final[Mapping[MessageType, type[Message]]] = {
    made.KIND: made
    for made in (
        Error,
        Guest,
        Feature,
        Prepare,
        Prepared,
        Start,
        Attached,
        Heartbeat,
        Status,
        Cancel,
        Release,
        Outcome,
        Ask,
        Binding,
    )
}


def _text(data: bytes) -> str:
    """Return text for a person; what could harm a terminal or a log is replaced."""
    text = data.decode("utf-8", "replace")
    return "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)


def read_message(admit: Callable[[MessageType, int], None]) -> Reading[Message]:
    """Read one message.

    :param admit: called with type and length of the body before any of the body
        is read; refuses the message by a :class:`ProtocolError`.
    :raises ProtocolError: ``early-payload``, ``second-reply``, ``unknown-message``,
        ``too-long``, ``bad-string``, ``bad-json``, or what ``admit`` raised.
    """
    header = b""
    while len(header) < HEADER_SIZE:
        header += yield HEADER_SIZE - len(header)
        _check_type(header)
    return (yield from read_body(header, admit))


def read_body(header: bytes, admit: Callable[[MessageType, int], None]) -> Reading[Message]:
    """Read the rest of a message whose header is in; see :func:`read_message`."""
    number, length = struct.unpack(">HI", header)
    kind = MessageType(number)
    limit = body_limit(kind)
    if length > limit:
        allowed = f"{limit} are allowed" if limit else "it has none"
        raise ProtocolError(
            f"{kind.name} came with a body of {length} bytes; {allowed}.", code="too-long"
        )
    admit(kind, length)
    return _CLASSES[kind].decode_body((yield from exactly(length)))


def _check_type(header: bytes) -> None:
    """Refuse what has begun as ``header`` if no message begins so."""
    if STREAM_MAGIC.startswith(header[:4]) or b"QEMU-".startswith(header[:5]):
        # As a type, "QE" is unknown; what it is shows in a few bytes more.
        if len(header) >= 4 and header.startswith(STREAM_MAGIC):
            raise ProtocolError(
                "QEMU's stream came where a message should be. It may begin right after "
                "START and not before; where features were selected it goes over payload "
                "channels, which begin with a role header.",
                code="early-payload",
            )
        if len(header) == HEADER_SIZE:
            raise ProtocolError(
                "A second Reply, or a role header, came on a control connection; there is "
                "one Reply, and each payload channel is a connection of its own.",
                code="second-reply",
            )
    elif len(header) >= 2:
        number = int.from_bytes(header[:2], "big")
        if number not in _CLASSES:
            raise ProtocolError(
                f"There is no message of type {number} (0x{number:04x}).", code="unknown-message"
            )
