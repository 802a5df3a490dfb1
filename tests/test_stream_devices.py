"""Devices are decoded by the description, which is trusted as little as the rest."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import StreamError
from qmigd.stream.devices import Devices, find_description
from qmigd.stream.format import MAX_DESCRIPTION


def described(*devices: Any, **more: Any) -> Devices:
    """Return a description of these devices."""
    body = {"configuration": {"devices": [1]}, "page_size": 4096, "devices": devices, **more}
    return Devices(json.dumps(body).encode(), 1000)


def device(*fields: Any, **more: Any) -> dict[str, Any]:
    return {
        "name": "it",
        "instance_id": 0,
        "vmsd_name": "IT",
        "version": 3,
        "fields": fields,
        **more,
    }


def field(name: str, kind: str, size: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "type": kind, "size": size, **more}


def struct(*fields: Any, **more: Any) -> dict[str, Any]:
    return {"vmsd_name": "inner", "version": 1, "fields": fields, **more}


class DecodeTests(SynchronousTestCase):
    def decoded(self, one: dict[str, Any], data: bytes) -> Any:
        (found,) = described(one)
        self.assertEqual(len(data), found.size)
        return found.decode(data, 500)

    def test_values(self) -> None:
        """Each type becomes what it is, and what is not known its bytes."""
        for kind, data, value in (
            ("int8", b"\xfe", -2),
            ("uint8", b"\xfe", 254),
            ("int16", b"\xff\xfe", -2),
            ("uint32", b"\0\1\0\0", 65536),
            ("uint32 equal", b"\0\0\0\7", 7),
            ("int32 le", b"\0\0\0\7", 7),
            ("int64", b"\xff" * 8, -1),
            ("timer", b"\xff" * 8, -1),
            ("uint64", b"\xff" * 8, 2**64 - 1),
            ("bool", b"\1", True),
            ("nullptr", b"0", None),
            ("buffer", b"abc", "616263"),
            ("unused_buffer", b"\0\0", "0000"),
            ("something new", b"xy", "7879"),
            ("uint32", b"\1\2", "0102"),
            ("bool", b"\1\2", "0102"),
        ):
            self.assertEqual(
                {"f": value}, self.decoded(device(field("f", kind, len(data))), data), kind
            )

    def test_arrays(self) -> None:
        """Arrays are lists, however they are described; one of bytes is hexadecimal."""
        fields = (
            field("a", "uint16", 2, array_len=3),
            field("b", "uint8", 1, array_len=3),
            field("c", "uint8", 1, index=0),
            field("c", "nullptr", 1, index=1),
            field("d", "int8", 1, array_len=2),
            field("d", "nullptr", 1),
            field("e", "buffer", 0, array_len=1 << 40),
        )
        self.assertEqual(
            {"a": [1, 2, 3], "b": "010203", "c": [5, None], "d": [6, 7, None], "e": []},
            self.decoded(device(*fields), b"\0\1\0\2\0\3\1\2\3\5" + b"0\6\7" + b"0"),
        )

    def test_structs(self) -> None:
        """Structs are objects, in arrays as well, whether they are named or not."""
        inner = struct(field("x", "uint8", 1), field("y", "int8", 1))
        fields = (
            field("s", "struct", 2, struct=inner),
            field("t", "struct", 2, array_len=2, struct=inner),
            field("u", "struct", 2, index=0, struct=inner),
            field("v", "tmp", 2, **inner),
            field("q", "qtailq", 7, **inner),
        )
        one = {"x": 1, "y": 2}
        self.assertEqual(
            {"s": one, "t": [one, one], "u": [one], "v": one, "q": "01010201010200"},
            self.decoded(device(*fields), b"\1\2" * 5 + b"\1\1\2\1\1\2\0"),
        )

    def test_subsections(self) -> None:
        """A subsection is a field by its whole name, within another one as well."""
        deep = struct(field("z", "uint8", 1), vmsd_name="it/sub/deep")
        sub = struct(field("y", "uint8", 1), vmsd_name="it/sub", subsections=[deep])
        data = b"\1\x05\x06it/sub\0\0\0\1\2\x05\x0bit/sub/deep\0\0\0\1\3"
        self.assertEqual(
            {"x": 1, "it/sub": {"y": 2, "it/sub/deep": {"z": 3}}},
            self.decoded(device(field("x", "uint8", 1), subsections=[sub]), data),
        )
        inside = struct(field("x", "uint8", 1), subsections=[deep])
        self.assertEqual(
            {"s": {"x": 1, "it/sub/deep": {"z": 3}}},
            self.decoded(
                device(field("s", "struct", 19, struct=inside)), b"\1\x05\x0bit/sub/deep\0\0\0\1\3"
            ),
        )

    def test_several(self) -> None:
        """Devices are found by name and instance, and their sizes are known."""
        other = device(field("f", "uint32", 4, array_len=2), instance_id=1)
        devices = described(device(), other, device(name="old", vmsd_name="x"))
        self.assertEqual({("it", 0): 0, ("it", 1): 8, ("old", 0): 0}, devices.sizes())
        self.assertEqual(3, len(devices))
        self.assertEqual(4096, devices.page_size)
        found = devices.find("it", 1)
        assert found is not None
        self.assertEqual(("it", 1, "IT", 3, 8), (
            found.name, found.instance, found.vmsd, found.version, found.size
        ))  # fmt: skip
        self.assertIsNone(devices.find("it", 2))
        self.assertEqual(0, len(described()))


class WrongTests(SynchronousTestCase):
    def test_contents(self) -> None:
        """Contents that are not what is described are refused, with the place."""
        sub = struct(field("y", "uint8", 1), vmsd_name="it/sub")
        for one, data, at, text in (
            (device(field("f", "uint32", 4)), b"abc", 500, "4 bytes of 'f'"),
            (device(field("f", "uint32", 4)), b"abcde", 504, "the end of 'it'"),
            (device(field("f", "uint8", 1, array_len=9)), b"abc", 500, "9 times 1 bytes"),
            (device(field("f", "int64", 8, array_len=1 << 47)), b"abc", 500, "times 8 bytes"),
            (device(subsections=[sub]), b"\x05\x06it/xxx\0\0\0\1a", 500, "subsection 'it/sub'"),
            (
                device(field("s", "struct", 3, struct=struct(field("x", "uint8", 1)))),
                b"abc", 500, "3 bytes of 's'",
            ),
            (device(field("s", "struct", 3, struct=7)), b"abc", 500, "a struct for 's'"),
        ):  # fmt: skip
            (found,) = described(one)
            with self.assertRaises(StreamError) as caught:
                found.decode(data, 500)
            self.assertEqual(at, caught.exception.offset, text)
            self.assertIn(text, caught.exception.expected)

    def test_description(self) -> None:
        """A description that makes no sense is refused."""
        deep: dict[str, Any] = device(field("x", "uint8", 1))
        for _ in range(40):
            deep = device(field("s", "struct", 1, struct=deep))
        nested = device()
        for _ in range(40):
            nested = device(subsections=[nested])
        for data in (
            b"",
            b"[]",
            b"{}",
            b"nonsense",
            b'{"page_size": 4096}',
            b'{"page_size": 4096, "devices": {}}',
            b'{"page_size": "x", "devices": []}',
            b"[" * 100_000,
            b'{"a":' * 30_000,
            b"\xff\xfe",
            b'{"page_size": ' + b"9" * 5000 + b', "devices": []}',
            b'{"page_size": 4096, "devices": [[]]}',
            b'{"page_size": 4096, "devices": [7]}',
            *(
                json.dumps({"page_size": 4096, "devices": [one]}).encode()
                for one in (
                    {},
                    {"name": 7},
                    device(name=None),
                    device(instance_id=-1),
                    device(version=True),
                    device(fields=None) | {"fields": {}},
                    device(7),
                    device(field("f", "uint8", -1)),
                    device(field("f", "uint8", 1 << 60)),
                    device({"name": "f"}),
                    nested,
                )
            ),
        ):
            with self.assertRaises(StreamError, msg=str(data[:80])):
                Devices(data, 0).sizes()
        (found,) = described(deep)
        with self.assertRaisesRegex(StreamError, "structs at most 32 deep"):
            found.decode(b"a", 0)

    def test_memory(self) -> None:
        """However much JSON there is, it does not become many times that."""
        many = b",".join([b'{"name":"a","instance_id":0,"fields":[]}'] * 500)
        for data in (
            b'{"page_size": 4096, "devices": [{"name": "it", "fields": [' + b"{}," * 60_000,
            b'{"page_size": 4096, "x": [' + b"[]," * 60_000 + b'0], "devices": []}',
            b'{"page_size": 4096, "devices": [' + many + b"]}",
            b'{"' + rb"\"" * 60_000,
            b'{"' + b"x" * 100_000,
        ):
            tracemalloc.start()
            with contextlib.suppress(StreamError):
                Devices(data, 0).sizes()
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.assertLess(peak, 2 << 20)
        self.assertRaises(StreamError, Devices, bytes(MAX_DESCRIPTION + 1), 0)

    @settings(deadline=None)
    @given(
        st.recursive(
            st.none() | st.integers(-1, 9) | st.sampled_from(["uint8", "struct", "it"]),
            lambda inner: st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["name", "type", "size", "fields", "struct", "index", "array_len",
                     "subsections", "vmsd_name", "instance_id", "version"]
                ),
                inner,
            ),
            max_leaves=30,
        ),
        st.binary(max_size=20),
    )  # fmt: skip
    def test_anything(self, one: Any, data: bytes) -> None:
        """Whatever is said of a device, its contents are decoded or refused."""
        with contextlib.suppress(StreamError):
            for found in described(one):
                found.decode(data, 0)


class FindTests(SynchronousTestCase):
    @given(st.binary(max_size=60), st.integers(0, 1 << 40), st.integers(0, 300))
    def test_found(self, before: bytes, start: int, spaces: int) -> None:
        """The description is found at the end, whatever is in front of it."""
        text = json.dumps({"page_size": 4096, "devices": []}).encode() + b" " * spaces
        data = before + b"\x06" + len(text).to_bytes(4, "big") + text
        self.assertEqual((start + len(before), text), find_description(data, start))

    @given(st.binary(max_size=60))
    def test_none(self, data: bytes) -> None:
        """Where there is none, none is found."""
        self.assertIsNone(find_description(data + b"\x06\0\0\0\x09{}", 0))

    def test_size_of_sixes(self) -> None:
        """A size that looks like the mark of a description is no obstacle."""
        text = b"{}".ljust(0x0606)
        data = b"\x06" + len(text).to_bytes(4, "big") + text
        self.assertEqual((0, text), find_description(data, 0))
