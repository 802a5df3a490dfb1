"""Reads a stream: bytes in, events out, whatever the pieces in which they come.

::

    reader = Reader()
    for piece in pieces:
        for event in reader.feed(piece): ...
    for event in reader.close(): ...

A stream is::

    "QEVM" u32 version   [07 configuration]   then any number of
        01 START   u32 id, counted name, u32 instance, u32 version, contents   [7e u32 id]
        02 PART, 03 END   u32 id, contents                                     [7e u32 id]
        04 FULL    as START
        08 COMMAND u16 number, u16 size, that many bytes
    00 EOF   [06 u32 size, JSON: the description]

Where a device's section ends the stream does not say: it is known by the sizes that whoever reads
gives, or is found (``borders``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from qmigd.errors import StreamError
from qmigd.stream.borders import FOOTER_SIZE, footer, is_command, until_footer
from qmigd.stream.events import (
    Command,
    Configuration,
    Description,
    DeviceData,
    End,
    Event,
    Header,
    Package,
    PackageEnd,
    SectionEnd,
    SectionStart,
)
from qmigd.stream.format import (
    CONFIGURATION_CAPABILITIES,
    CONFIGURATION_PAGE_BITS,
    CONFIGURATION_UUID,
    IGNORE_SHARED,
    MAGIC,
    MAPPED_RAM,
    MAX_DESCRIPTION,
    MAX_SECTIONS,
    MAX_STRING,
    RAM_NAME,
    RAM_VERSION,
    VERSION,
    CommandNumber,
    RamBlock,
    SectionType,
)
from qmigd.stream.pages import Ram, ram_records
from qmigd.stream.window import Steps, Window, text

__all__ = ["Reader"]

#: Bytes that are taken at once of what may be long.
_PIECE: Final = 1 << 16

#: Binary logarithms of page sizes: from TARGET_PAGE_BITS_MIN of QEMU's targets to 64 KiB.
_PAGE_BITS: Final = range(10, 17)

_SECTIONS: Final = {
    SectionType.START,
    SectionType.PART,
    SectionType.END,
    SectionType.FULL,
}


class Reader:
    """Reads one stream.

    :ivar ended: QEMU_VM_EOF has come.
    """

    def __init__(
        self,
        *,
        start: int = 0,
        header: bool = True,
        page_size: int | None = None,
        blocks: tuple[RamBlock, ...] = (),
        sections: tuple[SectionStart, ...] = (),
        sizes: Mapping[tuple[str, int], int] | None = None,
        records_only: bool = False,
    ) -> None:
        """
        :param start: the offset of the first byte that is fed; in a file with ``mapped-ram``, where
            QEMU's part begins.
        :param header: whether the stream has one; the one by which a postcopy is resumed has not.
        :param page_size: the target's, where the stream does not say it; 4096 if not given.
        :param blocks: the blocks of RAM, where there will be no setup that has them.
        :param sections: those that began in a stream before, which this one continues.
        :param sizes: bytes of devices' sections by name and instance, out of the description.
        :param records_only: there are only records of RAM, up to their EOS, as on the channel of
            postcopy-preempt.
        """
        self.ended = False
        self._window = Window(start)
        self._ram = Ram(blocks={block.name: block.length for block in blocks})
        if page_size is not None:
            self._ram.page_size = page_size
        self._sections = {section.id: section for section in sections}
        self._sizes = sizes or {}
        self._footers: bool | None = None
        self._error: StreamError | None = None
        self._steps = self._records() if records_only else self._stream(header)

    @property
    def position(self) -> int:
        """The offset of the next byte that is not part of any event yet."""
        return self._window.position

    @property
    def page_size(self) -> int:
        """The target's page size, as far as it is known."""
        return self._ram.page_size

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Event]:
        """Take bytes, and yield what there is in them; to be used up before the next call.

        What arrays and views of an event refer to are these bytes.

        :raises StreamError: it is no stream; nothing more can be read then.
        """
        self._window.feed(memoryview(data).cast("B"))
        yield from self._go()
        self._window.keep()

    def skip(self, count: int) -> None:
        """Leave out bytes that are not wanted, up to where a :class:`MappedBlock` ends.

        To be called when all that was fed was used up, and with no more bytes than that.
        """
        self._window.skip(count)

    def close(self) -> Iterator[Event]:
        """Say that nothing more comes; yields what there still is.

        :raises StreamError: the stream is cut.
        """
        self._window.closed = True
        yield from self._go()

    def _go(self) -> Iterator[Event]:
        if self._error is not None:
            raise self._error
        try:
            for event in self._steps:
                if event is None:
                    return
                yield event
        except StreamError as error:
            self._error = error
            raise

    # -- the whole ----------------------------------------------------------------

    def _records(self) -> Steps[None]:
        yield from ram_records(self._window, self._ram)
        self.ended = True
        yield End(self._window.position - 8)
        yield from self._nothing_more()

    def _stream(self, header: bool) -> Steps[None]:
        window = self._window
        if header:
            yield from self._header()
        at = yield from self._parts()
        self.ended = True
        yield End(at)
        if not (yield from window.more()):
            return
        at = window.position
        kind = yield from window.integer(1, "the description")
        if kind != SectionType.DESCRIPTION:
            raise StreamError(at, "the description, 06, or the end", f"{kind:02x}")
        size = yield from window.integer(4, "the size of the description")
        if not 2 <= size <= MAX_DESCRIPTION:
            raise StreamError(
                at + 1, f"a description of 2 to {MAX_DESCRIPTION} bytes", f"one of {size}"
            )
        yield from window.need(1, "the description")
        data = bytearray()
        while len(data) < size:
            count = yield from window.some(f"{size} bytes of the description")
            data += window.take(min(count, size - len(data), _PIECE))
        yield Description(at, data)  # and no copy: it may be large
        yield from self._nothing_more()

    def _nothing_more(self) -> Steps[None]:
        if (yield from self._window.more()):
            found = f"{self._window.look(1).hex()}"
            raise StreamError(self._window.position, "the end of the stream", found)

    def _header(self) -> Steps[None]:
        window = self._window
        at = window.position
        magic = yield from window.bytes(4, f"the magic {ascii(MAGIC)}")
        if magic != MAGIC:
            raise StreamError(at, f"the magic {ascii(MAGIC)} of a migration stream", ascii(magic))
        version = yield from window.integer(4, "the version of the stream")
        if version != VERSION:
            raise StreamError(at + 4, f"version {VERSION} of the stream", f"{version}")
        yield Header(at, version)
        yield from window.need(1, "a section")
        if window.look(1)[0] == SectionType.CONFIGURATION:
            yield from self._configuration()

    def _parts(self, end: int | None = None) -> Steps[int]:
        """Read sections and commands up to EOF, or up to an offset; returns where that was."""
        window = self._window
        while window.position != end:
            at = window.position
            kind = yield from window.integer(1, "a section, a command or the end")
            if kind in _SECTIONS:
                yield from self._section(at, SectionType(kind))
            elif kind == SectionType.COMMAND:
                yield from self._command(at, nested=end is not None)
            elif kind == SectionType.EOF:
                if end is not None and window.position != end:
                    raise StreamError(at, f"a package that goes on up to {end:#x}", "its end")
                return at
            else:
                raise StreamError(at, "a section, a command or the end", f"{kind:02x}")
        return window.position

    # -- its beginning ------------------------------------------------------------

    def _configuration(self) -> Steps[None]:
        window = self._window
        at = window.position
        window.take(1)
        size = yield from window.integer(4, "the length of the machine type")
        if not 1 <= size <= MAX_STRING:
            raise StreamError(at + 1, f"a machine type of 1 to {MAX_STRING} bytes", f"{size}")
        data = yield from window.bytes(size, "the machine type")
        machine = text(data, at + 5, "the machine type")
        bits = capabilities = uuid = None
        while True:
            where = window.position
            yield from window.need(1, "a section")
            if window.look(1)[0] != SectionType.SUBSECTION:
                break
            window.take(1)
            name = yield from window.string("a subsection's name")
            version = yield from window.integer(4, "a subsection's version")
            if version != 1:
                raise StreamError(where, f"version 1 of {name!r}", str(version))
            if name == CONFIGURATION_PAGE_BITS:
                bits = yield from window.integer(4, "the page size")
                if bits not in _PAGE_BITS:
                    raise StreamError(
                        window.position - 4,
                        f"a page size of 2 to the power {_PAGE_BITS[0]} to {_PAGE_BITS[-1]}",
                        str(bits),
                    )
                self._ram.page_size = 1 << bits
            elif name == CONFIGURATION_CAPABILITIES:
                capabilities = yield from self._capabilities()
                self._ram.ignore_shared = IGNORE_SHARED in capabilities
                self._ram.mapped = MAPPED_RAM in capabilities
            elif name == CONFIGURATION_UUID:
                uuid = yield from window.bytes(16, "the UUID")
            else:
                raise StreamError(where, "a known subsection of the configuration", repr(name))
        yield Configuration(at, machine, bits, capabilities, uuid)

    def _capabilities(self) -> Steps[tuple[str, ...]]:
        window = self._window
        at = window.position
        count = yield from window.integer(4, "the number of capabilities")
        if count > MAX_STRING:
            raise StreamError(at, f"at most {MAX_STRING} capabilities", str(count))
        names = []
        for _ in range(count):
            names.append((yield from window.string("a capability")))
        return tuple(names)

    # -- sections -----------------------------------------------------------------

    def _section(self, at: int, kind: SectionType) -> Steps[None]:
        window = self._window
        number = yield from window.integer(4, "a section's id")
        if kind in (SectionType.START, SectionType.FULL):
            name = yield from window.string("a section's name")
            instance = yield from window.integer(4, "a section's instance")
            version = yield from window.integer(4, "a section's version")
            section = SectionStart(at, kind, number, name, instance, version)
            if kind == SectionType.START:
                if len(self._sections) == MAX_SECTIONS and number not in self._sections:
                    raise StreamError(at, f"at most {MAX_SECTIONS} sections in parts", "another")
                self._sections[number] = section
        else:
            started = self._sections.get(number)
            if started is None:
                raise StreamError(at, "a section that has been started", f"section {number}")
            section = SectionStart(
                at, kind, number, started.name, started.instance, started.version
            )
        yield section
        if section.name == RAM_NAME:
            if section.version != RAM_VERSION:
                raise StreamError(at, f"RAM of version {RAM_VERSION}", f"{section.version}")
            yield from ram_records(window, self._ram)
        elif (size := self._size(section)) is not None:
            yield from self._sized(section, size)
        elif self._footers is False:
            raise StreamError(
                window.position,
                f"the description before {section.name!r}, since sections have no footers",
                "none",
            )
        else:
            yield from until_footer(window, section, self._sections, self._ram.page_size)
        yield from self._footer(section)

    def _size(self, section: SectionStart) -> int | None:
        if section.kind != SectionType.FULL:
            return None
        return self._sizes.get((section.name, section.instance))

    def _footer(self, section: SectionStart) -> Steps[None]:
        window = self._window
        at = window.position
        if self._footers is None:
            yield from window.need(1, f"the end of section {section.id}")
            self._footers = window.look(1)[0] == SectionType.FOOTER
        if self._footers:
            expected = f"the footer of section {section.id}, {section.name!r}"
            data = yield from window.bytes(FOOTER_SIZE, expected)
            if data != footer(section.id):
                raise StreamError(at, expected, data.hex())
        yield SectionEnd(at, section.id, self._footers)

    def _sized(self, section: SectionStart, size: int) -> Steps[None]:
        window = self._window
        end = window.position + size
        while (left := end - window.position) > 0:
            count = yield from window.some(f"{size} bytes of {section.name!r}")
            at = window.position
            yield DeviceData(at, section.id, window.take(min(count, left, _PIECE)))

    # -- commands -----------------------------------------------------------------

    def _command(self, at: int, *, nested: bool) -> Steps[None]:
        window = self._window
        number = yield from window.integer(2, "a command's number")
        size = yield from window.integer(2, "the size of a command's data")
        if not is_command(number, size):
            raise StreamError(at, "a known command with its size", f"number {number}, size {size}")
        data = yield from window.bytes(size, f"the data of command {number}")
        if number == CommandNumber.POSTCOPY_ADVISE and data:
            self._ram.page_sizes = int.from_bytes(data[:8], "big")
        if number != CommandNumber.PACKAGED:
            yield Command(at, number, data)
            return
        if nested:
            raise StreamError(at, "no package within a package", "one")
        length = int.from_bytes(data, "big")
        yield Package(at, length)
        window.limit = window.position + length
        yield from self._parts(window.limit)
        window.limit = None
        yield PackageEnd(window.position)
