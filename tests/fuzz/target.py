"""What has to hold, whatever bytes there are.

They are read, or refused with a StreamError; nothing else comes out of it.  What a stream means
does not depend on the pieces in which it comes.  And no input makes anything large: what is
allocated for RAM is given by the target, and never more than :data:`MOST`.

The first byte says what the others are taken for, the second in which pieces they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from qmigd.errors import StreamError
from qmigd.stream.devices import Devices, find_description
from qmigd.stream.events import (
    Description,
    DeviceData,
    Event,
    MappedBlock,
    Pages,
    RamBlocks,
    SectionStart,
    Zeros,
)
from qmigd.stream.format import RamBlock, SectionType
from qmigd.stream.multifd import DeviceState, PageData, Unpacker
from qmigd.stream.ram import RamImage
from qmigd.stream.reader import Reader
from qmigd.stream.return_path import ReturnPath
from qmigd.stream.summary import Summary

__all__ = ["KINDS", "MOST", "PAGE", "check"]

#: Bytes of RAM that a stream may have here.
MOST = 1 << 20

#: The page size where the bytes do not say it; small, so that much goes into few bytes.
PAGE = 1024

_BLOCKS = (RamBlock("a", 8 * PAGE), RamBlock("b", 2 * PAGE))
_SECTION = SectionStart(0, SectionType.START, 2, "ram", 0, 4)


def check(data: bytes) -> str:
    """Take some bytes for one of :data:`KINDS`; returns what is wrong with them, or nothing.

    :raises Exception: what has to hold does not.
    """
    if len(data) < 2:
        return ""
    kind = list(KINDS.values())[data[0] % len(KINDS)]
    whole = kind(data[2:], len(data))
    if data[1] and kind is not _file:
        assert whole == kind(data[2:], data[1]), "the pieces make a difference"
    return whole[1]


def _pieces(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def _place(block: RamBlock) -> bytearray:
    if block.length > MOST:
        raise StreamError(0, f"RAM of at most {MOST} bytes", str(block.length))
    return bytearray(block.length)


def _events(reader: Reader, data: bytes, size: int) -> Iterator[Event]:
    for piece in _pieces(data, size):
        yield from reader.feed(piece)
    yield from reader.close()


def _read(
    reader: Reader, data: bytes, size: int, blocks: tuple[RamBlock, ...] = ()
) -> tuple[list[object], str]:
    """Read a stream; returns what does not depend on the pieces, and the error."""
    found: list[object] = []
    summary = Summary()
    image = RamImage(_place, PAGE)
    image.take(RamBlocks(0, 0, blocks))
    told = ""
    mapped = False
    try:
        for event in _events(reader, data, size):
            summary.page_size = reader.page_size
            summary.take(event)
            match event:
                case Pages():
                    for at, row in zip(event.offsets.tolist(), event.data, strict=True):
                        found.append((event.block, at, row.tobytes()))
                case Zeros():
                    found += [(event.block, at, event.fill) for at in event.offsets.tolist()]
                case DeviceData():
                    found += event.data
                case Description():
                    _decode(summary, event)
            mapped = mapped or isinstance(event, MappedBlock)
            if reader.page_size == PAGE:
                image.take(event)
    except StreamError as error:
        told = error.text
    summary.finish(reader.position)
    if not mapped:
        assert sum(summary.kinds.values()) == reader.position, "every byte is counted"
    summary.capabilities()
    return found, told


def _decode(summary: Summary, description: Description) -> None:
    devices = Devices(description.data, description.at)
    for section in summary.sections.values():
        device = devices.find(section.name, section.instance)
        if device is not None and section.data is not None:
            device.decode(section.data, section.start)


def _stream(data: bytes, size: int) -> tuple[object, str]:
    return _read(Reader(page_size=PAGE), data, size)


def _file(data: bytes, size: int) -> tuple[object, str]:
    """Look at the end first."""
    sizes: Mapping[tuple[str, int], int] = {}
    try:
        if found := find_description(data, 0):
            sizes = Devices(found[1], found[0]).sizes()
    except StreamError:
        pass
    return _read(Reader(page_size=PAGE, sizes=sizes), data, size)


def _records(data: bytes, size: int) -> tuple[object, str]:
    return _read(Reader(page_size=PAGE, blocks=_BLOCKS, records_only=True), data, size, _BLOCKS)


def _resumed(data: bytes, size: int) -> tuple[object, str]:
    reader = Reader(page_size=PAGE, blocks=_BLOCKS, header=False, sections=(_SECTION,))
    return _read(reader, data, size, _BLOCKS)


def _multifd(data: bytes, size: int) -> tuple[object, str]:
    unpacker = Unpacker(page_size=PAGE, blocks={block.name: block.length for block in _BLOCKS})
    summary = Summary()
    found: list[object] = []
    try:
        for piece in _pieces(data, size):
            for packet in unpacker.feed(piece):
                summary.take_packet(0, packet)
                match packet:
                    case PageData():
                        found += packet.packet.normal.tolist()
                        found += packet.packet.zero.tolist()
                        found.append(packet.data.tobytes())
                    case DeviceState():
                        found += bytes(packet.data)
        unpacker.end()
    except StreamError as error:
        return found, error.text
    return found, ""


def _return_path(data: bytes, size: int) -> tuple[object, str]:
    path = ReturnPath({block.name: block.length for block in _BLOCKS}, PAGE)
    found = []
    try:
        for piece in _pieces(data, size):
            for message in path.feed(piece):
                found.append(repr(message))
        path.end()
    except StreamError as error:
        return found, error.text
    return found, ""


def _device(data: bytes, size: int) -> tuple[object, str]:
    """A description, its length in front, and then the contents of a section."""
    del size
    length = int.from_bytes(data[:2], "big")
    try:
        devices = Devices(data[2 : 2 + length], 0)
        return [device.decode(data[2 + length :], 0) for device in devices], ""
    except StreamError as error:
        return [], error.text


#: What the bytes may be taken for.
KINDS: Mapping[str, Callable[[bytes, int], tuple[object, str]]] = {
    "stream": _stream,
    "file": _file,
    "records": _records,
    "resumed": _resumed,
    "multifd": _multifd,
    "return path": _return_path,
    "device": _device,
}
