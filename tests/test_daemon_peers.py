"""Peers that do not keep to the protocol, against a real daemon with a guest that waits.

Whatever they do: they get an ERROR with a text where they can still read one, and the end
of the connection within the handshake's deadline; the daemon stays as it is, and the guest
that waits notices nothing, and still receives a good migration afterwards.

The bytes are put together here by hand, out of docs/protocol alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import signal
import socket
import struct
import time
import uuid
from collections.abc import Mapping
from typing import Any

from tests.minipeer import greet
from tests.rig.daemons import Daemon
from tests.rig.pair import NAME, Pair, PairCase, start

_MAGIC = b"QEMU-MIGRATE"
_CHANNEL = b"QEMU-CHANNEL"

#: How a connection in-band begins, and the number of what is said there.
_OPENING = b"QEVM\0\0\0\3" + b"\x08\0\1\0\0"
_FEATURES = 0x4645

_ERROR, _GUEST, _FEATURE, _PREPARE, _PREPARED, _START, _ATTACHED = 1, 2, 3, 4, 5, 6, 7
_HEARTBEAT, _STATUS, _CANCEL, _RELEASE, _OUTCOME, _ASK = 8, 9, 10, 11, 12, 13

#: Seconds; short, since slow peers have to be waited for.
_DEADLINE = 1.5


def _string(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def _reply(*features: bytes, version: int = 1, count: int | None = None) -> bytes:
    number = len(features) if count is None else count
    return _MAGIC + struct.pack(">BI", version, number) + b"".join(map(_string, features))


def _message(kind: int, body: bytes | Mapping[str, Any] = b"", length: int | None = None) -> bytes:
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    return struct.pack(">HI", kind, len(body) if length is None else length) + body


def _role(
    migration: uuid.UUID, channel: bytes, index: int, secret: bytes, version: int = 1
) -> bytes:
    head = _CHANNEL + bytes([version]) + migration.bytes + _string(channel)
    head += struct.pack(">H", index)
    return head + hmac.digest(secret, head, hashlib.sha256)


def dial(daemon: Daemon) -> socket.socket:
    """Connect to a daemon's port, and say nothing."""
    host, port = daemon.uri.rsplit(":", 2)[1:]
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class Peer:
    """A connection to a daemon's port, in the form that the port is for; it was greeted."""

    def __init__(self, daemon: Daemon) -> None:
        self.socket = dial(daemon)
        self._in_band = daemon.uri.startswith("in-band:")
        self._left = 0
        if self._in_band:
            self.socket.sendall(_OPENING)
        greet(self)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()

    def form(self, data: bytes) -> bytes:
        """Return what is to be sent for something that is said."""
        if not self._in_band:
            return data
        parts = (data[at : at + 0xFFFF] for at in range(0, len(data), 0xFFFF))
        return b"".join(struct.pack(">BHH", 8, _FEATURES, len(part)) + part for part in parts)

    def send(self, *pieces: bytes) -> None:
        """Say, as far as the daemon takes it."""
        self.send_bare(*map(self.form, pieces))

    def send_bare(self, *pieces: bytes) -> None:
        """Send, as far as the daemon takes it."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                self.socket.sendall(piece)

    def recv(self, count: int) -> bytes:
        """Return what the daemon says, ``count`` bytes at the most; nothing at its end."""
        if self._in_band and not self._left:
            head = b""
            while len(head) < 4:
                piece = self.socket.recv(4 - len(head))
                if not piece:
                    return b""
                head += piece
            kind, self._left = struct.unpack(">HH", head)
            if kind != _FEATURES or not self._left:
                raise AssertionError(f"No framing, but {head!r} came.")
        data = self.socket.recv(min(count, self._left) if self._in_band else count)
        self._left -= len(data)
        return data

    def receive(self) -> tuple[int, bytes]:
        """Return the type and the body of the next message."""
        kind, length = struct.unpack(">HI", self._exactly(6))
        return kind, self._exactly(length)

    def receive_json(self, kind: int) -> dict[str, Any]:
        """Return the body of the next message of that type, past heartbeats and the like."""
        while (received := self.receive())[0] != kind:
            if received[0] == _ERROR:
                raise AssertionError(f"An ERROR came: {received[1]!r}")
        body: dict[str, Any] = json.loads(received[1])
        return body

    def error(self) -> tuple[str, str]:
        """Return code and text of the ERROR that is to come, with the end right behind it."""
        while True:
            kind, body = self.receive()
            if kind == _ERROR:
                break
        end = 1 + body[0]
        if rest := self._rest():
            raise AssertionError(f"After the ERROR came {rest!r}.")
        return body[1:end].decode("ascii"), body[end:].decode()

    def _rest(self) -> bytes:
        with contextlib.suppress(ConnectionResetError):
            return self.socket.recv(1)
        return b""

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.recv(count - len(data))
            if not piece:
                raise ConnectionError(f"The daemon closed the connection after {data!r}.")
            data += piece
        return data


class BadPeerTests(PairCase):
    """:cvar last_move: whether each test ends with a good migration."""

    last_move = True

    def setUp(self) -> None:
        """Have a daemon with a guest that waits, and remember how that one is."""
        self.the: Pair = self.pair(
            "7.2", "10.0", there={"handshake_deadline": _DEADLINE, "guest_deadline": 30}
        )
        start(self.the.there, self.the.destination)
        self.the.remember()
        self.before = self.look()

    def look(self) -> tuple[Any, ...]:
        """What there is to see of the guest that waits."""
        waiting = self.the.destination
        return (
            waiting.status(),
            waiting.qmp("query-migrate"),
            waiting.qmp("query-named-block-nodes"),
        )

    def check_untouched(self) -> None:
        """Check that nobody has touched the guest, and that a good move still works."""
        self.assertEqual(self.look(), self.before)
        self.the.prove_settings()
        self.assertNotIn("Traceback", self.the.there.log)
        self.assertNotIn("Unhandled", self.the.there.log)
        running = [
            entry for entry in self.the.there.execute("query-migrate") if "ended" not in entry
        ]
        self.assertEqual(running, [])
        if not self.last_move:
            return
        start(self.the.here, self.the.source)
        self.the.remember()
        self.the.move("direct")
        self.the.prove_moved()

    def refused(self, code: str, *pieces: bytes, end: bool = False) -> str:
        """Send something, and check for the ERROR; returns its text."""
        with Peer(self.the.there) as peer:
            peer.send(*pieces)
            if end:
                peer.socket.shutdown(socket.SHUT_WR)
            got, text = peer.error()
        self.assertEqual(got, code, (pieces, text))
        self.assertGreater(len(text), 10, text)
        return text

    def test_openings(self) -> None:
        """A bad Reply: each kind has its own ERROR."""
        for code, data in (
            ("bad-magic", b"GET / HTTP/1.1\r\n\r\n"),
            ("bad-magic", b"\0" * 64),
            ("bad-magic", b"QEMU-MIGRANT\1\0\0\0\0"),
            ("early-payload", b"QEVM\0\0\0\3" + bytes(100)),
            ("no-common-version", _reply(version=2)),
            ("no-common-version", _reply(version=0)),
            ("not-offered", _reply(b"multifd", b"teleport")),
            ("repeated-feature", _reply(b"multifd", b"postcopy-ram", b"multifd")),
            ("too-many", _reply(count=4_000_000_000)),
            ("too-many", _reply(count=257)),
            ("bad-string", _reply(b"")),
            ("bad-string", _reply(b"multi\xfcd")),
        ):
            self.refused(code, data)
        # Cut short in the middle of a string: nothing more will come.
        self.refused("peer-gone", _reply(b"multifd")[:-3], end=True)
        self.refused("peer-gone", _MAGIC[:5], end=True)
        self.check_untouched()

    def test_messages(self) -> None:
        """After the Reply, what has no place there, or no sense, has its ERROR too."""
        bare, multifd = _reply(), _reply(b"multifd")
        deep = b'{"a":' * 100 + b"1" + b"}" * 100
        for code, data in (
            ("early-payload", bare + b"QEVM\0\0\0\3" + bytes(1000)),
            ("early-payload", multifd + b"QEVM\0\0\0\3" + bytes(1000)),
            ("second-reply", bare + bare),
            ("second-reply", multifd + multifd),
            ("unknown-message", bare + _message(99)),
            ("unknown-message", bare + _message(0)),
            ("unexpected-message", bare + _message(_RELEASE, {})),
            ("unexpected-message", bare + _message(_PREPARED, {})),
            ("unexpected-message", multifd + _message(_START)),
            ("unexpected-message", bare + _message(_GUEST, {}) + _message(_ASK, {})),
            ("too-long", bare + _message(_GUEST, b"", length=(1 << 20) + 1)),
            ("too-long", bare + _message(_PREPARE, b"", length=0xFFFFFFFF)),
            ("too-long", bare + _message(_START, b"!")),
            ("bad-json", bare + _message(_GUEST, b"{")),
            ("bad-json", bare + _message(_GUEST, b"[]")),
            ("bad-json", bare + _message(_GUEST, b'{"a": NaN}')),
            ("bad-json", bare + _message(_GUEST, deep)),
            ("not-offered", multifd + _message(_FEATURE, _string(b"postcopy-ram") + b"{}")),
            ("repeated-feature", multifd + 2 * _message(_FEATURE, _string(b"multifd") + b"{}")),
            ("bad-string", multifd + _message(_FEATURE, b"\xffmultifd{}")),
        ):
            self.refused(code, data)
        self.check_untouched()

    def test_prepare(self) -> None:
        """A PREPARE, a description or parameters that make no sense fail before anything is set."""
        terms: dict[str, Any] = {
            "traits": {}, "conflicts": [], "prefer": [], "require": [], "closed": {},
        }  # fmt: skip
        multifd = _reply(b"multifd")

        def number() -> str:
            return str(uuid.uuid4())

        for code, data in (
            ("bad-json", _reply() + _message(_PREPARE, {})),
            ("bad-json", _reply() + _message(_PREPARE, {"migration": 7, "terms": {}})),
            ("bad-json", _reply() + _message(_PREPARE, {"migration": "seven", "terms": terms})),
            ("bad-json", _reply() + _message(_PREPARE, {"migration": number(), "terms": []})),
            ("bad-json", _reply() + _message(_GUEST, {"name": ["vm"]}) + _message(_START)),
            (
                "guest-not-found",
                _reply() + _message(_GUEST, {"name": "nobody"}) + _message(_START),
            ),
            (
                "preflight",
                _reply()
                + _message(_GUEST, {"name": NAME, "memory": "much"})
                + _message(_PREPARE, {"migration": number(), "terms": terms}),
            ),
            (
                "preflight",
                _reply()
                + _message(_GUEST, {"name": NAME, "devices": [{"kind": 1}], "ram-blocks": 7})
                + _message(_PREPARE, {"migration": number(), "terms": terms}),
            ),
            (
                "feature",
                multifd
                + _message(_GUEST, {"name": NAME})
                + _message(_FEATURE, _string(b"multifd") + b'{"channels": -3}')
                + _message(_PREPARE, {"migration": number(), "terms": terms}),
            ),
        ):
            self.refused(code, data)
        self.check_untouched()

    def test_slow(self) -> None:
        """Silence, and a byte now and then, end with the handshake's deadline."""
        with contextlib.ExitStack() as stack:
            begins = (b"", _reply(), _reply() + _message(_GUEST, {"name": NAME}))
            silent = [(stack.enter_context(Peer(self.the.there)), said) for said in begins]
            slow = stack.enter_context(Peer(self.the.there))
            start = time.monotonic()
            for peer, said in silent:
                peer.send(said)
            slow.socket.settimeout(_DEADLINE / 10)
            with self.assertRaises((BrokenPipeError, ConnectionResetError, _Heard)):
                for byte in slow.form(_reply() + _message(_GUEST, {"name": "x" * 100})):
                    slow.socket.sendall(bytes([byte]))
                    with contextlib.suppress(TimeoutError):
                        raise _Heard(slow.socket.recv(6, socket.MSG_PEEK))
            self.assertGreater(time.monotonic() - start, _DEADLINE / 2)
            slow.socket.settimeout(60)
            for peer in (slow, *(peer for peer, _ in silent)):
                self.assertEqual(peer.error()[0], "deadline")
        self.check_untouched()

    def test_resets(self) -> None:
        """A reset, wherever it comes, is the end of that connection and of nothing else."""
        whole = _reply() + _message(_GUEST, {"name": NAME})
        for cut in (0, 5, 17, 30, len(whole)):
            with Peer(self.the.there) as peer:
                peer.send(whole[:cut])
                # What has been sent is not waited for: the kernel sends RST.
                peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.refused("bad-magic", b"The daemon still answers.")
        self.check_untouched()

    def test_flood(self) -> None:
        """However much a peer sends while it has to wait, the daemon keeps none of it."""
        self.the.destination.process.signal(signal.SIGSTOP)
        terms: dict[str, Any] = {"traits": {}}
        with Peer(self.the.there) as peer:
            peer.send(_reply(), _message(_GUEST, {"name": NAME}))
            peer.send(_message(_PREPARE, {"migration": str(uuid.uuid4()), "terms": terms}))
            before = _resident(self.the.there)
            most = before
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                flood = peer.form(bytes(1 << 20))
                while True:
                    peer.socket.sendall(flood)
                    most = max(most, _resident(self.the.there))
            self.assertLess(most - before, 8 << 20)
        self.the.destination.process.signal(signal.SIGCONT)
        self.refused("bad-magic", b"The daemon still answers.")

    def test_roles(self) -> None:
        """A role header that is not the migration's own gets an ERROR, and the stream nothing."""
        start(self.the.here, self.the.source)
        self.the.remember()
        self.the.begin("relay", bandwidth=1 << 20)
        self.the.wait(self.the.here, "active")
        migration, wrong = uuid.UUID(self.the.id), bytes(32)
        right = _role(migration, b"main", 0, wrong)
        for code, data in (
            ("no-common-version", _role(migration, b"main", 0, wrong, version=0)),
            ("bad-role", _role(uuid.UUID(int=0), b"main", 0, wrong)),
            ("unknown-migration", _role(uuid.uuid4(), b"main", 0, wrong)),
            ("bad-proof", right),
            ("bad-proof", _role(migration, b"multifd", 7, wrong)),
            ("bad-string", _role(migration, b"", 0, wrong)),
            ("bad-string", _role(migration, b"\xe4", 0, wrong)),
            ("bad-magic", b"QEMU-CHANNEX" + right[12:]),
        ):
            self.refused(code, data)
        self.refused("peer-gone", right[:40], end=True)
        self.the.set(max_bandwidth=1 << 30)
        self.the.completed()
        self.the.prove_moved()

    def test_channels_of_ones_own(self) -> None:
        """Even who knows the secret gets each of the migration's channels once, and no other."""
        with Peer(self.the.there) as peer:
            migration = uuid.uuid4()
            secret = self.negotiate(peer, migration)
            self.refused("unknown-channel", _role(migration, b"main", 1, secret))
            self.refused("unknown-channel", _role(migration, b"multifd", 0, secret))
            with Peer(self.the.there) as main:
                main.send(_role(migration, b"main", 0, secret))
                self.assertEqual(main.receive(), (_ATTACHED, b""), "before START")
                peer.send(_message(_START))
                self.assertTrue(peer.receive_json(_STATUS)["ready"])
                self.refused("channel-taken", _role(migration, b"main", 0, secret))
                # And now payload that is no stream.
                main.send_bare(b"This is not what QEMU sends." * 100)
                outcome = peer.receive_json(_OUTCOME)
        self.assertFalse(outcome["ran"])
        self.assertIn("error", outcome)
        self.assertEqual(self.the.there.execute("query-migrate")[0]["status"], "failed")

    def negotiate(self, peer: Peer, migration: uuid.UUID) -> bytes:
        """Do a source's part up to PREPARED, for postcopy over one socket."""
        traits = {"rank": 2, "requires": [], "excludes": [], "paths": ["handover"]}
        terms = {
            "traits": {"postcopy-ram": traits},
            "conflicts": [],
            "prefer": [],
            "require": ["handover"],
            "closed": {},
        }
        peer.send(
            _reply(b"postcopy-ram"),
            _message(_GUEST, {"name": NAME}),
            _message(_FEATURE, _string(b"postcopy-ram") + b"{}"),
            _message(_PREPARE, {"migration": str(migration), "terms": terms}),
        )
        prepared = peer.receive_json(_PREPARED)
        self.assertEqual(prepared["plan"]["path"], "handover")
        return bytes.fromhex(prepared["secret"])

    def test_leaves_when_prepared(self) -> None:
        """A source that goes away after PREPARED leaves the guest waiting, its QEMU as it was.

        A channel that it has opened is closed.
        """
        for farewell in (b"", _message(_CANCEL, b"never mind"), _message(_RELEASE, {})):
            migration = uuid.uuid4()
            with Peer(self.the.there) as peer, Peer(self.the.there) as main:
                secret = self.negotiate(peer, migration)
                main.send(_role(migration, b"main", 0, secret))
                self.assertEqual(main.receive(), (_ATTACHED, b""))
                peer.send(farewell)
                with contextlib.suppress(ConnectionResetError):
                    peer.socket.shutdown(socket.SHUT_WR)
                    while peer.socket.recv(65536):
                        pass
                self.assertEqual(main.socket.recv(1), b"")
            self.the.wait_settings(self.the.destination)
        self.check_untouched()

    def test_secrets(self) -> None:
        """No secret is ever logged."""
        with Peer(self.the.there) as peer:
            secret = self.negotiate(peer, uuid.uuid4())
        self.the.wait_settings(self.the.destination)
        self.assertNotIn(secret.hex(), self.the.there.log)


class InBandTests(BadPeerTests):
    """The same peers, where the handshake is in its in-band form.

    That a good migration comes through behind them, in this form, is shown by
    :meth:`test_roles`.
    """

    in_band = True
    last_move = False

    def test_no_opening(self) -> None:
        """Who does not open the return path is told nothing, and left within the deadline."""
        begun = time.monotonic()
        with dial(self.the.there) as silent, dial(self.the.there) as halfway:
            halfway.sendall(_OPENING[:9])
            for stranger in (silent, halfway):
                self.assertEqual(b"", stranger.recv(100))
            self.assertGreater(time.monotonic() - begun, _DEADLINE / 2)
        for said in (b"GET / HTTP/1.1\r\n\r\n", _reply(), _OPENING[:9] + bytes(4)):
            with dial(self.the.there) as stranger, contextlib.suppress(ConnectionResetError):
                stranger.sendall(said)
                self.assertEqual(b"", stranger.recv(100))
        self.check_untouched()

    def test_framing(self) -> None:
        """Framing that is none gets an ERROR, wherever it comes."""
        bare = _reply() + _message(_GUEST, {"name": NAME})
        for bad in (
            b"QEVM\0\0\0\3", b"\x08\0\2\0\4\0\0\0\1", struct.pack(">BHH", 8, _FEATURES, 0), b"\7",
        ):  # fmt: skip
            for before in (b"", bare[:9], bare):
                with Peer(self.the.there) as peer:
                    peer.send_bare(peer.form(before), bad)
                    self.assertEqual("bad-frame", peer.error()[0], (before, bad))
        self.check_untouched()


class _Heard(Exception):
    """The daemon has said something."""


def _resident(daemon: Daemon) -> int:
    """Return the bytes of memory that a daemon has."""
    with open(f"/proc/{daemon.process.pid}/status") as file:
        for line in file:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) << 10
    raise AssertionError("The daemon has no memory.")
