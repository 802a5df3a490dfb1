"""Peers that speak a later version of the handshake as well: with one of today they speak 1."""

from __future__ import annotations

import socket
import struct

from tests.minipeer import MAGIC, greet
from tests.rig.newer import UNKNOWN, Newer
from tests.rig.pair import KNOWN, PairCase


class NewerPeerTests(PairCase):
    """Two daemons of today, each of which takes the other for one of the future."""

    def newer(self, uri: str, *, stray: bool = False) -> Newer:
        newer = Newer(uri, stray=stray)
        self.addCleanup(newer.close)
        return newer

    def test_moves(self) -> None:
        """Version 1 is chosen, unknown features are skipped and unknown JSON too: it moves."""
        pair = self.pair("7.2", "10.0").start()
        newer = self.newer(pair.there.uri)
        plan = pair.move("relay", "multifd", uri=newer.uri)["plan"]
        pair.prove_moved()
        self.assertIn("multifd", plan["features"])
        for version, features in newer.replies:
            self.assertEqual(1, version)
            self.assertLessEqual(set(features), KNOWN)
        # GUEST, FEATURE, PREPARE, PREPARED, STATUS, RELEASE and OUTCOME had more in them.
        self.assertLessEqual({2, 3, 4, 5, 9, 11, 12}, newer.changed)
        self.assertNotIn(UNKNOWN[0], [one["name"] for one in plan["left-out"]])

    def test_baseline(self) -> None:
        """The same with no feature: the stream follows behind START."""
        pair = self.pair("10.0", "7.2").start()
        newer = self.newer(pair.there.uri)
        pair.move("baseline", uri=newer.uri)
        pair.prove_moved()
        self.assertEqual([(1, [])], newer.replies)

    def test_stray(self) -> None:
        """A message of version 2 in version 1 is refused by its number; nothing has moved."""
        pair = self.pair("7.2").start()
        newer = self.newer(pair.there.uri, stray=True)
        pair.begin("direct", uri=newer.uri)
        self.assertIn("99", pair.failed(pair.here))
        self.assertEqual("unknown-message", pair.entry(pair.here)["error"]["class"])
        pair.prove_stayed()
        newer.stray = False
        pair.move("direct", uri=newer.uri)
        pair.prove_moved()

    def test_insists(self) -> None:
        """A source that will have version 2 or nothing gets nothing, and is told why."""
        pair = self.pair("7.2").start()
        _, host, port = pair.there.uri.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as source:
            self.assertEqual([1], greet(source).versions)
            source.sendall(MAGIC + struct.pack(">BI", 2, 0))
            kind, length = struct.unpack(">HI", source.recv(6, socket.MSG_WAITALL))
            body = source.recv(length, socket.MSG_WAITALL)
        self.assertEqual((1, b"no-common-version"), (kind, body[1 : 1 + body[0]]))
        self.assertIn(b"asks for version 2 of the handshake; this side speaks 1", body)
        self.assertEqual("inmigrate", pair.destination.status())
