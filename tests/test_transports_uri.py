"""Addresses in QEMU's URI syntax."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.protocol import Factory
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import ArgumentError
from qmigd.transports.uri import DEFAULT_PORT, TcpAddress, UnixAddress, parse_uri


class ParsingTests(SynchronousTestCase):
    """:func:`parse_uri`."""

    def test_good(self) -> None:
        """Host, port and path come out as they were written; the port may be left out."""
        for text, address in {
            "tcp:hostb": TcpAddress("hostb", DEFAULT_PORT),
            "tcp:hostb:7000": TcpAddress("hostb", 7000),
            "tcp:10.0.0.7:0": TcpAddress("10.0.0.7", 0),
            "tcp::7000": TcpAddress("", 7000),
            "tcp:[::1]": TcpAddress("::1", DEFAULT_PORT),
            "tcp:[fe80::1%eth0]:65535": TcpAddress("fe80::1%eth0", 65535),
            "unix:/run/qmigd.sock": UnixAddress("/run/qmigd.sock"),
            "unix:a:b": UnixAddress("a:b"),
        }.items():
            self.assertEqual(parse_uri(text), address)

    def test_bad(self) -> None:
        """What is wrong is said, and what would be right."""
        for text, said in {
            "": "write tcp:HOST:PORT or unix:PATH",
            "hostb": "write tcp:HOST:PORT or unix:PATH",
            "http://hostb": 'unknown scheme "http"',
            "tcp:": "names no host",
            "tcp:hostb:": "is not a port",
            "tcp:hostb:-1": "is not a port",
            "tcp:hostb:65536": "is not a port",
            "tcp:hostb:99999999999999999999": "is not a port",
            "tcp:hostb:\u0661": "is not a port",
            "tcp:hostb:70,to=80": "is not a port",
            "tcp:host b:70": "not the name or address of a host",
            "tcp://hostb": "not the name or address of a host",
            "tcp:::1": "stands in brackets",
            "tcp:[::1": "is written tcp:[ADDRESS]:PORT",
            "tcp:[::1]70": "is written tcp:[ADDRESS]:PORT",
            "tcp:[hostb]:70": "is not an IPv6 address",
            "unix:": "names no socket",
            "unix:a\0b": "zero byte",
            "unix:" + "x" * 108: "at most 107 bytes",
            "fd:7": "cannot be reached over fd:",
            "exec:nc hostb 7": "cannot be reached over exec:",
        }.items():
            error = self.assertRaises(ArgumentError, parse_uri, text)
            self.assertIn(said, error.text)
            self.assertEqual(error.code, "argument")

    @given(st.text(max_size=40) | st.text(max_size=20).map("tcp:".__add__))
    def test_any_text(self, text: str) -> None:
        """Whatever the text, it is an address that gives itself again, or an ArgumentError."""
        try:
            address = parse_uri(text)
        except ArgumentError:
            return
        self.assertEqual(parse_uri(str(address)), address)

    def test_loopback(self) -> None:
        """Only what no other host can reach is loopback."""
        for text in ("tcp:127.0.0.1", "tcp:127.1.2.3:70", "tcp:[::1]", "tcp:localhost", "unix:x"):
            self.assertTrue(parse_uri(text).is_loopback, text)
        for text in ("tcp::70", "tcp:0.0.0.0", "tcp:[::]", "tcp:10.0.0.7", "tcp:localhost.example"):
            self.assertFalse(parse_uri(text).is_loopback, text)


class EndpointTests(SynchronousTestCase):
    """What connects to an address, and what listens on it."""

    def test_server(self) -> None:
        """Each address is listened on as it says; no host is every address of this one."""
        for text, interface in {
            "tcp:127.0.0.1:70": "127.0.0.1",
            "tcp:[::1]:70": "::1",
            "tcp::70": "::",
        }.items():
            reactor = MemoryReactorClock()
            parse_uri(text).server(reactor).listen(Factory())
            self.assertEqual(reactor.tcpServers[0][0], 70)
            self.assertEqual(reactor.tcpServers[0][3], interface)

    def test_unix_server_is_private(self) -> None:
        """Only the same user may connect to a unix socket."""
        reactor = MemoryReactorClock()
        parse_uri("unix:/run/x").server(reactor).listen(Factory())
        path, _, _, mode, _ = reactor.unixServers[0]
        self.assertEqual((path, mode), ("/run/x", 0o600))

    def test_nothing_to_connect_to(self) -> None:
        """What is good for listening only cannot be connected to."""
        for text in ("tcp::70", "tcp:hostb:0"):
            error = self.assertRaises(ArgumentError, parse_uri(text).client, MemoryReactorClock())
            self.assertIn("could be connected to", error.text)
