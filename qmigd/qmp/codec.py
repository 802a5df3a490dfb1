"""QMP's framing, bytes in and messages out, for either side of a connection.

QMP's documentation promises one JSON object after another and nothing about
lines.  QEMU itself ends every message with CR LF, with ``pretty=on`` it spreads
one over many lines, and a client may send several at once, or one without a
line's end.  So a message is what its brackets say: it ends where the bracket
that opened it is closed.  Each byte is looked at once, however it is cut.

What is not JSON costs the sender one message and no more: text outside brackets
ends with its line, and so does a string that has a line's end in it (JSON knows
none such), so that a person who forgot a quotation mark gets an answer instead
of silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from qmigd.errors import ProtocolError

__all__ = ["CLIENT_LIMIT", "MAX_DEPTH", "SERVER_LIMIT", "Decoder", "Message", "encode"]

Message = dict[str, Any]

#: Bytes of one message that a client takes from a QEMU, which is trusted
#: (QEMU's own limit for what it is sent, ``MAX_TOKEN_SIZE`` in qobject/json-streamer.c).
CLIENT_LIMIT = 64 << 20
#: Bytes of one message that qmigd's own server takes from its clients.
SERVER_LIMIT = 1 << 20
#: Brackets open at once; far more than any message has, and less than what
#: Python's recursion allows.
MAX_DEPTH = 200

# What is in a string.
_CHARACTERS = rb'[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+'
# The rest of a string: it may be cut off at the end of what has come, or broken
# by a line's end.
_STRING = re.compile(_CHARACTERS + rb'("|\n|\\\n|\\?\Z)')
# Inside a message brackets and strings matter.  A whole object without others in
# it is taken at once, since most of a long answer is made of such.
_INSIDE = re.compile(
    rb'\{(?:[^"{}\[\]]++|"' + _CHARACTERS + rb'")*+\}|[{}\[\]]|"' + _STRING.pattern
)
# Between messages: white space is skipped, anything else begins one.
_SPACE = re.compile(rb"\s*")
# Text outside brackets: up to its line's end, or to where a bracket opens.
_STRAY = re.compile(rb"[^\n{\[]*")


# Made once: dumps() makes one for each call that is not its plainest.
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def encode(message: Mapping[str, Any]) -> bytes:
    """Return the bytes of one message, ASCII, with the line's end that QEMU has.

    :raises ValueError: there is a NaN or an infinity in it.
    :raises TypeError: something in it is not JSON.
    """
    return _encode(message).encode("ascii") + b"\r\n"


class Decoder:
    """Turns bytes, cut anywhere, into messages."""

    def __init__(self, limit: int = SERVER_LIMIT) -> None:
        """:param limit: bytes that one message may have."""
        self._limit = limit
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._in_string = False

    def feed(self, data: bytes) -> list[Message | ProtocolError]:
        """Return what ``data`` completes, in order: messages, and errors in place of bad ones.

        :raises ProtocolError: a message is longer than the limit; nothing that
            comes after it can be told apart any more, so the connection has to end.
        """
        if not self._buffer and (whole := self._whole_lines(data)) is not None:
            return whole
        self._buffer += data
        found: list[Message | ProtocolError] = []
        while (end := self._next_end()) is not None:
            if end > self._limit:
                self._too_long()
            body = bytes(self._buffer[:end])
            del self._buffer[:end]
            self._scanned = self._depth = 0
            self._in_string = False
            found.append(_parse(body))
        if len(self._buffer) > self._limit:
            self._too_long()
        return found

    def _whole_lines(self, data: bytes) -> list[Message | ProtocolError] | None:
        """Return the messages in lines that are one each, or ``None`` if that is not all there is.

        A shortcut, with the same outcome: a message costs a third of what it costs otherwise.
        """
        if not data.endswith(b"\n") or len(data) > self._limit:
            return None
        found: list[Message | ProtocolError] = []
        for line in data.split(b"\n"):
            if not line or line == b"\r":
                continue
            if line.count(b"{") + line.count(b"[") > MAX_DEPTH:
                return None
            message = _parse(line)
            if isinstance(message, ProtocolError):
                return None
            found.append(message)
        return found

    def _too_long(self) -> NoReturn:
        self._buffer.clear()
        raise ProtocolError(f"a QMP message is longer than {self._limit} bytes", code="too-long")

    def _next_end(self) -> int | None:
        """Return where the message at the buffer's beginning ends, if it does."""
        if not self._depth:
            self._skip_space()
            if not self._buffer:
                return None
            if self._buffer[0] not in b"{[":
                return self._stray_end()
        at = self._scanned
        if self._in_string:
            rest = _STRING.match(self._buffer, at)
            assert rest is not None  # it can match nothing at all
            if (broken := self._after_string(rest)) is not None:
                return broken
            at = self._scanned
        if not self._in_string:
            for token in _INSIDE.finditer(self._buffer, at):
                self._scanned = token.end()
                first = self._buffer[token.start()]
                if first == 0x22:  # a quotation mark
                    if (broken := self._after_string(token)) is not None:
                        return broken
                elif first in b"{[":
                    if token.end() - token.start() > 1:
                        if not self._depth:
                            return self._scanned
                        continue
                    self._depth += 1
                    if self._depth > MAX_DEPTH:
                        return self._scanned
                else:
                    self._depth -= 1
                    if not self._depth:
                        return self._scanned
            if not self._in_string:
                self._scanned = len(self._buffer)
        return None

    def _after_string(self, token: re.Match[bytes]) -> int | None:
        """Note how a string ended; returns the message's end where a line's end broke it."""
        ending = token.group(1)
        self._scanned = token.end()
        self._in_string = ending in (b"", b"\\")
        if ending == b"\\":
            self._scanned -= 1  # it belongs to the character that comes next
        return token.end() if ending.endswith(b"\n") else None

    def _skip_space(self) -> None:
        space = _SPACE.match(self._buffer)
        assert space is not None  # it can match nothing at all
        del self._buffer[: space.end()]

    def _stray_end(self) -> int | None:
        stray = _STRAY.match(self._buffer, self._scanned)
        assert stray is not None  # it can match nothing at all
        self._scanned = stray.end()
        return self._scanned if self._scanned < len(self._buffer) else None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(parse_constant=_no_constant).decode


def _parse(body: bytes) -> Message | ProtocolError:
    try:
        value = _decode(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return ProtocolError(f"This is not JSON: {error}.", code="bad-json")
    if not isinstance(value, dict):
        return ProtocolError("A QMP message must be a JSON object.", code="bad-json")
    return value
