"""Two ends of TLS joined in memory, and peers that do not do what they should."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from OpenSSL import SSL

from tests.rig.certificates import Files

__all__ = ["End", "bare_context", "join", "shake"]

#: Turns that a handshake needs at most, and then some.
_TURNS = 6


@dataclass
class End:
    """One end.

    :ivar connection: OpenSSL's.
    :ivar done: it thinks that it is through with the handshake.
    :ivar error: what ended it.
    """

    connection: SSL.Connection
    done: bool = False
    error: SSL.Error | None = None

    def step(self) -> None:
        """Go on with the handshake; once through, read, which is when alerts are found."""
        if self.error is None:
            try:
                if not self.done:
                    self.connection.do_handshake()
                    self.done = True
                self.connection.recv(1)
            except SSL.WantReadError:
                pass
            except SSL.Error as error:
                self.error = error


def shake(client: SSL.Context, server: SSL.Context) -> tuple[End, End]:
    """Let two ends shake hands; returns what became of the client and of the server."""
    ends = End(SSL.Connection(client)), End(SSL.Connection(server))
    ends[0].connection.set_connect_state()
    ends[1].connection.set_accept_state()
    join(*ends)
    return ends


def join(client: End, server: End) -> None:
    """Carry bytes between two ends until neither has any more to say."""
    for _ in range(_TURNS):
        for one, other in ((client, server), (server, client)):
            one.step()
            with contextlib.suppress(SSL.WantReadError):
                other.connection.bio_write(one.connection.bio_read(1 << 20))


def bare_context(
    *, server: bool, files: Files | None = None, newest: int = SSL.TLS1_3_VERSION
) -> SSL.Context:
    """Return a context that checks nothing, for a peer that is not qmigd.

    :param files: what it presents; ``None``: nothing.
    :param newest: the newest version of TLS that it speaks.
    """
    context = SSL.Context(SSL.TLS_SERVER_METHOD if server else SSL.TLS_CLIENT_METHOD)
    context.set_max_proto_version(newest)
    if files is not None:
        context.use_certificate_chain_file(str(files.certificate))
        context.use_privatekey_file(str(files.key))
    return context
