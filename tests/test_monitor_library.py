"""The management socket, driven by the ``qemu.qmp`` library as it comes from PyPI."""

from __future__ import annotations

import json
import sys

from twisted.internet.defer import Deferred
from twisted.internet.utils import getProcessOutputAndValue

from qmigd import __version__
from qmigd.api import COMMANDS, schema

from .management import MIGRATION, ManagementTestCase

#: A program of somebody who knows QMP and has never heard of qmigd.
PROGRAM = """
import asyncio, json, sys
from qemu.qmp import ExecuteError, QMPClient

async def main():
    client = QMPClient("somebody")
    await client.connect(sys.argv[1])
    said = {"greeting": client.greeting._asdict()}
    said["schema"] = await client.execute("query-qmp-schema")
    said["commands"] = await client.execute("query-commands")
    said["migrate"] = await client.execute("migrate", {"guest": "web1", "uri": "tcp:h:1"})
    said["event"] = dict(await client.events.get())
    try:
        await client.execute("migrate", {"guest": "web1"})
    except ExecuteError as error:
        said["error"] = [error.error.error.class_, error.error.error.desc]
    await client.disconnect()
    print(json.dumps(said))

asyncio.run(main())
"""


class LibraryTests(ManagementTestCase):
    async def test_library(self) -> None:
        """Greeting, schema, a command, an event and an error are all as the library wants them."""
        answers = self.operations.answers
        answers["query-qmp-schema"] = schema()
        answers["query-commands"] = [{"name": name} for name in COMMANDS]

        def migrate(**arguments: str) -> dict[str, str]:
            self.monitor.event(
                "MIGRATION",
                {"id": MIGRATION, "guest": "web1", "role": "source", "status": "setup"},
            )
            return {"id": MIGRATION}

        answers["migrate"] = migrate
        done: Deferred[tuple[bytes, bytes, int]] = getProcessOutputAndValue(
            sys.executable, ["-c", PROGRAM, self.path]
        )
        out, err, code = await done
        self.assertEqual("", err.decode())
        self.assertEqual(0, code)
        said = json.loads(out)
        self.assertEqual(f"qmigd {__version__}", said["greeting"]["QMP"]["version"]["package"])
        self.assertEqual(schema(), said["schema"])
        self.assertIn({"name": "migrate"}, said["commands"])
        self.assertEqual({"id": MIGRATION}, said["migrate"])
        self.assertEqual("MIGRATION", said["event"]["event"])
        self.assertEqual(MIGRATION, said["event"]["data"]["id"])
        self.assertEqual("GenericError", said["error"][0])
        self.assertIn("migrate needs the argument 'uri'", said["error"][1])
