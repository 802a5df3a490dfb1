"""What ``qmigctl inspect`` says of a stream: as text for people, or as JSON.

Devices are decoded one at a time, while they are written.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from ..errors import QmigdError, StreamError
from ..stream.devices import Devices, Value
from ..stream.summary import KINDS, Section, Summary
from ..wire import saved
from .inspect_files import Source
from .output import write
from .render import clean, size, table

__all__ = ["Report"]

#: Characters of a field that are shown to people.
_SHOWN: Final = 100

#: Passes that are shown to people: the first, and the last.
_PASSES: Final = 10

#: What pages are counted as, and the heads of their columns.
_PAGES: Final = {
    "normal": "NORMAL",
    "zero": "ZERO",
    "xbzrle": "XBZRLE",
    "compressed": "COMPRESSED",
    "multifd-normal": "MULTIFD",
    "multifd-zero": "MULTIFD ZERO",
}


class Report:
    """All that is to be said.

    :ivar reading: the file that is, or was last, being read.
    :ivar failed: what went wrong, if anything did.
    """

    def __init__(self, stream: Source, summary: Summary) -> None:
        self.reading = self.stream = stream
        self.summary = summary
        self.failed: QmigdError | None = None

    def told(self, error: QmigdError) -> QmigdError:
        """Return the error as it is told to a person: with the file's name."""
        if not isinstance(error, StreamError):
            return error
        where = " of what is compressed in it" if self.reading.packed else ""
        what = f"at offset {error.offset:#x}{where}: expected {error.expected}"
        return QmigdError(f"{self.reading.name}: {what}, found {error.found}.", code=error.code)

    # -- JSON ---------------------------------------------------------------------

    def write_json(self, out: TextIO) -> None:
        """Write one object; what went wrong is its ``error``."""
        text = json.dumps(self._object(), indent=2)
        out.write(text[: -len("\n}")])
        out.write(',\n  "devices": [')
        comma = ""
        for section, fields in self._devices():
            entry: dict[str, Any] = {
                "name": section.name,
                "instance": section.instance,
                "version": section.version,
                "at": section.at,
                "bytes": section.size,
            }
            entry["reason" if isinstance(fields, str) else "fields"] = fields
            # a line for each: what is spread over many takes many times the memory
            out.write(f"{comma}\n    {json.dumps(entry)}")
            comma = ","
        write(out, ("\n  ]" if comma else "]") + "\n}")

    def _object(self) -> dict[str, Any]:
        summary = self.summary
        answer: dict[str, Any] = {}
        if self.failed is not None:
            answer["error"] = {"class": self.failed.code, "desc": self.told(self.failed).text}
            if isinstance(self.failed, StreamError):
                answer["error"] |= {
                    "file": self.reading.name,
                    "offset": self.failed.offset,
                    "expected": self.failed.expected,
                    "found": self.failed.found,
                }
        answer |= {
            "file": self.stream.name,
            "compressed": self.stream.packed,
            "complete": summary.ended and self.failed is None,
            "size": summary.position - summary.start,
            "bytes": {kind: summary.kinds[kind] for kind in KINDS if summary.kinds[kind]},
        }
        if self.stream.head is not None:
            answer["saved"] = _head(self.stream.head)
        configuration = summary.configuration
        if configuration is not None:
            answer["machine"] = configuration.machine
            if configuration.uuid is not None:
                answer["uuid"] = str(uuid.UUID(bytes=configuration.uuid))
        answer["capabilities"] = self._capabilities()
        answer["page-size"] = summary.page_size
        answer["ram"] = {
            "total": summary.total,
            "pages": dict(self._pages()),
            "blank": sum(block.blank for block in summary.blocks.values()),
            "blocks": [
                {
                    "name": name,
                    "length": block.block.length,
                    **({"page-size": block.block.page_size} if block.block.page_size else {}),
                    **(
                        {"address": address} if (address := block.block.address) is not None else {}
                    ),
                    "pages": dict(block.pages),
                    "blank": block.blank,
                }
                for name, block in summary.blocks.items()
            ],
            "passes": [
                {"at": one.at, "bytes": one.size, "pages": dict(one.pages)}
                for one in summary.passes
            ],
        }
        if summary.postcopy is not None:
            answer["postcopy"] = {"package": summary.package, "pages": dict(summary.postcopy)}
        answer["commands"] = dict(summary.commands)
        if summary.channels:
            answer["channels"] = [
                {
                    "channel": one.number,
                    "packets": one.packets,
                    "syncs": one.syncs,
                    "compression": sorted(one.compressions),
                    "pages": dict(one.pages),
                    "device-state": one.device_state,
                }
                for one in summary.channels
            ]
        answer["sections"] = [
            {
                "name": section.name,
                "instance": section.instance,
                "version": section.version,
                "at": section.at,
                "parts": section.parts,
                "bytes": section.size,
            }
            for section in summary.sections.values()
        ]
        return answer

    # -- text ---------------------------------------------------------------------

    def write_text(self, out: TextIO, *, fields: bool) -> None:
        """Write tables; :param fields: those of the devices as well."""
        write(out, "\n\n".join(["\n".join(self._beginning()), *self._tables()]))
        if not fields:
            if any(one.data is not None for one in self.summary.sections.values()):
                write(out, "\n'--fields' or '--json' shows what the devices' sections say.")
            return
        for section, value in self._devices():
            write(out, f"\n{_title(section)}")
            if isinstance(value, str):
                write(out, f"  {clean(value)}")
                continue
            for name, text in _flat(value):
                write(out, f"  {clean(name)} = {clean(text)}")

    def _beginning(self) -> Iterator[str]:
        summary = self.summary
        length = size(summary.position - summary.start)
        what = "complete" if summary.ended and self.failed is None else "not complete"
        yield f"{clean(self.stream.name)}: QEMU's migration stream, {length}, {what}"
        head = self.stream.head
        if head is not None:
            when = datetime.fromtimestamp(head.saved, UTC).isoformat(" ", "seconds")
            guest = head.guest.get("name", "a guest")
            yield _line("saved", f"{when}, by qmigd {head.by}, as {head.format}")
            yield _line("guest", f"{guest}, which {'ran' if head.run else 'was paused'}")
            checksum = head.checksum != saved.NO_CHECKSUM
            yield _line("checksum", head.checksum.hex() if checksum else "none was made")
        configuration = summary.configuration
        if configuration is not None:
            yield _line("machine", configuration.machine)
            if configuration.uuid is not None:
                yield _line("UUID", str(uuid.UUID(bytes=configuration.uuid)))
        capabilities = self._capabilities()
        yield _line("capabilities", ", ".join(capabilities) or "none that a stream shows")
        yield _line("RAM", f"{size(summary.total)}, in pages of {summary.page_size}")
        if summary.commands:
            yield _line(
                "commands",
                ", ".join(
                    name if count == 1 else f"{name} ({count} times)"
                    for name, count in summary.commands.items()
                ),
            )
        if summary.postcopy is not None:
            package = size(summary.package or 0)
            pages = _counts(summary.postcopy)
            yield _line("postcopy", f"after a package of {package}, then {pages}")
        blank = sum(block.blank for block in summary.blocks.values())
        if blank:
            yield _line("blank", f"{blank} of the normal pages are all zeros")

    def _tables(self) -> Iterator[str]:
        summary = self.summary
        total = sum(summary.kinds.values())
        if total:
            yield table(
                ("BYTES", "", "OF"),
                [
                    (size(summary.kinds[kind]), f"{100 * summary.kinds[kind] / total:5.1f} %", text)
                    for kind, text in KINDS.items()
                    if summary.kinds[kind]
                ],
            )
        pages = [kind for kind in _PAGES if self._pages()[kind]]
        if summary.blocks:
            yield table(
                ("RAM BLOCK", "SIZE", *(_PAGES[kind] for kind in pages)),
                [
                    (name, size(block.block.length), *(block.pages[kind] for kind in pages))
                    for name, block in summary.blocks.items()
                ],
            )
        if summary.passes:
            yield self._passes()
        if summary.channels:
            yield table(
                ("MULTIFD CHANNEL", "PACKETS", "SYNCS", "NORMAL", "ZERO", "COMPRESSION"),
                [
                    (
                        one.number,
                        one.packets,
                        one.syncs,
                        one.pages["normal"],
                        one.pages["zero"],
                        ", ".join(sorted(one.compressions)),
                    )
                    for one in summary.channels
                ],
            )
        if summary.sections:
            rows: list[Sequence[object]] = [
                (one.name, one.instance, one.version, one.parts, size(one.size))
                for one in summary.sections.values()
            ]
            if summary.more_sections:
                rows.append((f"and {summary.more_sections} more", "", "", "", ""))
            yield table(("SECTION", "INSTANCE", "VERSION", "PARTS", "SIZE"), rows)

    def _passes(self) -> str:
        passes = self.summary.passes
        kinds = [kind for kind in _PAGES if any(one.pages[kind] for one in passes)]
        rows: list[Sequence[object]] = []
        for number, one in enumerate(passes, 1):
            if _PASSES < number < len(passes):
                continue
            rows.append((number, *(one.pages[kind] for kind in kinds), size(one.size)))
        if len(passes) > _PASSES + 1:
            rows.insert(_PASSES, ("...", *("" for _ in kinds), ""))
        return table(("PASS", *(_PAGES[kind] for kind in kinds), "SIZE"), rows)

    # -- both ---------------------------------------------------------------------

    def _pages(self) -> Counter[str]:
        return sum((block.pages for block in self.summary.blocks.values()), Counter())

    def _capabilities(self) -> list[str]:
        """Return those that the head names, and those that the stream names or shows."""
        features = () if self.stream.head is None else self.stream.head.features
        return list(dict.fromkeys([*features, *self.summary.capabilities()]))

    def _devices(self) -> Iterator[tuple[Section, dict[str, Value] | str]]:
        """Decode the devices; with a sentence for each that cannot be."""
        summary = self.summary
        devices: Devices | None = None
        why = "The stream has no description of it."
        if summary.description is not None:
            try:
                devices = Devices(summary.description, summary.description_at)
                devices.sizes()
            except StreamError as error:
                devices, why = None, error.text
        for section in summary.sections.values():
            if not section.full:
                continue
            if section.data is None:
                yield section, "It was too large to be kept, or is not complete."
                continue
            device = None if devices is None else devices.find(section.name, section.instance)
            if device is None:
                yield section, why
                continue
            try:
                yield section, device.decode(section.data, section.start)
            except StreamError as error:
                yield section, error.text


def _head(head: saved.Head) -> dict[str, Any]:
    return {
        "format": head.format,
        "features": list(head.features),
        "run": head.run,
        "saved": head.saved,
        "qmigd": head.by,
        "offset": head.offset,
        "length": head.length,
        "checksum": None if head.checksum == saved.NO_CHECKSUM else head.checksum.hex(),
        "guest": dict(head.guest),
    }


def _line(head: str, text: str) -> str:
    return f"{head:<14}{clean(text)}"


def _counts(pages: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in pages.items() if count) or "no page"


def _title(section: Section) -> str:
    return (
        f"{clean(section.name)} {section.instance}, version {section.version}, "
        f"{size(section.size)} at {section.at:#x}"
    )


def _flat(value: Mapping[str, Value], before: str = "") -> Iterator[tuple[str, str]]:
    """Yield the fields one by one, structs by their paths."""
    for name, inner in value.items():
        yield from _flattened(f"{before}{name}", inner)


def _flattened(name: str, value: Value) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        yield from _flat(value, f"{name}.")
    elif isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        for number, one in enumerate(value):
            yield from _flattened(f"{name}[{number}]", one)
    else:
        text = json.dumps(value) if not isinstance(value, str) else value
        yield name, text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ... ({len(text)} characters)"
