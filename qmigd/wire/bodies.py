"""JSON in messages: objects only, and nothing that two parsers read differently.

Refused besides what RFC 8259 refuses: a key twice in one object, ``NaN`` and
``Infinity`` and numbers too large for a double, integers beyond 64 bits, text
with half a surrogate pair, a byte-order mark, too many values, too deep a nest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from qmigd.errors import LocalError, ProtocolError
from qmigd.wire.limits import MAX_JSON_DEPTH, MAX_JSON_MARKS

__all__ = ["decode_object", "encode_object"]

_SMALLEST = -(2**63)
_LARGEST = 2**64 - 1


def encode_object(value: Mapping[str, Any], what: str) -> bytes:
    """Return ``value`` as JSON.

    :param what: the message, for the text of an error.
    :raises LocalError: it is not what :func:`decode_object` takes.
    """
    try:
        data = json.dumps(
            dict(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")
        ).encode()
        decode_object(data, what)
    except (ProtocolError, TypeError, ValueError, RecursionError) as error:
        raise LocalError(f"{what} cannot be written as JSON: {error}", code="bad-json") from error
    return data


def decode_object(data: bytes, what: str) -> dict[str, Any]:
    """Return the object that is ``data``.

    :param what: the message, for the text of an error.
    :raises ProtocolError: ``bad-json``.
    """
    marks = data.count(b",") + data.count(b"[") + data.count(b"{")
    if marks > MAX_JSON_MARKS:
        raise _bad(what, f"it has more than {MAX_JSON_MARKS} commas and opening brackets")
    try:
        text = data.decode("utf-8")
        value = _decode(text)
        _check(value, text)
    except UnicodeError as error:
        raise _bad(what, "it is not UTF-8") from error
    except RecursionError as error:
        raise _bad(what, "it is nested too deeply") from error
    except ValueError as error:
        raise _bad(what, str(error)) from error
    if not isinstance(value, dict):
        raise _bad(what, "it is not an object")
    return value


def _bad(what: str, why: str) -> ProtocolError:
    return ProtocolError(f"The JSON of {what} is refused: {why}.", code="bad-json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return made


def _integer(digits: str) -> int:
    # 64 bits have at most 20 digits; converting many more takes quadratic time.
    value = int(digits) if len(digits) <= 21 else _LARGEST + 1
    if not _SMALLEST <= value <= _LARGEST:
        raise ValueError("an integer does not fit in 64 bits")
    return value


def _number(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_number,
    parse_constant=_constant,
).decode


def _check(value: Any, text: str) -> None:
    """Refuse what is nested too deeply, and text that is not Unicode."""
    inside = [value]
    for _ in range(MAX_JSON_DEPTH):
        inside = [
            inner
            for outer in inside
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not inside:
            break
    else:
        raise ValueError(f"it is nested more than {MAX_JSON_DEPTH} levels deep")
    if "\\u" in text:  # half a pair has to be escaped: as a character it is no UTF-8
        json.dumps(value, ensure_ascii=False).encode("utf-8")
