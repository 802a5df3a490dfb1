"""The picture of ``qmigctl inspect --plot``: where in a stream which bytes are, and how many.

An SVG without scripts, fonts or links.  On top the stream from its beginning to its end, each
column being a piece of it, in the colours of what it consists of; below, how much there is of each
kind, and the devices that take most.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from xml.sax.saxutils import escape

from ..stream.format import RAM_NAME
from ..stream.summary import KINDS, Summary
from .render import clean, size

__all__ = ["picture"]

#: Colours that can be told from each other by those who see few (after Okabe and Ito), those that
#: are next to each other most often being farthest apart.
_COLOURS: Final = {
    "normal": "#0072b2",
    "zero": "#a6cee3",
    "xbzrle": "#009e73",
    "compressed": "#56b4e9",
    "bitmap": "#cc79a7",
    "hole": "#e6e6e6",
    "device": "#d55e00",
    "description": "#e69f00",
    "framing": "#5f5f5f",
}

_WIDTH: Final = 880
_MARGIN: Final = 40
_INNER: Final = _WIDTH - 2 * _MARGIN
_STRIP: Final = 120
_ROW: Final = 24
_BAR: Final = 320

#: Columns of the strip.
_COLUMNS: Final = 200

#: Sections that are named.
_SECTIONS: Final = 8

#: Characters of the file's name, and of what stands before a bar.
_NAME: Final = 60
_LABEL: Final = 32

_RIGHT: Final = 'text-anchor="end"'


def picture(summary: Summary, name: str) -> str:
    """Return the SVG.

    :param name: of the file, for the title.
    """
    rows = [*_kinds(summary), "", *_sections(summary)]
    top = 118 + _STRIP
    height = top + _ROW * len(rows) + _MARGIN // 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        _text(_MARGIN, 34, _title(summary, name), 'font-size="17"'),
        *_strip(summary),
    ]
    lines += [
        f'<g transform="translate({_MARGIN},{top + _ROW * number})">{row}</g>'
        for number, row in enumerate(rows)
        if row
    ]
    return "\n".join([*lines, "</svg>", ""])


def _title(summary: Summary, name: str) -> str:
    machine = summary.configuration.machine if summary.configuration else "no machine type"
    shown = name if len(name) <= _NAME else f"...{name[-_NAME:]}"
    return f"{shown}: {machine}, {size(summary.position - summary.start)}"


def _strip(summary: Summary) -> Iterator[str]:
    """Yield the stream, as columns of a common width."""
    strip = summary.strip
    buckets = strip.buckets
    each = -(-len(buckets) // _COLUMNS) or 1
    columns = [buckets[at : at + each] for at in range(0, len(buckets), each)]
    wide = _INNER / max(len(columns), 1)
    paths: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for number, column in enumerate(columns):
        counts = {kind: sum(one.get(kind, 0) for one in column) for kind in KINDS}
        whole = sum(counts.values())
        y = 0.0
        for kind, count in counts.items():
            if count:
                high = _STRIP * count / whole
                paths[kind].append(
                    f"M{number * wide:.4g} {y:.4g}h{wide:.4g}v{high:.4g}h-{wide:.4g}z"
                )
                y += high
    yield _text(_MARGIN, 62, "Along the stream", 'fill="#555"')
    yield f'<g transform="translate({_MARGIN},72)" shape-rendering="crispEdges">'
    for kind, path in paths.items():
        if path:
            yield f'<path fill="{_COLOURS[kind]}" d="{"".join(path)}"/>'
    yield "</g>"
    y = 72 + _STRIP + 16
    yield _text(_MARGIN, y, "0", 'fill="#555"')
    end = size(summary.position - summary.start)
    yield _text(_WIDTH - _MARGIN, y, end, 'fill="#555" text-anchor="end"')


def _kinds(summary: Summary) -> Iterator[str]:
    """Yield how much there is of each kind, which explains the colours as well."""
    kinds = [(kind, count) for kind, count in summary.kinds.items() if count]
    kinds.sort(key=lambda one: -one[1])
    total = sum(count for _, count in kinds)
    for kind, count in kinds:
        share = f"{size(count)}, {100 * count / total:.1f} %"
        yield _row(KINDS[kind], share, count / kinds[0][1], _COLOURS[kind])


def _sections(summary: Summary) -> Iterator[str]:
    """Yield the largest sections that are not RAM."""
    devices = [one for one in summary.sections.values() if one.name != RAM_NAME]
    devices.sort(key=lambda one: -one.size)
    for one in devices[:_SECTIONS]:
        label = one.name if not one.instance else f"{one.name} ({one.instance})"
        yield _row(label, size(one.size), one.size / (devices[0].size or 1), _COLOURS["device"])


def _row(label: str, amount: str, share: float, colour: str) -> str:
    """Return a bar with what it means."""
    return (
        f'<rect x="240" width="{max(share * _BAR, 1):.4g}" height="16" fill="{colour}"/>'
        + _text(232, 13, label if len(label) <= _LABEL else f"{label[:_LABEL]}...", _RIGHT)
        + _text(248 + _BAR, 13, amount, "")
    )


def _text(x: float, y: float, text: str, more: str) -> str:
    return f'<text x="{x}" y="{y}" {more}>{escape(clean(text))}</text>'.replace(" >", ">")
