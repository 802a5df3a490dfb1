"""Small good inputs of each kind, for the fuzzer to begin with."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from uuid import UUID

import numpy as np

from qmigd.stream import multifd, postcopy, return_path, writer
from qmigd.stream.format import CommandNumber, RamBlock, RamFlag, SectionType
from qmigd.stream.records import RamWriter
from tests.fuzz.target import KINDS, PAGE

__all__ = ["seeds"]

_BLOCKS = (RamBlock("a", 8 * PAGE), RamBlock("b", 2 * PAGE))
_EOS = struct.pack(">Q", RamFlag.EOS)
_PAGES = np.arange(3 * PAGE, dtype=np.uint32).astype(np.uint8).reshape(3, PAGE)
_FIELDS = [
    {"name": "x", "type": "uint32", "size": 4},
    {"name": "y", "array_len": 2, "type": "int8", "size": 1},
    {"name": "s", "type": "struct", "size": 1, "struct": {
        "vmsd_name": "in", "version": 1, "fields": [{"name": "b", "type": "bool", "size": 1}]}},
    {"name": "z", "index": 0, "type": "nullptr", "size": 1},
    {"name": "t", "type": "tmp", "size": 2, "vmsd_name": "tmp", "version": 1,
     "fields": [{"name": "u", "type": "uint16", "size": 2}]},
]  # fmt: skip
_DEVICE = {
    "name": "dev", "instance_id": 0, "vmsd_name": "dev", "version": 1, "fields": _FIELDS,
    "subsections": [{"vmsd_name": "dev/sub", "version": 1, "fields": [
        {"name": "w", "type": "buffer", "size": 3}]}],
}  # fmt: skip
_JSON = json.dumps({"page_size": PAGE, "devices": [_DEVICE]}).encode()
_STATE = b"\0\0\0\1\2\3\1" + b"0" + b"\0\5" + b"\x05\x07dev/sub\0\0\0\1abc"


def seeds() -> Iterator[bytes]:
    """Yield them, each whole and in small pieces."""
    for kind, every in (
        ("stream", _streams()),
        ("file", _streams()),
        ("records", [_records() + _EOS]),
        ("resumed", [_resumed()]),
        ("multifd", [_multifd(name) for name in multifd.COMPRESSIONS]),
        ("return path", [_return_path()]),
        ("device", [len(_JSON).to_bytes(2, "big") + _JSON + _STATE]),
    ):
        for data in every:
            for pieces in (0, 7):
                yield bytes([list(KINDS).index(kind), pieces]) + data


def _records() -> bytes:
    ram = RamWriter(PAGE)
    parts = [
        *ram.pages("a", [0, PAGE], _PAGES[:2]),
        *ram.zeros("b", [0, PAGE]),
        ram.xbzrle("a", 0, b"\3\2xy"),
        *ram.pages("a", [2 * PAGE], _PAGES[2:]),
    ]
    return b"".join(bytes(part) for part in parts)


def _device() -> bytes:
    head = writer.section_start(SectionType.FULL, 7, "dev", 0, 1)
    return head + _STATE + writer.section_end(7)


def _beginning(capabilities: Sequence[str] | None = None) -> bytes:
    return (
        writer.header()
        + writer.configuration("pc", page_bits=10, capabilities=capabilities)
        + writer.open_return_path()
    )


def _part(records: bytes) -> bytes:
    return writer.section_start(SectionType.PART, 2) + records + _EOS + writer.section_end(2)


def _streams() -> list[bytes]:
    ram = writer.section_start(SectionType.START, 2, "ram", 0, 4)
    setup = ram + writer.ram_setup(_BLOCKS) + _EOS + writer.section_end(2)
    flush = struct.pack(">QQ", RamFlag.MULTIFD_FLUSH, RamFlag.HOOK)
    end = writer.end() + writer.description(_JSON)
    package = postcopy.listen() + _device() + postcopy.run()
    advise = postcopy.advise(postcopy.Advice((2 << 20) | 4096, PAGE))
    shared = (RamBlock("a", PAGE, address=4096),)
    return [
        _beginning() + setup + _part(_records() + flush) + _device() + end,
        _beginning() + writer.command(CommandNumber.POSTCOPY_ADVISE, advise[5:]) + setup
        + _part(_records()) + b"".join(bytes(part) for part in postcopy.packaged([package]))
        + _part(_records()) + writer.end(),
        _beginning(["x-ignore-shared"]) + ram + writer.ram_setup(shared) + _EOS
        + writer.section_end(2) + end,
        _mapped(ram) + end,
    ]  # fmt: skip


def _mapped(ram: bytes) -> bytes:
    """A file, with its pages nearer to it than QEMU would have them."""
    start = _beginning(["mapped-ram"]) + ram
    at = len(start) + 8 + 2 + 8 + 28
    block = struct.pack(">Q", 4 * PAGE | RamFlag.MEM_SIZE) + b"\1a" + struct.pack(">Q", 4 * PAGE)
    header = struct.pack(">IQQQ", 1, PAGE, at, at + 16)
    return (
        start + block + header + b"\5" + bytes(15) + bytes(4 * PAGE) + _EOS + writer.section_end(2)
    )


def _resumed() -> bytes:
    return postcopy.recv_bitmap("a") + postcopy.resume() + _part(_records()) + writer.end()


def _multifd(compression: str) -> bytes:
    packer = multifd.Packer(page_size=PAGE, compression=compression)
    parts = [
        multifd.Initial(UUID(int=1), 0).encode(),
        *packer.pages(1, "a", [0, PAGE], [_PAGES[:2].tobytes()], [2 * PAGE]),
        packer.sync(2),
        *packer.device_state("dev", 0, b"state"),
    ]
    return b"".join(bytes(part) for part in parts)


def _return_path() -> bytes:
    messages = (
        return_path.Pong(3),
        return_path.PageRequest("a", 0, PAGE),
        return_path.ResumeAck(),
        return_path.SwitchoverAck(),
        return_path.Shut(0),
    )
    return b"".join(return_path.encode(message) for message in messages)
