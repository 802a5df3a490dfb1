"""Writes QEMU's stream: the frame of sections and commands, and what a reader's events were.

::

    header          "QEVM" version:u32
    configuration   07 length:u32 machine type, then its subsections
    subsection      05 name version:u32 data
    section         01 START or 04 FULL  id:u32 name instance:u32 version:u32 data [footer]
                    02 PART or 03 END    id:u32 data [footer]
    footer          7e id:u32
    command         08 number:u16 length:u16 data
    end             00
    description     06 length:u32 JSON
    RAM's setup     total | MEM_SIZE  u64
                    (name length:u64 [page size:u64] [address:u64] [mapped-ram header])*
                    EOS  u64

A name is a byte with its length, and that many bytes.  Integers are big-endian.  The functions
return one thing each; :class:`Writer` takes the events of a reader and returns the bytes they were
read from.  Records of RAM are in ``records``, commands of postcopy in ``postcopy``, what
goes through multifd channels in ``multifd``, files with ``mapped-ram`` in ``mapped_ram``.

Source: migration/savevm.c, vmstate.c and ram.c of QEMU.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final

from qmigd.stream.events import (
    Command,
    Compressed,
    Configuration,
    Description,
    DeviceData,
    End,
    Event,
    Header,
    Hook,
    MultifdFlush,
    Package,
    PackageEnd,
    Pages,
    RamBlocks,
    SectionEnd,
    SectionStart,
    Xbzrle,
    Zeros,
)
from qmigd.stream.format import (
    CONFIGURATION_CAPABILITIES,
    CONFIGURATION_PAGE_BITS,
    CONFIGURATION_UUID,
    DEFAULT_PAGE_SIZE,
    MAGIC,
    RAM_NAME,
    VERSION,
    CommandNumber,
    RamBlock,
    RamFlag,
    SectionType,
)
from qmigd.stream.names import counted
from qmigd.stream.pieces import Buffer
from qmigd.stream.records import END_OF_SECTION, HOOK, MULTIFD_FLUSH, RamWriter

__all__ = [
    "Writer",
    "command",
    "configuration",
    "description",
    "end",
    "header",
    "open_return_path",
    "ping",
    "ram_setup",
    "section_end",
    "section_start",
    "subsection",
    "switchover_start",
]

#: Those of a section that say whose it is.
_NAMED: Final = (SectionType.START, SectionType.FULL)


def header(version: int = VERSION) -> bytes:
    """Return what a stream begins with."""
    return MAGIC + struct.pack(">I", version)


def configuration(
    machine: str,
    *,
    page_bits: int | None = None,
    capabilities: Sequence[str] | None = None,
    uuid: bytes | None = None,
) -> bytes:
    """Return what both ends have to have in common; see :class:`.events.Configuration`."""
    name = machine.encode()
    parts = [struct.pack(">BI", SectionType.CONFIGURATION, len(name)), name]
    if page_bits is not None:
        parts.append(subsection(CONFIGURATION_PAGE_BITS, 1, struct.pack(">I", page_bits)))
    if capabilities is not None:
        listed = struct.pack(">I", len(capabilities)) + b"".join(map(counted, capabilities))
        parts.append(subsection(CONFIGURATION_CAPABILITIES, 1, listed))
    if uuid is not None:
        parts.append(subsection(CONFIGURATION_UUID, 1, uuid))
    return b"".join(parts)


def subsection(name: str, version: int, data: Buffer) -> bytes:
    """Return a subsection: what the configuration, or a device's state, has where it has to."""
    return b"".join(
        (bytes([SectionType.SUBSECTION]), counted(name), struct.pack(">I", version), data)
    )


def section_start(
    kind: SectionType, number: int, name: str = "", instance: int = 0, version: int = 0
) -> bytes:
    """Return what a section begins with.

    :param name: of the device; it, the instance and the version are in START and FULL only.
    """
    head = struct.pack(">BI", kind, number)
    if kind not in _NAMED:
        return head
    return head + counted(name) + struct.pack(">II", instance, version)


def section_end(number: int) -> bytes:
    """Return a section's footer."""
    return struct.pack(">BI", SectionType.FOOTER, number)


def command(number: int, data: Buffer = b"") -> bytes:
    """Return a command.

    :raises ValueError: it has more data than a length of 16 bits says.
    """
    if len(data) > 0xFFFF:
        raise ValueError(f"A command has at most 65535 bytes of data, not {len(data)}.")
    return struct.pack(">BHH", SectionType.COMMAND, number, len(data)) + bytes(data)


def open_return_path() -> bytes:
    """Return the command after which the destination answers."""
    return command(CommandNumber.OPEN_RETURN_PATH)


def ping(value: int) -> bytes:
    """Return the command that a PONG with the same value answers."""
    return command(CommandNumber.PING, struct.pack(">I", value))


def switchover_start() -> bytes:
    """Return what says that the guest has stopped (QEMU 10.0)."""
    return command(CommandNumber.SWITCHOVER_START)


def ram_setup(blocks: Iterable[RamBlock], total: int | None = None) -> bytes:
    """Return RAM's setup, without its EOS.

    :param total: bytes of all blocks; left out: their sum.
    """
    every = tuple(blocks)
    if total is None:
        total = sum(block.length for block in every)
    return struct.pack(">Q", total | RamFlag.MEM_SIZE) + b"".join(map(ram_block, every))


def ram_block(block: RamBlock) -> bytes:
    """Return a block's part of the setup."""
    parts = [counted(block.name), struct.pack(">Q", block.length)]
    parts += [
        struct.pack(">Q", value) for value in (block.page_size, block.address) if value is not None
    ]
    if block.mapped is not None:
        parts.append(block.mapped.encode())
    return b"".join(parts)


def end() -> bytes:
    """Return what a stream ends with, but for the description."""
    return bytes([SectionType.EOF])


def description(data: Buffer) -> bytes:
    """Return the description of the devices' sections.

    :param data: JSON.
    """
    return struct.pack(">BI", SectionType.DESCRIPTION, len(data)) + bytes(data)


class Writer:
    """Writes what a reader has read, event by event.

    What QEMU has written comes out the same to the byte, if nothing is changed.  Events may be
    left out, changed and put in between: a record of RAM names its block where it has to.
    """

    def __init__(self, page_size: int = DEFAULT_PAGE_SIZE) -> None:
        """Begin a stream.

        :param page_size: the target's, in bytes; a configuration with one overrides it.
        """
        self._ram = RamWriter(page_size)
        self._in_ram = False

    def write(self, event: Event) -> list[Buffer]:
        """Return what an event is in the stream.

        What belongs to RAM may be views of the event's data.

        :raises ValueError: it is part of a file, not of a stream (``mapped-ram``).
        """
        match event:
            case Pages():
                named = event.named or None
                return self._ram.pages(event.block, event.offsets, event.data, named=named)
            case Zeros():
                named = event.named or None
                return self._ram.zeros(event.block, event.offsets, event.fill, named=named)
            case DeviceData():
                return [event.data]
            case SectionEnd():
                return self._section_end(event)
        return [self._small(event)]

    def _section_end(self, event: SectionEnd) -> list[Buffer]:
        parts: list[Buffer] = [END_OF_SECTION] if self._in_ram else []
        self._in_ram = False
        return [*parts, section_end(event.id)] if event.footer else parts

    def _small(self, event: Event) -> bytes:
        match event:
            case Header():
                return header(event.version)
            case Configuration():
                if event.page_bits is not None:
                    self._ram = RamWriter(1 << event.page_bits)
                return configuration(
                    event.machine,
                    page_bits=event.page_bits,
                    capabilities=event.capabilities,
                    uuid=event.uuid,
                )
            case SectionStart():
                self._in_ram = event.name == RAM_NAME
                return section_start(
                    event.kind, event.id, event.name, event.instance, event.version
                )
            case RamBlocks():
                return ram_setup(event.blocks, event.total)
            case Xbzrle():
                named = event.named or None
                return self._ram.xbzrle(event.block, event.page, event.data, named=named)
            case Compressed():
                named = event.named or None
                return self._ram.compressed(event.block, event.page, event.data, named=named)
            case MultifdFlush():
                return MULTIFD_FLUSH
            case Hook():
                return HOOK
            case Command():
                return command(event.number, event.data)
            case Package():
                return command(CommandNumber.PACKAGED, struct.pack(">I", event.length))
            case PackageEnd():
                return b""
            case End():
                return end()
            case Description():
                return description(event.data)
        raise ValueError(f"{type(event).__name__} is part of a file with mapped-ram.")
