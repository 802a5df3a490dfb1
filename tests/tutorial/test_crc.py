"""The tests of ``__org.example_crc``: ``trial test_crc``."""

# -- it is used

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import qmigd_example_crc as crc
from qmigd_example_crc import feature
from twisted.internet import reactor
from twisted.trial.unittest import TestCase

from qmigd.testing import Pair


class ChecksumsTests(TestCase):
    async def test_used(self) -> None:
        async with Pair(reactor, [feature]) as pair:
            moved = await pair.move(require=[feature.name])
        self.assertEqual({"checksum": "crc32"}, moved.plan["agreements"][feature.name])

    # -- only one host has it

    async def test_one_host(self) -> None:
        async with Pair(reactor, source_features=[feature]) as pair:
            moved = await pair.move()
        reasons = {one["name"]: one["reason"] for one in moved.plan["left-out"]}
        self.assertEqual("destination host: its qmigd does not offer it", reasons[feature.name])

    # -- it does what it is for

    async def test_garbled(self) -> None:
        class Garbling(crc.Framed):
            def encode(self, data: memoryview) -> bytes:
                return super().encode(data)[:-1] + b"?"

        class Broken(crc.Checksums):
            def codec(self, agreement: Mapping[str, Any]) -> Callable[[], crc.Framed]:
                return lambda: Garbling(zlib.crc32)

        async with Pair(
            reactor, source_features=[Broken()], destination_features=[feature]
        ) as pair:
            moved = await pair.move(require=[feature.name], check=False)
            self.assertEqual("failed", moved.status)
            self.assertEqual("running", pair.here.guest.machine.state)

    # -- its end
