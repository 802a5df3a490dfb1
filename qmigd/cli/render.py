"""What qmigctl prints: JSON of the daemon in, text for people out.

Everything here is a pure function.  Whatever came from a daemon passes
:func:`clean` on its way out, because part of it came from a peer, and a
terminal obeys control characters.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "clean",
    "details",
    "duration",
    "features",
    "guests",
    "migrations",
    "rate",
    "remaining_seconds",
    "size",
    "summary",
    "table",
    "tunables",
]

_Json = Mapping[str, Any]

#: Columns that the last column of a table may be squeezed to.
_NARROWEST = 30


def clean(text: object) -> str:
    """Return one line without control characters."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def size(count: float) -> str:
    """Return a number of bytes: ``"512 B"``, ``"1.4 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def rate(mbps: float) -> str:
    """Return megabits per second as bytes per second: ``"1.1 GiB/s"``."""
    return f"{size(mbps * 1e6 / 8)}/s"


def duration(milliseconds: float) -> str:
    """Return a time: ``"41 ms"``, ``"3.2 s"``, ``"2 min 5 s"``, ``"1 h 2 min"``."""
    if milliseconds < 1000:
        return f"{milliseconds:.0f} ms"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:.1f} s"
    minutes, seconds = divmod(round(milliseconds / 1000), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    return f"{minutes // 60} h {minutes % 60} min"


def remaining_seconds(ram: _Json) -> float | None:
    """Return how long QEMU will need for the rest of RAM; ``None``: it cannot be said.

    What the guest dirties meanwhile is taken into account: where that is more
    than what is sent, there is no end to be seen.
    """
    sent = ram.get("mbps", 0) * 1e6 / 8
    dirtied = ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096)
    if "remaining" not in ram or sent <= dirtied:
        return None
    return float(ram["remaining"]) / (sent - dirtied)


def details(entry: _Json) -> list[str]:
    """Return pass, transferred, remaining, rate and estimated end, what there is of them."""
    ram = entry.get("ram", {})
    said = []
    if ram.get("dirty-sync-count"):
        said.append(f"pass {ram['dirty-sync-count']}")
    if "transferred" in ram:
        said.append(f"{size(ram['transferred'])} sent")
    if "remaining" in ram:
        said.append(f"{size(ram['remaining'])} left")
    if ram.get("mbps"):
        said.append(rate(ram["mbps"]))
    if "ended" not in entry and ram.get("remaining") and ram.get("mbps"):
        seconds = remaining_seconds(ram)
        if seconds is not None:
            said.append(f"about {duration(seconds * 1000)} to go")
        elif entry.get("postcopy"):
            said.append(
                f"dirtied as fast as it is sent: 'qmigctl postcopy {entry['guest']}' would end it"
            )
        else:
            said.append("dirtied as fast as it is sent")
    return said


def table(head: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> str:
    """Return aligned columns; the last is wrapped to ``width``, if there is one."""
    cells = [list(head), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(row[n]) for row in cells) for n in range(len(head) - 1)]
    before = sum(widths) + 2 * len(widths)
    lines = []
    for row in cells:
        first = "".join(f"{cell:<{wide}}  " for cell, wide in zip(row, widths, strict=False))
        lines += _hanging(first, row[-1], before, width)
    return "\n".join(lines)


def _hanging(first: str, text: str, indent: int, width: int | None) -> list[str]:
    """Return ``first`` followed by ``text``, wrapped below its own beginning."""
    parts = [text]
    if width is not None:
        parts = textwrap.wrap(text, max(_NARROWEST, width - indent)) or [""]
    return [f"{first if n == 0 else ' ' * indent}{part}".rstrip() for n, part in enumerate(parts)]


def guests(answer: Sequence[_Json], width: int | None = None) -> str:
    """Return the table of ``qmigctl guests``."""
    if not answer:
        return (
            "This daemon knows no guest. Register a running one with 'qmigctl guest-add', or "
            "put a [guest.NAME] into its configuration."
        )
    rows = []
    for guest in answer:
        where = guest.get("qmp") or ("started by qmigd" if guest["launch"] else "")
        note = guest.get("reason", "")
        if "migration" in guest:
            note = f"in migration {guest['migration']}"
        rows.append((guest["name"], guest["state"], where, note))
    return table(("GUEST", "STATE", "QMP", ""), rows, width)


def features(answer: _Json, width: int | None = None) -> str:
    """Return the table of ``qmigctl features``."""
    pair = "peer" in answer
    rows = []
    for feature in answer["features"]:
        if pair:
            state = "selected" if feature.get("selected") else "left out"
        else:
            state = "offered" if feature["offered"] else "no"
        rows.append((feature["name"], state, feature.get("reason") or feature["summary"]))
    text = table(("FEATURE", "", ""), rows, width)
    for blocker in answer.get("blocked-reasons", ()):
        text += "\n" + "\n".join(_hanging("the guest cannot be moved  ", clean(blocker), 27, width))
    if "path" in answer:
        path = f"{answer['path']}: {answer.get('path-reason', '')}".rstrip(": ")
        text += "\n" + "\n".join(_hanging("path  ", clean(path), 6, width))
    for warning in answer.get("warnings", ()):
        text += "\n" + "\n".join(_hanging("warning  ", clean(warning), 9, width))
    return text


def tunables(answer: Sequence[_Json], width: int | None = None) -> str:
    """Return the table of ``qmigctl tunables``."""
    rows = []
    for tunable in answer:
        value = tunable["value"]
        shown = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
        notes = [word for word in ("deprecated", "unstable") if tunable[word]]
        if tunable.get("values"):
            notes.insert(0, "one of " + ", ".join(tunable["values"]))
        rows.append((tunable["name"], tunable["type"], shown, "; ".join(notes)))
    return table(("TUNABLE", "TYPE", "VALUE", ""), rows, width)


def migrations(answer: Sequence[_Json], width: int | None = None) -> str:
    """Return the table of ``qmigctl status``, the latest last."""
    if not answer:
        return "There has been no migration since this daemon began."
    rows = []
    for entry in answer:
        if "error" in entry:
            note = entry["error"]["desc"]
        elif "ended" in entry:
            note = _times(entry)
        else:
            note = "; ".join([entry["step"], *details(entry)])
        arrow = "to" if entry["role"] == "source" else "from"
        rows.append((entry["guest"], f"{arrow} {entry['peer']}", entry["status"], note))
    return table(("GUEST", "PEER", "STATUS", ""), rows, width)


def _times(entry: _Json) -> str:
    said = []
    if "file" in entry:
        # QEMU's times end before the file is on the disk, and begin after it was verified.
        return f"in {duration(1000 * (entry['ended'] - entry['started']))}"
    if "total-time" in entry:
        said.append(f"in {duration(entry['total-time'])}")
    if "downtime" in entry:
        still = entry["downtime"] + entry.get("handover-time", 0)
        said.append(f"stood still for {duration(still)}")
    return ", ".join(said)


def summary(entry: _Json, width: int | None = None) -> str:
    """Return what is said at the end of a migration that went well."""
    guest, peer = clean(entry["guest"]), clean(entry["peer"])
    moved = f"moved to {peer}" if entry["role"] == "source" else f"came from {peer}"
    times = _times(entry)
    file = entry.get("file")
    if file:
        how = "saved to" if entry["role"] == "source" else "restored from"
        moved = f"was {how} {clean(file['path'])}"
    lines = [f"{guest} {moved}{' ' + times if times else ''}."]
    ram = entry.get("ram", {})
    plan = entry.get("plan")
    said: list[tuple[str, str]] = []
    if "peer-names" in entry:
        said.append(("peer", f"in TLS, with the certificate of {', '.join(entry['peer-names'])}"))
    if plan:
        said.append(("path", f"{plan['path']}: {plan['path-reason']}".rstrip(": ")))
        said.append(("features", ", ".join(plan["features"]) or "none"))
        said.append(("channels", _channels(plan["channels"])))
    if file:
        said.append(("guest", entry["step"]))
        said.append(("format", ", ".join(dict.fromkeys((file["format"], *file["features"])))))
        said.append(("size", f"{size(file['size'])}, {size(file['on-disk'])} on the disk"))
    elif "transferred" in ram:
        passes = ram.get("dirty-sync-count")
        more = f", {passes} {'pass' if passes == 1 else 'passes'}" if passes else ""
        said.append(("sent", size(ram["transferred"]) + more))
    if plan:
        for n, left in enumerate(plan["left-out"]):
            said.append(("" if n else "left out", f"{left['name']}: {left['reason']}"))
    for title, text in said:
        lines += _hanging(f"  {title:<10}", clean(text), 12, width)
    return "\n".join(lines)


def _channels(channels: Sequence[_Json]) -> str:
    counts: dict[str, int] = {}
    for channel in channels:
        counts[channel["name"]] = counts.get(channel["name"], 0) + 1
    return ", ".join(f"{name} x {n}" if n > 1 else name for name, n in counts.items())
