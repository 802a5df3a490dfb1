"""Draws the state machines of the handshake, from the machines themselves.

    python docs/diagrams/draw.py

writes, for each machine, a picture (NAME.svg) and a page with the picture and
the whole table of transitions (NAME.md).  A test holds that the files are what
this would write now.  Nothing but the package is needed.

In a picture, the longest way through the machine runs down the middle, what
branches off stands on the right, and what leaves a state where it is stands in
its box.  The ways to ``closed`` are many and alike, and left to the table.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from qmigd.handshake import ChannelHandshake, DestinationHandshake, SourceHandshake
from qmigd.handshake.exchange import Exchange, Table

HERE = Path(__file__).parent
MACHINES: dict[str, tuple[type[Exchange], str]] = {
    "destination": (DestinationHandshake, "The destination of a connection"),
    "source": (SourceHandshake, "The source, on a control connection"),
    "channel": (ChannelHandshake, "Whoever opens a payload channel"),
}
NAMES = {
    "got_greeting": "hears the Greeting",
    "got_reply": "hears the Reply",
    "got_role": "hears a role header",
    "got_tls_greeting": "hears the Greeting, for a channel in TLS",
    "got_tls_reply": "hears a Reply that selects TLS",
    "got_violation": "hears what it must not",
    "lost": "the connection ends",
    "say_reply": "says the Reply",
    "say_role": "says the role header",
    "say_tls_reply": "says a Reply that selects TLS",
}
NOTHING = "returns(None)"
OUTPUTS = {
    "tell": "tells its owner",
    "send": "sends it",
    "tell_and_send": "tells its owner, sends ERROR",
    "tell_only": "tells its owner",
    NOTHING: "nothing",
}

FONT, SMALL = 14, 11
CHAR = 6.2  # width of a character of the small size, rounded up
GAP, LINE, LANE, PORT = 34, 15, 14, 17


def words(name: str) -> str:
    """Return an input in words."""
    if name in NAMES:
        return NAMES[name]
    kind, _, message = name.partition("_")
    said = message.removeprefix("bare_").upper()
    if message.startswith("bare_"):
        said += ", nothing selected"
    return f"{'hears' if kind == 'got' else 'says'} {said}"


def did(said: str, output: str) -> str:
    """Return what an output does, in words."""
    if (said, output) == ("got_greeting", "send"):
        return "sends the role header"
    return OUTPUTS[output]


def joined(inputs: list[str]) -> list[str]:
    """Return several inputs in as few lines as their verbs allow."""
    by_verb: dict[str, list[str]] = defaultdict(list)
    for name in sorted(map(words, inputs)):
        verb, _, rest = name.partition(" ")
        by_verb[verb].append(rest)
    return [f"{verb} {', '.join(rests)}" for verb, rests in by_verb.items()]


@dataclass
class Box:
    """A state in the picture."""

    name: str
    lines: list[str]
    column: int
    rank: int
    #: How many arrows need room on its busier side.
    arrows: int = 0
    x: float = 0.0
    y: float = 0.0
    #: How many arrows have left or entered by each side so far.
    used: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def width(self) -> float:
        return max([len(line) * CHAR for line in self.lines] + [len(self.name) * 9, 90]) + 20

    @property
    def height(self) -> float:
        return 26 + max(LINE * len(self.lines), PORT * (self.arrows - 1))

    @property
    def way(self) -> float:
        """Where the arrow to the next state below leaves."""
        return self.x + (45 if self.column else self.width / 2)

    def port(self, side: str) -> float:
        """Return the height of the next arrow on a side."""
        self.used[side] += 1
        return self.y + 13 + (self.used[side] - 1) * PORT


def ranks(table: Table, edges: dict[tuple[str, str], list[str]]) -> tuple[dict[str, int], set[str]]:
    """Return each state's distance from the first by the longest way, and the middle column."""
    rank = {table.initial: 0}
    before: dict[str, str] = {}
    todo = [table.initial]
    while todo:
        state = todo.pop(0)
        for old, new in sorted(edges):
            if old == state and rank.get(new, -1) < rank[state] + 1:
                rank[new] = rank[state] + 1
                before[new] = state
                todo.append(new)
    middle = {max(rank, key=lambda state: (rank[state], state))}
    while added := {before[state] for state in middle if state in before} - middle:
        middle |= added
    return rank, middle


def svg(table: Table, title: str) -> str:
    """Return the picture of a machine."""
    edges: dict[tuple[str, str], list[str]] = defaultdict(list)
    loops: dict[str, list[str]] = defaultdict(list)
    for line in table.transitions:
        if "closed" not in (line.state, line.next):
            if line.state == line.next:
                if line.outputs != (NOTHING,):
                    loops[line.state].append(line.input)
            else:
                edges[line.state, line.next].append(line.input)
    rank, middle = ranks(table, edges)
    # What goes on within the right column stands above what else is in its row.
    goes_on = {new for old, new in edges if old not in middle}
    boxes = {
        state: Box(state, joined(loops[state]), 0 if state in middle else 1, rank[state])
        for state in sorted(rank, key=lambda state: (rank[state], state not in goes_on, state))
    }
    labels = {edge: joined(inputs) for edge, inputs in edges.items()}
    skips, turns, returns = [], [], []
    for edge in edges:
        start, end = boxes[edge[0]], boxes[edge[1]]
        if start.column < end.column:
            turns.append(edge)
        elif start.column > end.column:
            returns.append(edge)
        elif end.rank - start.rank > 1:
            skips.append(edge)
    for box in boxes.values():
        box.arrows = max(sum(edge[side] == box.name for edge in turns) for side in (0, 1))

    def room(ways: list[tuple[str, str]]) -> float:
        """Return the width that labels and lanes of these ways need."""
        if not ways:
            return 0
        return max(len(line) for way in ways for line in labels[way]) * CHAR + LANE * len(ways) + 20

    left = 20 + room(skips)
    middle_width = max(box.width for box in boxes.values() if box.column == 0)
    center = left + middle_width / 2
    # The boxes that the ways to the right come from are rarely the widest.
    widest = max([boxes[old].width for old, _ in turns], default=0)
    right = max(center + widest / 2 + room(turns), left + middle_width + 20)
    y = 20.0
    for level in range(max(rank.values()) + 1):
        row = [box for box in boxes.values() if box.rank == level]
        stacked: dict[int, float] = {0: y, 1: y}
        for box in row:
            box.x = center - box.width / 2 if box.column == 0 else right
            box.y = stacked[box.column]
            stacked[box.column] += box.height + GAP
        y = max(stacked.values())
    width = max(box.x + box.width for box in boxes.values())
    for edge, lines in labels.items():
        if edge not in [*turns, *skips, *returns]:
            way = boxes[edge[0]].way
            width = max(width, way + 8 + max(map(len, lines)) * CHAR)
    outside = width
    width += 20 + LANE * len(returns)

    drawn: list[str] = []
    lanes = {"left": 0, "right": 0, "outside": 0}

    def path(points: list[tuple[float, float]]) -> None:
        route = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
        drawn.append(f'<polyline points="{route}" class="way" marker-end="url(#head)"/>')

    def label(lines: list[str], x: float, y: float, anchor: str) -> None:
        for number, line in enumerate(lines):
            drawn.append(
                f'<text x="{x:.0f}" y="{y + LINE * number:.0f}" class="small" '
                f'text-anchor="{anchor}">{escape(line)}</text>'
            )

    # The way that turns off first takes the outermost lane, so that fewer ways cross.
    for (old, new), lines in sorted(
        labels.items(), key=lambda item: (boxes[item[0][0]].y, boxes[item[0][1]].y)
    ):
        start, end = boxes[old], boxes[new]
        if start.column == end.column and end.rank - start.rank == 1:
            path([(start.way, start.y + start.height), (start.way, end.y)])
            middle_y = (start.y + start.height + end.y) / 2
            label(lines, start.way + 8, middle_y + 4 - LINE * (len(lines) - 1) / 2, "start")
        elif (old, new) in returns:
            lanes["outside"] += 1
            lane = outside + LANE * lanes["outside"]
            out, into = start.port("right"), end.port("right")
            edge_of_end = end.x + end.width
            path([(start.x + start.width, out), (lane, out), (lane, into), (edge_of_end, into)])
            label(lines, edge_of_end + 14, into - 4, "start")
        elif end.column == 0:
            lanes["left"] += 1
            lane = left - 10 - LANE * (len(skips) - lanes["left"] + 1)
            out, into = start.port("left"), end.port("left")
            path([(start.x, out), (lane, out), (lane, into), (end.x, into)])
            label(lines, lane - 6, (out + into) / 2, "end")
        else:
            lanes["right"] += 1
            lane = right - LANE * lanes["right"] - 8
            out, into = start.port("right"), end.port("left")
            path([(start.x + start.width, out), (lane, out), (lane, into), (end.x, into)])
            label(lines, start.x + start.width + 6, out - 4, "start")
    for box in boxes.values():
        kind = "box first" if box.name == table.initial else "box"
        drawn.append(
            f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" '
            f'height="{box.height:.0f}" rx="6" class="{kind}"/>'
        )
        middle_x = box.x + box.width / 2
        drawn.append(
            f'<text x="{middle_x:.0f}" y="{box.y + 18:.0f}" class="name" '
            f'text-anchor="middle">{escape(box.name)}</text>'
        )
        label(box.lines, middle_x, box.y + 18 + LINE, "middle")
    body = "\n".join(drawn)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {y:.0f}" \
width="{width:.0f}" height="{y:.0f}" role="img">
<title>{escape(title)}</title>
<style>
text {{ font-family: sans-serif; fill: #1b1f24 }}
.name {{ font-size: {FONT}px; font-weight: bold }}
.small {{ font-size: {SMALL}px }}
.box {{ fill: #eef3fa; stroke: #3b5b85 }}
.first {{ stroke-width: 3 }}
.way {{ fill: none; stroke: #3b5b85 }}
</style>
<defs><marker id="head" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">\
<path d="M0,0 L9,4 L0,8 z" fill="#3b5b85"/></marker></defs>
<rect width="100%" height="100%" fill="#ffffff"/>
{body}
</svg>
"""


def page(name: str, table: Table, title: str) -> str:
    """Return the page of a machine."""
    rows = "\n".join(
        f"| {line.state} | {words(line.input)} | {line.next} | "
        f"{', '.join(did(line.input, output) for output in line.outputs)} |"
        for line in table.transitions
    )
    return f"""% Written by draw.py from the machine itself; changes here are lost.

# {title}

![The states and the ways between them]({name}.svg)

The picture leaves out the ways to `closed`, and what is ignored; the table has
them. What the peer says and the table does not have is a violation ("hears what
it must not"), and what the owner says and the table does not have is refused to
the owner.

| state | what happens | next state | what it does |
|---|---|---|---|
{rows}
"""


def files() -> dict[str, str]:
    """Return the name of each file with what belongs in it."""
    made = {}
    for name, (machine, title) in MACHINES.items():
        made[f"{name}.svg"] = svg(machine.table, title)
        made[f"{name}.md"] = page(name, machine.table, title)
    return made


if __name__ == "__main__":
    for name, content in files().items():
        (HERE / name).write_text(content)
