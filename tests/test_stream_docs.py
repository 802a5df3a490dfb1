"""docs/stream-formats.md says what the code writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from twisted.trial.unittest import SynchronousTestCase

from qmigd.stream import postcopy, writer
from qmigd.stream.format import (
    MAPPED_RAM,
    CommandNumber,
    RamBlock,
    RamFlag,
    SectionType,
)
from qmigd.stream.mapped_ram import encode_bitmap, header_at
from qmigd.stream.multifd import Initial, Packer
from qmigd.stream.records import END_OF_SECTION, RamWriter
from qmigd.stream.return_path import Bitmap, MessageType, PageRequest, Pong, Shut, encode
from tests.rig.examples import hex_examples

_PAGE = Path(__file__).parent.parent / "docs" / "stream-formats.md"


def _pages(count: int, *there: int) -> Any:
    bits = np.zeros(count, bool)
    bits[list(there)] = True
    return bits


def _ram() -> list[Any]:
    ram = RamWriter()
    return [
        writer.section_start(SectionType.START, 2, "ram", 0, 4),
        writer.ram_setup([RamBlock("pc.ram", 2 << 20)]),
        END_OF_SECTION,
        writer.section_end(2),
        writer.section_start(SectionType.PART, 2),
        *ram.zeros("pc.ram", [0x3000, 0x4000]),
        END_OF_SECTION,
        writer.section_end(2),
    ]


_PACKET = bytes(
    Packer().pages(7, "pc.ram", [0x3000, 0x4000], [bytes(range(256)) * 32], [0x9000])[0]
)

#: What the examples are, in their order on the page.
_EXAMPLES: list[list[Any]] = [
    [writer.header(), writer.configuration("pc", capabilities=[MAPPED_RAM])],
    [
        writer.section_start(SectionType.FULL, 7, "timer", 0, 2),
        b"\xca\xfe",
        writer.section_end(7),
        writer.end(),
        writer.description(b"{}"),
    ],
    _ram(),
    [
        writer.open_return_path(),
        writer.ping(1),
        postcopy.advise(postcopy.Advice(4096, 4096)),
    ],
    [
        *postcopy.discard("pc.ram", [[0x7000, 0x10000]]),
        *postcopy.packaged([postcopy.listen(), writer.ping(3), postcopy.run()]),
    ],
    [
        encode(Pong(1)),
        encode(PageRequest("pc.ram", 0x3000, 0x1000)),
        encode(PageRequest("", 0x4000, 0x1000)),
        encode(Bitmap("pc.ram", _pages(16, 0, 9))),
        encode(Shut(0)),
    ],
    [Initial(UUID("5d3c9a52-7d0e-4a57-9a11-6b1f9f0d7a01"), 1).encode()],
    [_PACKET[:36]],
    [_PACKET[320:344]],
    [header_at(113, 64 << 20).encode()],
    [encode_bitmap(_pages(66, 0, 9, 65))],
]


class FormatsPage(SynchronousTestCase):
    """The page is true."""

    text = _PAGE.read_text()

    def test_examples(self) -> None:
        """The bytes of each example are those that the code writes."""
        expected = [b"".join(example).hex(" ") for example in _EXAMPLES]
        self.assertEqual([data.hex(" ") for data in hex_examples(self.text)], expected)

    def test_numbers(self) -> None:
        """The tables have every command, every message and every flag of RAM with its number."""
        named = re.findall(r"^\| `?(\w+)`? \| ([A-Z_]+) \|", self.text, re.MULTILINE)
        expected = {(str(one.value), one.name) for one in MessageType}
        expected |= {
            (str(one.value), one.name) for one in CommandNumber if one is not CommandNumber.FEATURES
        }
        expected |= {(f"{flag.value:03x}", str(flag.name)) for flag in RamFlag}
        self.assertEqual(set(named), expected)
