"""Finds where a device's section ends, which a stream does not say.

What it consists of is told by the description only, which comes last.  There are two ways:

- *With sizes.*  Whoever can look at the end of the stream first, which is so for a file, gives
  the sizes of all sections, out of the description (:meth:`~qmigd.stream.devices.Devices.sizes`).
  They are exact, and a section that is not followed by its footer is an error.
- *Without.*  A section is followed by its footer, and that by another section, a command or the
  end.  The first place where all of this is so is taken: five bytes of the footer, and a whole
  section header with a name, or a command with the length that it has to have, or 00 with
  nothing, or the beginning of the description, behind it.  A device would have to have its own id
  behind 7e in its state, and something of the sort behind that, to be cut in the wrong place;
  whether one was is seen as soon as the description has come, since then its size is known
  (:meth:`~qmigd.stream.devices.Device.decode`).  The last section is therefore known to be over
  when the description begins, or when the stream is closed.

Streams of machine types without footers (up to 2.3) therefore need the sizes, but for RAM.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Final

from qmigd.stream.events import DeviceData, SectionStart
from qmigd.stream.format import (
    COMMAND_LENGTHS,
    RAM_NAME,
    CommandNumber,
    RamFlag,
    SectionType,
)
from qmigd.stream.window import Steps, Window

__all__ = ["FOOTER_SIZE", "footer", "is_command", "until_footer"]

#: Bytes of a footer.
FOOTER_SIZE: Final = 5

#: Bytes of a section that are searched at once.
_SEARCHED: Final = 1 << 16

#: The flags that a record of RAM may have.
_RECORDS: Final = {
    *(int(RamFlag.CONTINUE) * more | kind
      for more in (0, 1)
      for kind in (RamFlag.PAGE, RamFlag.ZERO, RamFlag.XBZRLE, RamFlag.COMPRESS_PAGE)),
    RamFlag.EOS, RamFlag.MEM_SIZE, RamFlag.HOOK, RamFlag.MULTIFD_FLUSH,
}  # fmt: skip


_COMMANDS: Final = frozenset(CommandNumber)


def footer(number: int) -> bytes:
    """Return the footer of the section with this id."""
    return struct.pack(">BI", SectionType.FOOTER, number)


def is_command(number: int, size: int) -> bool:
    """Say whether there is a command with data of this size."""
    sizes = COMMAND_LENGTHS.get(number)
    return size in sizes if sizes else number in _COMMANDS


def until_footer(
    window: Window,
    section: SectionStart,
    sections: Mapping[int, SectionStart],
    page_size: int,
) -> Steps[None]:
    """Read a device's section up to its footer.

    :param sections: those that come in parts, by their ids.
    :param page_size: the target's.
    """
    mark = footer(section.id)
    expected = f"{section.name!r}, and the footer of section {section.id}"
    while True:
        count = yield from window.some(expected)
        piece = window.look(min(count, _SEARCHED))
        done = again = 0
        while (found := piece.find(mark, again)) >= 0:
            if found > done:
                yield _data(window, section, piece[done:found])
                done = found
            if (yield from _follows(window, sections, page_size)):
                return
            again = found + 1
        # the beginning of a footer may be all that is here
        end = next(
            (at for at in range(max(len(piece) - FOOTER_SIZE + 1, again), len(piece))
             if mark.startswith(piece[at:])),
            len(piece),
        )  # fmt: skip
        if end > done:
            yield _data(window, section, piece[done:end])
        elif not done:
            yield from window.need(len(piece) + 1, expected)


def _data(window: Window, section: SectionStart, data: bytes) -> DeviceData:
    at = window.position
    window.index += len(data)
    return DeviceData(at, section.id, data)


def _follows(window: Window, sections: Mapping[int, SectionStart], page_size: int) -> Steps[bool]:
    """Say whether behind a footer, which is at hand, there is what can be behind one."""

    def ahead(start: int, size: int) -> Steps[bytes]:
        """Look at what is behind the footer; zeros, if the package or the stream ends before."""
        count = FOOTER_SIZE + start + size
        if window.limit is not None and window.position + count > window.limit:
            return bytes(size)
        if not (yield from window.more(count)):
            return bytes(size)
        return window.look(size, FOOTER_SIZE + start)

    if window.limit is not None and window.position + FOOTER_SIZE == window.limit:
        return True
    kind = (yield from ahead(0, 1))[0]
    if kind == SectionType.EOF:
        return (yield from _ends(window))
    if kind in (SectionType.START, SectionType.FULL):
        size = (yield from ahead(5, 1))[0]
        name = yield from ahead(6, size)
        yield from ahead(6 + size, 8)
        return bool(name) and name.isascii() and name.decode().isprintable()
    if kind in (SectionType.PART, SectionType.END):
        other = sections.get(int.from_bytes((yield from ahead(1, 4)), "big"))
        if other is None or other.name != RAM_NAME:
            return other is not None
        flags = int.from_bytes((yield from ahead(5, 8)), "big") & (page_size - 1)
        return flags in _RECORDS
    if kind == SectionType.COMMAND:
        number, size = struct.unpack(">HH", (yield from ahead(1, 4)))
        return is_command(number, size)
    return False


def _ends(window: Window) -> Steps[bool]:
    """Say whether 00 behind a footer is the end: nothing follows, or the description does.

    A lone 00 behind a footer is nothing to go by: it does occur that a number ends in 7e and
    zeros follow, and the section that has the clocks has the id 0.
    """
    if window.limit is not None:
        return window.position + FOOTER_SIZE + 1 == window.limit
    for place, wanted in ((1, SectionType.DESCRIPTION), (6, ord("{"))):
        if not (yield from window.more(FOOTER_SIZE + place + 1)):
            return True
        if window.look(1, FOOTER_SIZE + place)[0] != wanted:
            return False
    return True
