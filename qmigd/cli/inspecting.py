"""``qmigctl inspect``: reads a stream from its beginning to its end, and says what is in it.

With a file, the description of the devices is looked for at its end first, so that it is known
where each device's section ends, and the places of ``mapped-ram``'s pages are passed over.  A pipe
is read as it comes (``qmigd/stream/borders.py`` has the difference).  Multifd channels that were
captured beside a stream are counted with it.  What is kept is a
:class:`~qmigd.stream.summary.Summary`, however long they are.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, TextIO

from ..errors import ArgumentError, FileError, QmigdError, StreamError
from ..stream import multifd
from ..stream.devices import Devices, find_description
from ..stream.events import MappedBlock
from ..stream.reader import Reader
from ..stream.summary import Summary
from .ending import Ending
from .inspect_files import Source, opened
from .inspect_report import Report
from .options import Exit
from .plot import picture
from .render import size

__all__ = ["Progress", "run"]

#: Seconds before the progress is shown, and between two times that it is.
_PATIENCE: Final = 0.5

#: Bytes of a multifd channel that are looked at together: a dozen packets, each of which may be
#: half a MiB when it is unpacked.
_PACKETS: Final = 1 << 14

_MULTIFD: Final = multifd.MAGIC.to_bytes(4, "big")

#: Page sizes that a target may have, if the description says one.
_PAGE_SIZES: Final = tuple(1 << bits for bits in range(10, 17))


def run(options: argparse.Namespace) -> Exit:
    """Carry it out; returns the exit code.

    :raises QmigdError: there is nothing that could be read.
    """
    sources = [opened(name) for name in options.file]
    channels = [source for source in sources if source.first == _MULTIFD]
    stream = _the_stream(sources, channels)
    report = Report(stream, Summary(stream.start))
    progress = Progress(sys.stderr, sum(source.size or 0 for source in sources))
    try:
        _read_stream(stream, report.summary, progress)
        for number, channel in enumerate(channels):
            report.reading = channel
            _read_channel(channel, number, report.summary, progress)
    except QmigdError as error:
        report.failed = error
    except KeyboardInterrupt:
        raise Ending(Exit.UNKNOWN, "interrupted", "Interrupted.") from None
    finally:
        progress.close()
    if options.plot is not None:
        _write(options.plot, picture(report.summary, stream.name))
    if options.json:
        report.write_json(sys.stdout)
    elif report.failed is None or report.summary.version is not None:
        report.write_text(sys.stdout, fields=options.fields)
    if report.failed is None:
        return Exit.OK
    if not options.json:
        told = report.told(report.failed)
        raise Ending(Exit.FAILED, told.code, told.text)
    return Exit.FAILED


def _the_stream(sources: Sequence[Source], channels: Sequence[Source]) -> Source:
    streams = [source for source in sources if source not in channels]
    if not streams:
        raise ArgumentError(
            f"{sources[0].name} is a multifd channel; the stream that it belongs to has to be "
            f"named as well."
        )
    if len(streams) > 1:
        raise ArgumentError(
            f"{streams[1].name} is no multifd channel, and one stream is inspected at a time."
        )
    return streams[0]


def _read_stream(source: Source, summary: Summary, progress: Progress) -> None:
    sizes, page_size = _ahead(source) if source.seekable else ({}, None)
    reader = Reader(start=source.start, page_size=page_size, sizes=sizes)
    mapped: MappedBlock | None = None
    try:
        while data := source.read():
            for event in reader.feed(data):
                summary.page_size = reader.page_size
                summary.take(event)
                if isinstance(event, MappedBlock):
                    mapped = event
            if mapped is not None and source.seekable:
                _pass_over(mapped, source, reader)
            progress.add(source)
        for event in reader.close():
            summary.take(event)
    finally:
        summary.finish(reader.position)
        source.close()


def _ahead(source: Source) -> tuple[Mapping[tuple[str, int], int], int | None]:
    """Return what the description at the end says: the sizes of sections, and of a page."""
    # Where it makes no sense, that is said when it is reached.
    with suppress(StreamError):
        if found := find_description(*source.tail()):
            devices = Devices(found[1], found[0])
            page_size = devices.page_size if devices.page_size in _PAGE_SIZES else None
            return devices.sizes(), page_size
    return {}, None


def _pass_over(mapped: MappedBlock, source: Source, reader: Reader) -> None:
    """Go on behind a block's pages, once its bitmap has been read."""
    header = mapped.block.mapped
    assert header is not None and source.size is not None
    pages = mapped.block.length // header.page_size
    if not header.bitmap_offset + -(-pages // 8) <= reader.position < mapped.end:
        return
    if mapped.end > source.size:
        raise StreamError(
            source.size, f"the pages of {mapped.block.name!r} up to {mapped.end:#x}", "the end"
        )
    reader.skip(mapped.end - reader.position)
    source.skip(mapped.end)


def _read_channel(source: Source, number: int, summary: Summary, progress: Progress) -> None:
    blocks = {name: block.block.length for name, block in summary.blocks.items()}
    unpacker = multifd.Unpacker(page_size=summary.page_size, blocks=blocks)
    try:
        while data := source.read():
            for at in range(0, len(data), _PACKETS):
                for packet in unpacker.feed(bytes(data[at : at + _PACKETS])):
                    summary.take_packet(number, packet)
            progress.add(source)
        unpacker.end()
    finally:
        source.close()


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}.") from None


class Progress:
    """Shows how far it is, on a terminal, if that takes some time."""

    def __init__(
        self, out: TextIO, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._out = out if out.isatty() else None
        self._total = total
        self._shown = clock()
        self._text = ""
        self._before = 0
        self._last: Source | None = None

    def add(self, source: Source) -> None:
        """Show that so much of a file has been read."""
        now = self._clock()
        if self._last is not source:
            self._before += (self._last.size or 0) if self._last else 0
            self._last = source
        if self._out is None or now < self._shown + _PATIENCE:
            return
        self._shown = now
        done = self._before + source.done
        text = f"{size(done)} read"
        if self._total:
            text = f"{size(done)} of {size(self._total)} read, {100 * done // self._total} %"
        self._out.write(f"\r{text:<{len(self._text)}}")
        self._out.flush()
        self._text = text

    def close(self) -> None:
        """Leave the terminal in good order."""
        if self._out is not None and self._text:
            self._out.write(f"\r{'':<{len(self._text)}}\r")
            self._out.flush()
