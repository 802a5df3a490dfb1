"""The numbers of QEMU's migration stream, and what its sections are made of.

Offers: the magic and the versions, :class:`SectionType`, :class:`Command` numbers
(:class:`CommandNumber`) with the lengths that they have to have, :class:`RamFlag`, the limits
that a reader keeps, and the small records that events and the writer share
(:class:`RamBlock`, :class:`MappedHeader`).

All integers in the stream are big-endian.  The constants are QEMU's own, from migration/savevm.h,
migration/savevm.c, migration/ram.h, migration/ram.c and migration/qemu-file.h; each one
says which.  Nothing here needs numpy, so that others may take a constant without it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from qmigd.errors import StreamError

__all__ = [
    "COMMAND_LENGTHS",
    "CONFIGURATION",
    "CONFIGURATION_CAPABILITIES",
    "CONFIGURATION_PAGE_BITS",
    "CONFIGURATION_UUID",
    "DEFAULT_PAGE_SIZE",
    "ENCODING_FLAG_XBZRLE",
    "IGNORE_SHARED",
    "MAGIC",
    "MAPPED_HEADER",
    "MAPPED_RAM",
    "MAPPED_VERSION",
    "MAX_DESCRIPTION",
    "MAX_RAM_BLOCKS",
    "MAX_SECTIONS",
    "MAX_STRING",
    "RAM_NAME",
    "RAM_VERSION",
    "VERSION",
    "CommandNumber",
    "MappedHeader",
    "RamBlock",
    "RamFlag",
    "SectionType",
    "StreamError",
]

#: QEMU_VM_FILE_MAGIC and QEMU_VM_FILE_VERSION (migration/savevm.c, savevm.h).
MAGIC: Final = b"QEVM"
VERSION: Final = 3


class SectionType(IntEnum):
    """The byte with which each part of the stream begins: QEMU_VM_* of migration/savevm.h."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    DESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class CommandNumber(IntEnum):
    """What a COMMAND asks for: MIG_CMD_* of migration/savevm.c."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11
    #: Not QEMU's: what the handshake's in-band form says before the stream (docs/protocol).
    #: QEMU's own are counted from 1; this is far from them. "FE", for features.
    FEATURES = 0x4645


#: The lengths that a command's data may have; a command that is not here has any.
COMMAND_LENGTHS: Final[Mapping[int, tuple[int, ...]]] = {
    CommandNumber.OPEN_RETURN_PATH: (0,),
    CommandNumber.PING: (4,),
    CommandNumber.POSTCOPY_ADVISE: (0, 16),
    CommandNumber.POSTCOPY_LISTEN: (0,),
    CommandNumber.POSTCOPY_RUN: (0,),
    CommandNumber.PACKAGED: (4,),
    CommandNumber.ENABLE_COLO: (0,),
    CommandNumber.POSTCOPY_RESUME: (0,),
    CommandNumber.SWITCHOVER_START: (0,),
}


class RamFlag(IntFlag):
    """The low bits of the offset with which each record of RAM begins: migration/ram.h."""

    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10
    CONTINUE = 0x20
    XBZRLE = 0x40
    HOOK = 0x80
    #: Up to QEMU 9.0.
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


#: ENCODING_FLAG_XBZRLE of migration/ram.c: the only encoding of an XBZRLE record.
ENCODING_FLAG_XBZRLE: Final = 0x01

#: The section that RAM is in, and its version (ram_mig_init() in migration/ram.c).
RAM_NAME: Final = "ram"
RAM_VERSION: Final = 4

#: The names of vmstate_configuration and of its subsections (migration/savevm.c).
CONFIGURATION: Final = "configuration"
CONFIGURATION_PAGE_BITS: Final = "configuration/target-page-bits"
CONFIGURATION_CAPABILITIES: Final = "configuration/capabilities"
CONFIGURATION_UUID: Final = "configuration/uuid"

#: The two capabilities that change how RAM is laid out, and that the configuration therefore names.
IGNORE_SHARED: Final = "x-ignore-shared"
MAPPED_RAM: Final = "mapped-ram"

#: TARGET_PAGE_SIZE of most targets, x86 among them.  Others say theirs in the configuration.
DEFAULT_PAGE_SIZE: Final = 4096

#: MappedRamHeader of migration/ram.c: version, page size, where the bitmap is, where the pages are.
MAPPED_HEADER: Final = struct.Struct(">IQQQ")
MAPPED_VERSION: Final = 1

#: Bytes in a counted string (one byte says how many), and in a machine type's name, whose
#: length has 32 bits in the stream.
MAX_STRING: Final = 255

#: Blocks of RAM in a stream.  A guest has some dozen; one with hundreds of PCI devices, a thousand.
MAX_RAM_BLOCKS: Final = 4096

#: Sections that come in parts: RAM, and one for each device of a kind that moves much.
MAX_SECTIONS: Final = 4096

#: Bytes of JSON in the description: that of a guest has some 8 KiB for each CPU, and 50 to 100 KiB
#: for all else.
MAX_DESCRIPTION: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class MappedHeader:
    """Where a block's bitmap and pages are in a file written with ``mapped-ram``.

    :ivar page_size: bytes that one bit of the bitmap stands for.
    :ivar bitmap_offset: in the file, whatever is in front of QEMU's part; so is the next.
    :ivar pages_offset: where the page at 0 is.
    """

    page_size: int
    bitmap_offset: int
    pages_offset: int
    version: int = MAPPED_VERSION

    def encode(self) -> bytes:
        """Return the wire form."""
        return MAPPED_HEADER.pack(
            self.version, self.page_size, self.bitmap_offset, self.pages_offset
        )


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A block of RAM as the setup of the RAM section has it.

    :ivar name: QEMU's ``idstr``, ``"pc.ram"``.
    :ivar length: bytes, QEMU's ``used_length``.
    :ivar page_size: of the memory behind it; None where the stream does not say, since it is the
        host's usual one or there is no postcopy.
    :ivar address: in the guest, with ``x-ignore-shared`` only.
    :ivar mapped: with ``mapped-ram`` only.
    """

    name: str
    length: int
    page_size: int | None = None
    address: int | None = None
    mapped: MappedHeader | None = None
