"""Understands devices' sections by the description at the end of a stream.

Offers :class:`Devices`, which is the description, :class:`Device`, what it says of one section, and
:func:`find_description`, which finds it in the last bytes of a file.

The description is JSON that QEMU's vmstate writes while it writes the sections::

    {"configuration": {...}, "page_size": 4096, "devices": [DEVICE, ...]}
    DEVICE: {"name", "instance_id", "vmsd_name", "version", "fields": [FIELD, ...],
             "subsections": [{"vmsd_name", "version", "fields", "subsections"}, ...]}
    FIELD:  {"name", "type", "size", "struct": {as a device}, "index": number of an element,
             or "array_len": as many elements as the one that is described}

A field whose type is known becomes a number, a truth value or nothing; any other, and an array of
bytes, becomes its bytes in hexadecimal.

The description of a large guest has some MiB, and would take many times that as Python's objects:
so it is kept as it came, and taken apart one device at a time.  It is as little to be trusted
as the rest: everything that it says is compared with the bytes that there are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

from qmigd.errors import StreamError
from qmigd.stream.format import MAX_DESCRIPTION, SectionType

__all__ = ["Device", "Devices", "Value", "find_description"]

#: What a field comes to.
Value: TypeAlias = "int | bool | str | list[Value] | dict[str, Value] | None"

#: The integers' types, with what follows for those that are compared with what the destination has.
#: All are big-endian: "le" is "less or equal".
_INTEGER: Final = re.compile(r"(u?)int(8|16|32|64)(?: equal| le)?")

#: How deep structs may be within each other; QEMU's are half a dozen deep.
_DEPTH: Final = 32

#: Devices in a description.
_DEVICES: Final = 16384

#: Bytes of JSON about one device, and about all that are no devices.
_LONGEST: Final = 1 << 20

#: Bytes ``,``, ``[`` and ``{`` in what is said of one device.  They bound the number of values,
#: and so what it can cost as Python's objects.  The largest of a usual guest has some 7,000.
_MARKS: Final = 1 << 16

#: Bytes from the subsection's mark to its fields, but for the name.
_SUBSECTION: Final = 6

#: What counts in JSON to tell where an object ends: braces, quotes, and what is no quote.
_TOKEN: Final = re.compile(rb'\\.|["{}\[\]]', re.DOTALL)


def find_description(data: bytes, start: int) -> tuple[int, memoryview] | None:
    """Find the description in the last bytes of a file, where it is the last thing.

    :param data: the end of the file; :data:`MAX_DESCRIPTION` bytes and some are enough.
    :param start: the offset of the first of them.
    :returns: the offset at which the description begins, and its JSON; None: there is none.
    """
    at = len(data)
    # JSON has no control characters, but the four bytes of the size may.
    for _ in range(6):
        at = data.rfind(b"\x06", 0, at)
        if at < 0:
            return None
        size = int.from_bytes(data[at + 1 : at + 5], "big")
        if at + 5 + size == len(data) and data[at + 5 : at + 6] == b"{":
            return start + at, memoryview(data)[at + 5 :]
    return None


@dataclass(frozen=True)
class Device:
    """What is said of one section.

    :ivar name: the section's, as in its header; ``instance`` likewise.
    :ivar vmsd: what QEMU calls the kind of state; the name where it is no vmstate.
    :ivar at: where in the stream this is said.
    """

    name: str
    instance: int
    vmsd: str
    version: int
    at: int
    body: Mapping[str, Any]

    @cached_property
    def size(self) -> int:
        """Bytes of the section's contents.

        :raises StreamError: the description makes no sense.
        """
        return _size(self.body, self.at)

    def decode(self, data: bytes, at: int) -> dict[str, Value]:
        """Return the fields by their names.

        A struct is an object, and so is a subsection, by its whole name; an array is a list.

        :param data: the section's contents.
        :param at: where they begin in the stream.
        :raises StreamError: they are not what is described.
        """
        taking = _Taking(data, at)
        result = taking.struct(self.body, 0)
        if taking.index != len(data):
            raise StreamError(
                at + taking.index,
                f"the end of {self.name!r}, by the description",
                f"{len(data) - taking.index} bytes more",
            )
        return result


class Devices:
    """The description.

    :ivar page_size: the target's.
    """

    def __init__(self, data: bytes | bytearray | memoryview, at: int) -> None:
        """
        :param data: the JSON.
        :param at: where the description begins in the stream.
        :raises StreamError: it is none.
        """
        if len(data) > MAX_DESCRIPTION:
            raise StreamError(
                at, f"a description of at most {MAX_DESCRIPTION} bytes", f"one of {len(data)}"
            )
        self._data = data
        self._at = at + 5
        self._places = list(self._split())
        first, last = (self._places[0][0], self._places[-1][1]) if self._places else (0, 0)
        rest = _object((data[:first], data[last:]), at)
        devices = rest.get("devices")
        if devices != []:
            raise StreamError(at, "a description with a list of devices", f"{str(devices)[:40]!r}")
        self.page_size = _number(rest, "page_size", at)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Device]:
        """Yield the devices in the order of their sections.

        :raises StreamError: one makes no sense.
        """
        for start, end in self._places:
            yield self._device(start, end)

    def sizes(self) -> dict[tuple[str, int], int]:
        """Return the sizes of the sections by name and instance.

        :raises StreamError: the description makes no sense.
        """
        return {key: size for key, (_, _, size) in self._index.items()}

    def find(self, name: str, instance: int) -> Device | None:
        """Return what is said of a section; None: nothing is."""
        found = self._index.get((name, instance))
        return None if found is None else self._device(*found[:2])

    @cached_property
    def _index(self) -> dict[tuple[str, int], tuple[int, int, int]]:
        index = {}
        for start, end in self._places:
            device = self._device(start, end)
            index[device.name, device.instance] = (start, end, device.size)
        return index

    def _device(self, start: int, end: int) -> Device:
        at = self._at + start
        body = _object((self._data[start:end],), at)
        name = _string(body, "name", at)
        return Device(
            name=name,
            instance=_number(body, "instance_id", at),
            vmsd=_string(body, "vmsd_name", at) if "vmsd_name" in body else name,
            version=_number(body, "version", at) if "version" in body else 0,
            at=at,
            body=body,
        )

    def _split(self) -> Iterator[tuple[int, int]]:
        """Yield where each device begins and ends, without having looked at any as a whole."""
        depth = start = opened = count = 0
        key = b""
        inside = quoted = False
        for found in _TOKEN.finditer(self._data):
            token = found[0]
            if token == b'"':
                if quoted and depth == 1:
                    key = bytes(self._data[opened : found.end()])
                quoted, opened = not quoted, found.start()
            elif quoted or len(token) > 1:
                continue
            elif token in b"{[":
                if depth == 1:
                    inside = key == b'"devices"' and token == b"["
                elif depth == 2 and inside:
                    start = found.start()
                depth += 1
            else:
                depth -= 1
                if depth == 2 and inside:
                    count += 1
                    if count > _DEVICES:
                        raise StreamError(
                            self._at + start, f"at most {_DEVICES} devices", "another one"
                        )
                    yield start, found.end()
                inside = inside and depth >= 2


class _Taking:
    """Takes a section's contents apart."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        self.index = 0

    def struct(self, body: Mapping[str, Any], depth: int) -> dict[str, Value]:
        """Take the fields and subsections of a struct."""
        at = self._at + self.index
        if depth > _DEPTH:
            raise StreamError(at, f"structs at most {_DEPTH} deep", "a deeper one")
        result: dict[str, Value] = {}
        for field in _list(body, "fields", at):
            name = _string(field, "name", at)
            value = self._field(field, depth)
            if "index" in field:
                known = result.setdefault(name, [])
                if isinstance(known, list):
                    known.append(value)
                else:
                    result[name] = [known, value]
            elif name in result:
                # a null pointer cuts an array in several
                known = result[name]
                more = value if isinstance(value, list) else [value]
                result[name] = [*(known if isinstance(known, list) else [known]), *more]
            else:
                result[name] = value
        for section in _list(body, "subsections", at):
            result[_string(section, "vmsd_name", at)] = self._subsection(section, depth)
        return result

    def _subsection(self, body: Mapping[str, Any], depth: int) -> Value:
        at = self._at + self.index
        name = _string(body, "vmsd_name", at)
        head = self._take(_SUBSECTION - 4 + len(name.encode()), f"the subsection {name!r}")
        if head != _mark(name):
            raise StreamError(at, f"the subsection {name!r}", head.hex())
        self._take(4, f"the version of {name!r}")
        return self.struct(body, depth + 1)

    def _field(self, field: Mapping[str, Any], depth: int) -> Value:
        at = self._at + self.index
        size = _number(field, "size", at)
        if "array_len" not in field:
            return self._element(field, size, depth)
        count = _number(field, "array_len", at)
        if not size:
            return []
        if count * size > len(self._data) - self.index:
            self._take(count * size, f"{count} times {size} bytes of {field['name']!r}")
        if size == 1 and field.get("type") == "uint8":
            return self._take(count, "").hex()
        return [self._element(field, size, depth) for _ in range(count)]

    def _element(self, field: Mapping[str, Any], size: int, depth: int) -> Value:
        start = self.index
        at = self._at + start
        body = field.get("struct", field if "fields" in field else None)
        if body is not None and size:
            if not isinstance(body, dict):
                raise StreamError(at, f"a struct for {field['name']!r}", "none")
            if _fits(body, size, at) or "struct" in field:
                result = self.struct(body, depth + 1)
                if self.index - start != size:
                    raise StreamError(
                        at,
                        f"{size} bytes of {field['name']!r}, by the description",
                        f"{self.index - start}, by its fields",
                    )
                return result
        kind = field.get("type")
        data = self._take(size, f"{size} bytes of {field['name']!r}")
        return _value(kind if isinstance(kind, str) else "", data)

    def _take(self, size: int, expected: str) -> bytes:
        data = self._data[self.index : self.index + size]
        if len(data) < size:
            raise StreamError(
                self._at + self.index, expected, f"the end of the section after {len(data)}"
            )
        self.index += size
        return data


def _value(kind: str, data: bytes) -> Value:
    match = _INTEGER.fullmatch(kind)
    if match and len(data) * 8 == int(match[2]):
        return int.from_bytes(data, "big", signed=not match[1])
    if kind == "bool" and len(data) == 1:
        return bool(data[0])
    if kind == "timer" and len(data) == 8:
        return int.from_bytes(data, "big", signed=True)
    if kind == "nullptr":
        return None
    return data.hex()


def _fits(body: Mapping[str, Any], size: int, at: int) -> bool:
    """Say whether the fields are all that there is: lists say only what their last element is."""
    return _size(body, at) == size


def _size(body: Mapping[str, Any], at: int, depth: int = 0) -> int:
    if depth > _DEPTH:
        raise StreamError(at, f"subsections at most {_DEPTH} deep", "a deeper one")
    total = 0
    for field in _list(body, "fields", at):
        size = _number(field, "size", at)
        total += size * (_number(field, "array_len", at) if "array_len" in field else 1)
    for section in _list(body, "subsections", at):
        name = _string(section, "vmsd_name", at)
        total += _SUBSECTION + len(name.encode()) + _size(section, at, depth + 1)
    return total


def _mark(name: str) -> bytes:
    data = name.encode()
    return bytes([SectionType.SUBSECTION, len(data) & 0xFF]) + data


def _object(parts: Sequence[bytes | bytearray | memoryview], at: int) -> dict[str, Any]:
    """Return an object of JSON, out of not too many bytes and not too many values."""
    if sum(map(len, parts)) > _LONGEST:
        raise StreamError(at, f"at most {_LONGEST} bytes of JSON for one device", "more")
    data = b"".join(parts)
    if sum(map(data.count, (b",", b"[", b"{"))) > _MARKS:
        raise StreamError(at, f"at most {_MARKS} values in what is said of a device", "more")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        where = getattr(error, "pos", 0)
        raise StreamError(at + where, "JSON in the description", _why(error)) from None
    if not isinstance(value, dict):
        raise StreamError(at, "an object in the description", f"{str(value)[:40]!r}")
    return value


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"something else ({error.msg})"
    return "too many brackets" if isinstance(error, RecursionError) else "no text"


def _list(body: Mapping[str, Any], key: str, at: int) -> Sequence[Mapping[str, Any]]:
    value = body.get(key, [])
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise StreamError(at, f"a list of objects as {key!r} in the description", "none")
    return value


def _number(body: Mapping[str, Any], key: str, at: int) -> int:
    value = body.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise StreamError(at, f"a number as {key!r} in the description", f"{str(value)[:40]!r}")
    return value


def _string(body: Mapping[str, Any], key: str, at: int) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise StreamError(at, f"a name as {key!r} in the description", f"{str(value)[:40]!r}")
    return value
