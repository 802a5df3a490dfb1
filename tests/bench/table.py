"""A row of the one table, and how the table is written.

A row is about something that was measured in rounds, by turns: once with qmigd and
once with its *peer* in the same place.  Each round gives one ratio (or one
difference); the median of those is what counts, since whatever else the machine
does in a round hits both alike.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["Judge", "Row", "compare", "single", "to_json", "write"]

#: Columns of a table that does not go to a terminal.
_WIDTH = 160

#: Columns that say what was measured, on the narrowest terminal.
_WHAT = 22


@dataclass(frozen=True)
class Row:
    """One line of the table.

    :ivar part: the part of the benchmark.
    :ivar what: what was measured.
    :ivar unit: of ``ours`` and ``theirs``.
    :ivar ours: the median with qmigd.
    :ivar peer: what it is compared with; empty if with nothing.
    :ivar theirs: the median with that.
    :ivar relation: ``"ratio"`` (ours / theirs), ``"difference"`` (ours - theirs, in the
        same unit) or empty.
    :ivar related: the median of that over the rounds.
    :ivar quartiles: between them lies the middle half of the rounds.
    :ivar target: in words; empty if there is none.
    :ivar met: whether it is met; ``None`` without a target.
    :ivar note: what a reader should know, for instance why there are no numbers.
    """

    part: str
    what: str
    unit: str
    ours: float | None = None
    peer: str = ""
    theirs: float | None = None
    relation: str = ""
    related: float | None = None
    quartiles: tuple[float, float] | None = None
    target: str = ""
    met: bool | None = None
    rounds: int = 0
    note: str = ""


#: Decides by the median and the quartiles whether a target is met.
Judge = Callable[[float, tuple[float, float]], bool]


def compare(
    part: str,
    what: str,
    unit: str,
    peer: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    relation: str = "ratio",
    target: str = "",
    judge: Judge | None = None,
    note: str = "",
) -> Row:
    """Make a row of what was measured in each round with qmigd and with its peer."""
    if relation == "ratio":
        each = [our / their for our, their in zip(ours, theirs, strict=True)]
    else:
        each = [our - their for our, their in zip(ours, theirs, strict=True)]
    middle = statistics.median(each)
    quartiles = _quartiles(each)
    return Row(
        part,
        what,
        unit,
        statistics.median(ours),
        peer,
        statistics.median(theirs),
        relation,
        middle,
        quartiles,
        target,
        judge(middle, quartiles) if judge is not None else None,
        len(each),
        note,
    )


def single(
    part: str,
    what: str,
    unit: str,
    values: Sequence[float],
    *,
    target: str = "",
    judge: Judge | None = None,
    note: str = "",
) -> Row:
    """Make a row of something that is compared with nothing."""
    middle = statistics.median(values)
    quartiles = _quartiles(values)
    return Row(
        part,
        what,
        unit,
        middle,
        quartiles=quartiles,
        target=target,
        met=judge(middle, quartiles) if judge is not None else None,
        rounds=len(values),
        note=note,
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def write(rows: Sequence[Row], heading: str, file: IO[str]) -> None:
    """Write the table: with lines and colours on a terminal, plain elsewhere."""
    terminal = Console(file=file, highlight=False)
    text = io.StringIO()
    console = terminal
    if not terminal.is_terminal:
        console = Console(file=text, width=_WIDTH, highlight=False)
    table = Table(
        box=box.SIMPLE_HEAD if terminal.is_terminal else None,
        title=heading,
        title_justify="left",
        pad_edge=False,
    )
    for name in ("part", "what", "qmigd", "peer", "", "qmigd to peer", "(quartiles)", "target"):
        right = name in ("qmigd", "", "qmigd to peer")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    table.add_column("met", overflow="fold")
    table.columns[1].min_width = _WHAT
    last = ""
    for row in rows:
        if last and row.part != last:
            table.add_section()
            if not terminal.is_terminal:
                table.add_row()
        table.add_row(row.part if row.part != last else "", row.what, *_cells(row))
        last = row.part
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.part}, {row.what}: {row.note}", markup=False, soft_wrap=True)
    # rich fills lines up with blanks.
    file.writelines(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def _cells(row: Row) -> list[str]:
    if row.ours is None:
        return ["none", row.peer]
    related = between = ""
    shown = _number
    if row.related is not None:
        shown = _ratio if row.relation == "ratio" else _difference
        related = shown(row.related) + (f" {row.unit}" if row.relation == "difference" else "")
    if row.quartiles is not None and row.rounds > 1:
        between = " .. ".join(map(shown, row.quartiles))
    return [
        f"{_number(row.ours)} {row.unit}",
        row.peer,
        f"{_number(row.theirs)} {row.unit}" if row.theirs is not None else "",
        related,
        f"({between})" if between else "",
        row.target,
        {True: "[green]yes[/]", False: "[red]NO[/]", None: ""}[row.met],
    ]


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _difference(value: float) -> str:
    return f"{value:+.1f}"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON."""
    return [asdict(row) for row in rows]
