"""qmigd's two sides on the course: real relays and real channels, without the daemon around.

A script (see ``ends``): ``origin`` is the source's qmigd, ``destination`` the other one.
:mod:`tests.bench.ours` starts it.
"""

from __future__ import annotations

import json
import socket
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["ADDRESS", "How"]

#: Where the destination listens, and what its certificate is for.
ADDRESS = "127.0.0.1"

_ID = uuid.UUID(int=1)
_SECRET = bytes(32)


@dataclass(frozen=True)
class How:
    """What qmigd is to do with the stream.

    :ivar path: the plan's.
    :ivar tls: by whom it is encrypted: ``relay``: by the relay's threads; ``kernel``; or not.
    :ivar sends: the mover of the source's relay.
    :ivar receives: that of the destination's.
    """

    path: Literal["relay", "handover"] = "relay"
    tls: Literal["", "relay", "kernel"] = ""
    sends: str = "copy"
    receives: str = "copy"


def _security(directory: str) -> Any:
    """What the daemon of either side has, if it has certificates."""
    from qmigd.channels.credentials import CredentialStore
    from qmigd.migration.security import Security

    files = (Path(directory, name) for name in ("host1-cert.pem", "host1-key.pem", "ca-cert.pem"))
    return Security(CredentialStore(*files))


def _plan(count: int) -> list[tuple[str, int]]:
    """The channels, and one before them for the first byte."""
    return [("main", 0), *(("multifd", index) for index in range(count))]


def _give(sock: socket.socket, end: socket.socket) -> None:
    """Hand a socket over to whoever is at the other end of ``sock``."""
    with sock, end:
        socket.send_fds(sock, [b"x"], [end.fileno()])


# The source's side.


def _origin(directory: str, count: int, how: How, port: int) -> None:
    """The source's qmigd."""
    from twisted.internet import reactor
    from twisted.internet.endpoints import TCP4ClientEndpoint

    from qmigd.channels.attach import open_channel
    from qmigd.channels.relay import SourceRelay
    from qmigd.channels.secured import Secured
    from qmigd.handshake.channel import ChannelHandshake
    from qmigd.wire.role import RoleHeader

    run: Any = reactor
    endpoint = TCP4ClientEndpoint(run, ADDRESS, port)
    side = None
    if how.tls:
        side = _security(directory).calling(ADDRESS, keep_keys=how.tls == "kernel")

    async def open_it(name: str, index: int) -> Any:
        role = RoleHeader(_ID, name, index)
        machine = Secured(ChannelHandshake(role, _SECRET, tls=side is not None), side)
        return (await open_channel(run, endpoint, machine, 10)).plain()

    if how.path == "handover":
        path = f"{directory}/source"
        _hand_over(run, path, _plan(count), open_it)
        _say(path)
    else:
        relay = SourceRelay(run, directory, _plan(count), open_it, _heard, mover=how.sends)
        _say(relay.listen().path)
    run.run()


def _hand_over(
    reactor: Any, path: str, plan: list[tuple[str, int]], open_it: Callable[..., Any]
) -> None:
    """Give whoever connects there a channel, one after the other."""
    from twisted.internet.defer import Deferred
    from twisted.internet.protocol import Factory, Protocol

    from qmigd.transports.sockets import detach

    async def give(sock: socket.socket) -> None:
        _give(sock, await open_it(*plan.pop(0)))

    class Port(Protocol):
        def connectionMade(self) -> None:
            Deferred.fromCoroutine(give(detach(self.transport))).addErrback(_failed)

    reactor.listenUNIX(path, Factory.forProtocol(Port))


# The destination's side.


def _destination(directory: str, count: int, how: How, sink: str) -> None:
    """The destination's qmigd."""
    from twisted.internet import reactor
    from twisted.internet.protocol import Factory

    from qmigd.channels.attach import Attachments, Line
    from qmigd.channels.identity import peer_names
    from qmigd.channels.relay import DestinationRelay

    run: Any = reactor
    side = peer = None
    if how.tls:
        security = _security(directory)
        side = security.called(keep_keys=how.tls == "kernel")
        peer = peer_names(security.store.current.chain[0])  # both have the same certificate
    attachments = Attachments()
    path = sink
    if how.path == "handover":

        def take(name: str, index: int, line: Line) -> None:
            to_sink = socket.socket(socket.AF_UNIX)
            to_sink.connect(sink)
            end = line.plain()
            assert isinstance(end, socket.socket)
            _give(to_sink, end)

    else:
        relay = DestinationRelay(run, directory, _heard, mover=how.receives)
        path = relay.address.path

        def take(name: str, index: int, line: Line) -> None:
            relay.take(name, index, line.plain())

    attachments.expect(_ID, _SECRET, _plan(count), take, peer)
    factory = Factory.forProtocol(lambda: _port(attachments, side))
    port = run.listenTCP(0, factory, interface=ADDRESS)
    _say(f"{port.getHost().port} {path}")
    run.run()


def _port(attachments: Any, side: Any) -> Any:
    """A connection to the destination's port, for payload channels only."""
    from twisted.internet.protocol import Protocol

    from qmigd.channels.secured import Secured
    from qmigd.handshake.destination import DestinationHandshake
    from qmigd.handshake.events import ChannelOpened
    from qmigd.transports.sockets import limit_reads

    class Port(Protocol):
        transport: Any

        def connectionMade(self) -> None:
            self.bytes = Secured(DestinationHandshake([]), side)
            self._go_on()

        def dataReceived(self, data: bytes) -> None:
            for event in self.bytes.receive(data):
                if isinstance(event, ChannelOpened):
                    session = self.bytes.session
                    claim = attachments.claim(event.role, session.peer if session else None)
                    self.bytes.machine.attached()
                    handing = claim.hand_over(self.transport, self.bytes.data_to_send(), session)
                    handing.addErrback(_failed)
                    return
            self._go_on()

        def _go_on(self) -> None:
            self.transport.write(self.bytes.data_to_send())
            limit_reads(self.transport, self.bytes.wanted)

    return Port()


def _say(text: str) -> None:
    """Tell the benchmark."""
    print(text, flush=True)


def _heard(event: Any) -> None:
    from qmigd.channels.relay_channels import ChannelEnded

    if not isinstance(event, ChannelEnded):
        print(event, file=sys.stderr)


def _failed(failure: Any) -> None:
    print(failure.getTraceback(), file=sys.stderr, flush=True)


def _main(words: list[str]) -> None:
    match words:
        case ["origin", directory, count, how, port]:
            _origin(directory, int(count), How(**json.loads(how)), int(port))
        case ["destination", directory, count, how, sink]:
            _destination(directory, int(count), How(**json.loads(how)), sink)


if __name__ == "__main__":
    _main(sys.argv[1:])
