"""The movers that not every kernel has, and all of them on sockets with kernel TLS.

Every Linux splices, so that is tried on the host's own (``tests.test_channels_movers``).
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

from qmigd.channels.kernel_tls import install
from qmigd.channels.movers import copy, mover_for
from qmigd.channels.movers.common import End, is_tcp
from qmigd.interfaces import MOVERS
from qmigd.transports.sockets import tcp_pair
from tests import test_channels_movers as movers
from tests.rig.lane import KernelCase
from tests.rig.tls_records import sessions
from tests.test_channels_pump import pattern, read_all, write_all


class ZeroCopyTests(KernelCase, movers.ZeroCopyTests):
    """A pump that sends with MSG_ZEROCOPY and receives with TCP_ZEROCOPY_RECEIVE."""

    may_lack = False


class KernelTlsTests(KernelCase):
    """Between two relays, in kernel TLS."""

    def test_through_two(self) -> None:
        """Whatever the mover, bytes come whole: what cannot be had is copied."""
        for name in MOVERS:
            client, server = tcp_pair()
            for session in sessions("TLS_AES_128_GCM_SHA256", client, server):
                install(session.sock, session.keys())
            qemu, source = socket.socketpair()
            sink, other_qemu = socket.socketpair()
            with ThreadPoolExecutor(4) as pool:
                moving = [
                    pool.submit(self.move, name, source, client),
                    pool.submit(self.move, name, server, sink),
                ]
                written = pool.submit(write_all, qemu, pattern((5 << 20) + 77))
                read = pool.submit(read_all, other_qemu)
                self.assertEqual(read.result(), written.result(), name)
            self.assertEqual([one.result() for one in moving], [End("eof")] * 2)
            for sock in (client, server, qemu, source, sink, other_qemu):
                sock.close()

    def move(self, name: str, source: socket.socket, sink: socket.socket) -> End:
        end = mover_for(name, source, sink)(source, sink, lambda size: None)
        sink.shutdown(socket.SHUT_WR)
        return end

    def test_records_are_not_mapped(self) -> None:
        """A socket with TLS on it is not taken for one that could be mapped or sent from."""
        client, server = tcp_pair()
        for session in sessions("TLS_AES_128_GCM_SHA256", client, server):
            self.assertTrue(is_tcp(session.sock))
            install(session.sock, session.keys())
            self.assertFalse(is_tcp(session.sock))
        self.assertIs(mover_for("zerocopy", client, server), copy)
        client.close()
        server.close()
