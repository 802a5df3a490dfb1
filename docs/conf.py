"""Sphinx's configuration, and the parts of the pages that come out of the code.

A page has a line ``<!-- out of the code: NAME -->`` where one of :data:`PARTS` goes.
"""

import re
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from qmigd import __version__
from qmigd.cli.options import EXIT_CODES
from qmigd.guests.quirks import ANY, QUIRKS, Versions
from qmigd.migration.ownership import Act, Peer, Released, on_destination_failure, on_source_failure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

project = "qmigd"
copyright = "the qmigd authors"
version = release = __version__
extensions = ["myst_parser", "commands_page"]
exclude_patterns = ["_ext", "vectors"]
html_theme = "alabaster"
html_theme_options = {
    "description": "Live migration of QEMU guests, with everything negotiated",
    "page_width": "1060px",
    "sidebar_width": "230px",
}
# Most of what is quoted is what a terminal shows.
highlight_language = "text"
html_show_sourcelink = False
html_copy_source = False
# The test vectors are for programs: they are there to be fetched, as they are.
html_extra_path = ["vectors"]
myst_heading_anchors = 4
myst_links_external_new_tab = False
nitpicky = True


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell for cell in line) + " |" for line in lines)


def exit_codes() -> str:
    return _table(("code", "meaning"), ((f"{int(c)}", text) for c, text in EXIT_CODES.items()))


def features() -> str:
    rows = []
    for entry in distribution("qmigd").entry_points.select(group="qmigd.features"):
        feature = entry.load()
        needs = ", ".join(f"`{name}`" for name in sorted(feature.requires)) or "-"
        paths = ", ".join(sorted(feature.paths))
        gain = feature.rank.name.lower().replace("_", " ")
        rows.append((f"`{feature.name}`", feature.summary, gain, needs, paths))
    return _table(("feature", "what it does", "what it gains", "needs", "paths"), sorted(rows))


def quirks() -> str:
    def side(versions: Versions) -> str:
        if versions == ANY:
            return "any"
        first, end = (".".join(map(str, pair or ())) for pair in (versions.first, versions.end))
        since = f"{first} or newer" if versions.first > (0, 0) else ""
        return " and ".join(filter(None, (since, f"older than {end}" if end else "")))

    rows = []
    for quirk in QUIRKS:
        machine = "any" if quirk.machine is None else f"up to {'.'.join(map(str, quirk.machine))}"
        names = " with ".join(f"`{name}`" for name in sorted(quirk.features))
        test = f"`{quirk.test.rpartition('.')[2]}`"
        rows.append(
            (names, side(quirk.source), side(quirk.destination), machine, quirk.reason, test)
        )
    head = ("what", "source's QEMU", "destination's QEMU", "machine type", "why", "shown by")
    return _table(head, rows)


def ownership_source() -> str:
    # Once RELEASE was sent, or is about to be, the guest at the source is stopped.
    words = {Act.RUN: Act.RUN.value, Act.LEAVE: "leave stopped"}
    rows = (
        (released.value, peer.value, words[on_source_failure(released, peer)])
        for released in Released
        for peer in Peer
    )
    return _table(("RELEASE was sent", "the destination's guest", "the source's guest"), rows)


def ownership_destination() -> str:
    # A guest that is this side's own is left to itself, running or not.
    words = {Act.QUIT: Act.QUIT.value, Act.LEAVE: Act.LEAVE.value}
    rows = (
        (released.value, "yes" if ran else "no", words[on_destination_failure(released, ran)])
        for released in Released
        for ran in (False, True)
    )
    return _table(("RELEASE has come", "the guest has run here", "the destination's guest"), rows)


PARTS: dict[str, Callable[[], str]] = {
    "exit codes": exit_codes,
    "features": features,
    "quirks": quirks,
    "ownership, source": ownership_source,
    "ownership, destination": ownership_destination,
}


def _insert(app: Any, page: str, source: list[str]) -> None:
    source[0] = re.sub(
        r"<!-- out of the code: (.+?) -->", lambda found: PARTS[found[1]](), source[0]
    )


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", _insert)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
