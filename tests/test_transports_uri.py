"""Addresses in QEMU's URI syntax."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from twisted.internet.protocol import Factory
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase

from qmigd.errors import ArgumentError
from qmigd.transports.uri import (
    DEFAULT_PORT,
    Door,
    ExecAddress,
    FdAddress,
    InBandAddress,
    TcpAddress,
    UnixAddress,
    VsockAddress,
    bare,
    parse_peer,
    parse_uri,
)


def door(text: str) -> Door:
    """Read a URI that can be listened on."""
    address = parse_uri(text)
    assert not isinstance(address, ExecAddress | FdAddress | InBandAddress)
    return address


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
            "tcp:hostb:70,mptcp=on": TcpAddress("hostb", 70, mptcp=True),
            "unix:a:b": UnixAddress("a:b"),
            "in-band:tcp:hostb:7000": InBandAddress(TcpAddress("hostb", 7000)),
            "in-band:unix:/run/x": InBandAddress(UnixAddress("/run/x")),
            "vsock:3": VsockAddress(3, DEFAULT_PORT),
            "vsock:3:7000": VsockAddress(3, 7000),
            "vsock::7000": VsockAddress(None, 7000),
            "vsock:4294967294:4294967294": VsockAddress(0xFFFFFFFE, 0xFFFFFFFE),
            "exec:nc hostb 7": ExecAddress(("/bin/sh", "-c", "nc hostb 7")),
            "fd:": FdAddress(),
        }.items():
            self.assertEqual(parse_uri(text), address)

    def test_bad(self) -> None:
        """What is wrong is said, and what would be right."""
        for text, said in {
            "": "write tcp:HOST:PORT, unix:PATH,",
            "hostb": "write tcp:HOST:PORT, unix:PATH,",
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
            "fd:7": "write fd: alone",
            "in-band:": "is not a URI",
            "in-band:in-band:tcp:hostb": "stands there once",
            "exec:": "needs a command",
            "exec:  ": "needs a command",
            "exec:a\0b": "zero byte",
            "vsock:": "is not vsock:CID:PORT",
            "vsock:host:7": "is not vsock:CID:PORT",
            "vsock:3:": "is not vsock:CID:PORT",
            "vsock:3:4294967295": "is not vsock:CID:PORT",
        }.items():
            error = self.assertRaises(ArgumentError, parse_uri, text)
            self.assertIn(said, error.text)
            self.assertEqual(error.code, "argument")

    def test_peer(self) -> None:
        """Where one can listen on every address, nobody can be connected to."""
        for text, said in {
            "tcp::70": "leads to no host and port",
            "tcp:hostb:0": "leads to no host and port",
            "in-band:tcp::70": "leads to no host and port",
            "vsock::70": "leads to no machine",
        }.items():
            self.assertIn(said, self.assertRaises(ArgumentError, parse_peer, text).text)
            parse_uri(text)
        for text in ("tcp:hostb", "tcp:[::1]:70", "vsock:2:70", "unix:x", "fd:", "exec:nc hostb"):
            self.assertEqual(parse_peer(text), parse_uri(text))

    def test_argv(self) -> None:
        """A program's own arguments go with "exec:"; as a text they come to the same."""
        address = parse_uri("exec:", ["nc", "host b", "7"])
        self.assertEqual(address, ExecAddress(("nc", "host b", "7")))
        self.assertEqual(str(address), "exec:exec nc 'host b' 7")
        for text, argv, said in (
            ("exec:nc", ["hostb"], 'go with "exec:" alone'),
            ("tcp:hostb:7", ["nc"], 'go with "exec:" alone'),
            ("exec:", [""], "needs a command"),
            ("exec:", ["nc", "a\0b"], "zero byte"),
        ):
            self.assertIn(said, self.assertRaises(ArgumentError, parse_uri, text, argv).text)

    @given(
        st.text(max_size=40)
        | st.tuples(
            st.sampled_from(("tcp:", "vsock:", "exec:", "in-band:tcp:")), st.text(max_size=20)
        ).map("".join)
    )
    def test_any_text(self, text: str) -> None:
        """Whatever the text, it is an address that gives itself again, or an ArgumentError."""
        try:
            address = parse_uri(text)
        except ArgumentError:
            return
        self.assertEqual(parse_uri(str(address)), address)

    def test_loopback(self) -> None:
        """Only what no other host can reach is loopback."""
        for text in (
            "tcp:127.0.0.1",
            "tcp:127.1.2.3:70",
            "tcp:[::1]",
            "tcp:localhost",
            "unix:x",
            "vsock:1",
        ):
            self.assertTrue(door(text).is_loopback, text)
        for text in (
            "tcp::70",
            "tcp:0.0.0.0",
            "tcp:[::]",
            "tcp:10.0.0.7",
            "tcp:localhost.example",
            "vsock:2",
            "vsock::7",
        ):
            self.assertFalse(door(text).is_loopback, text)

    def test_in_band(self) -> None:
        """The form of the handshake is no part of the place."""
        for text in ("tcp:hostb:7", "unix:x", "vsock:3:7", "exec:nc hostb 7"):
            address = parse_uri(f"in-band:{text}")
            self.assertEqual(parse_uri(text), bare(address))
            self.assertEqual(parse_uri(text), bare(parse_uri(text)))
            self.assertEqual(f"in-band:{text}", str(address))


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
            door(text).server(reactor).listen(Factory())
            self.assertEqual(reactor.tcpServers[0][0], 70)
            self.assertEqual(reactor.tcpServers[0][3], interface)

    def test_unix_server_is_private(self) -> None:
        """Only the same user may connect to a unix socket."""
        reactor = MemoryReactorClock()
        door("unix:/run/x").server(reactor).listen(Factory())
        path, _, _, mode, _ = reactor.unixServers[0]
        self.assertEqual((path, mode), ("/run/x", 0o600))

    def test_nothing_to_connect_to(self) -> None:
        """What is good for listening only cannot be connected to."""
        for text in ("tcp::70", "tcp:hostb:0", "vsock::70"):
            error = self.assertRaises(ArgumentError, door(text).client, MemoryReactorClock())
            self.assertIn("could be connected to", error.text)
