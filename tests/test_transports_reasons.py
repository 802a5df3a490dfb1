"""Why a connection or a place to listen could not be had, as it is told."""

from __future__ import annotations

import os
import socket

from twisted.internet import reactor
from twisted.internet.endpoints import TCP4ClientEndpoint, UNIXClientEndpoint
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import Factory, ServerFactory
from twisted.trial.unittest import TestCase

from qmigd.errors import DeadlineError
from qmigd.transports.reasons import not_connected, not_listening


class ReasonTests(TestCase):
    """What Twisted and the kernel really say there, in half a sentence."""

    async def check(self, endpoint: TCP4ClientEndpoint | UNIXClientEndpoint, words: str) -> None:
        try:
            await endpoint.connect(Factory())
        except Exception as error:
            self.assertEqual(not_connected(error), words)
        else:
            self.fail("it was connected")

    async def test_connecting(self) -> None:
        """Nobody, no socket, no network; and what is an error of qmigd's own already."""
        with socket.create_server(("127.0.0.1", 0)) as one:
            port = one.getsockname()[1]
        await self.check(TCP4ClientEndpoint(reactor, "127.0.0.1", port), "nobody listens there")
        nowhere = os.path.abspath("nowhere")
        await self.check(UNIXClientEndpoint(reactor, nowhere), "there is no such socket")
        await self.check(
            TCP4ClientEndpoint(reactor, "255.255.255.255", 1), "Network is unreachable"
        )
        self.assertEqual(not_connected(DeadlineError("It took too long.")), "It took too long.")

    def test_listening(self) -> None:
        """A port that is taken, and an address of somebody else's."""
        with socket.create_server(("127.0.0.1", 0)) as one:
            host, port = one.getsockname()
            taken = self.assertRaises(CannotListenError, self.listen, host, port)
        self.assertEqual(not_listening(taken), "another program has it")
        foreign = self.assertRaises(CannotListenError, self.listen, "192.0.2.1", 1)
        self.assertEqual(not_listening(foreign), "this host does not have that address")

    def listen(self, host: str, port: int) -> None:
        reactor.listenTCP(port, ServerFactory(), interface=host)
