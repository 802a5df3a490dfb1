"""docs/protocol.md and the diagrams say what the code does."""

from __future__ import annotations

import importlib.util
import re
import sys
import uuid
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

import qmigd.channels
import qmigd.handshake
import qmigd.migration
import qmigd.transports
import qmigd.wire
from qmigd.wire import inband, limits, messages
from qmigd.wire.greeting import BINDING_SIZE, Greeting, Reply, binding
from qmigd.wire.messages import MessageType, body_limit
from qmigd.wire.role import RoleHeader
from tests.rig.examples import hex_examples

DOCS = Path(__file__).parent.parent / "docs"
ROLE = RoleHeader(uuid.UUID("4cc11957-f1c9-4eff-8d2d-0a5f6f2b1d3e"), "main", 0)

#: What the examples with bytes are, in their order on the page.
EXAMPLES: list[Any] = [
    Greeting((1,), ("multifd", "postcopy-ram")),
    Reply(1, ()),
    Reply(1, ("multifd",)),
    messages.Error("no-common-version", "This side speaks only 1."),
    messages.Guest({"name": "web"}),
    messages.Feature("multifd", {"channels": 4}),
    messages.Start(),
    messages.Attached(),
    messages.Heartbeat(),
    messages.Binding(binding(Greeting((1,), ("tls", "multifd")), Reply(1, ("tls",)))),
    ROLE.prove(bytes(range(32))),
    inband.OPENING,
    inband.OPENING
    + inband.frame(Greeting((1,), ()).encode(), by_source=False)
    + inband.frame(Reply(1, ()).encode() + messages.Start().encode(), by_source=True)
    + inband.OPENING[:8],
]


class ProtocolPage(SynchronousTestCase):
    """The page is true."""

    page = (DOCS / "protocol.md").read_text()

    def test_examples(self) -> None:
        """The bytes of each example are those that the code writes, and so are the words."""
        found = [data.hex(" ") for data in hex_examples(self.page)]
        examples = [one if isinstance(one, bytes) else one.encode() for one in EXAMPLES]
        self.assertEqual(found, [example.hex(" ") for example in examples])

    def test_messages(self) -> None:
        """The table of messages has every type with its name and its limit."""
        sizes = {0: "0", limits.MAX_BODY: "64 KiB", limits.MAX_GUEST: "1 MiB", BINDING_SIZE: "32"}
        rows = re.findall(r"^\| (\d+) \| \[(\w+)\]\(#\w+\) \|.*\| ([^|]+) \|$", self.page, re.M)
        self.assertEqual(
            rows,
            [(str(kind.value), kind.name, sizes[body_limit(kind)]) for kind in MessageType],
        )

    def test_limits(self) -> None:
        """The table of limits has every limit."""
        text = self.page[self.page.index("## Limits") : self.page.index("## Deadlines")]
        rows = re.findall(r"^\| [^|]+ \| ([\d,]+)[^|]* \|", text, re.M)
        self.assertEqual(
            [int(number.replace(",", "")) for number in rows],
            [
                limits.MAX_VERSIONS,
                limits.MAX_FEATURES,
                limits.MAX_OPENING,
                limits.MAX_STRING,
                limits.MAX_GUEST,
                limits.MAX_BODY,
                limits.MAX_BEFORE_START,
                limits.MAX_JSON_MARKS,
                limits.MAX_JSON_DEPTH,
            ],
        )

    def test_codes(self) -> None:
        """Every code that an ERROR can have is on the page."""
        codes: set[str] = set()
        rooms = (qmigd.wire, qmigd.handshake, qmigd.channels, qmigd.migration, qmigd.transports)
        for package in rooms:
            for file in Path(package.__path__[0]).glob("*.py"):
                codes |= set(re.findall(r'code="([a-z-]+)"', file.read_text()))
        # The owner's mistakes, which are never sent.
        codes -= {"handshake-misuse"}
        self.assertTrue(codes)
        for code in codes:
            self.assertRegex(self.page, rf"(?m)^\| (`[a-z-]+`, )*`{code}`[ ,]")


class Diagrams(SynchronousTestCase):
    """The diagrams are those of the machines."""

    def test_drawn_from_the_machines(self) -> None:
        """The files are what draw.py writes now; else run it again."""
        spec = importlib.util.spec_from_file_location("draw", DOCS / "diagrams" / "draw.py")
        assert spec is not None and spec.loader is not None
        draw = importlib.util.module_from_spec(spec)
        sys.modules["draw"] = draw
        self.addCleanup(sys.modules.pop, "draw")
        spec.loader.exec_module(draw)
        for name, content in draw.files().items():
            self.assertEqual((DOCS / "diagrams" / name).read_text(), content, name)
