"""The handshake of a payload channel, on the side that opens it.

Theory of operation
-------------------
The Greeting comes as on every connection (``waiting``); its offer does not
matter here.  Where the migration is one in TLS, that comes next (``securing``).
The role header, which carries the proof, answers the Greeting (``asking``), and
ATTACHED gives the connection to the payload (``attached``).  An ERROR comes
instead where the destination refuses.

Nothing may be sent after the role header, not even an ERROR: the destination
may have given the connection away, and would take it for payload.
"""

from __future__ import annotations

from typing import Any, Protocol

from automat import TypeMachineBuilder

from qmigd.handshake import events
from qmigd.handshake.events import Event
from qmigd.handshake.exchange import (
    Core,
    Exchange,
    Inputs,
    build,
    send,
    table_of,
    tell,
    tell_and_send,
    tell_only,
)
from qmigd.wire import messages
from qmigd.wire.greeting import Greeting, read_greeting
from qmigd.wire.role import RoleHeader

__all__ = ["ChannelHandshake"]


class _Inputs(Inputs, Protocol):
    def got_greeting(self, data: bytes) -> None: ...
    def got_tls_greeting(self) -> None: ...
    def say_role(self, data: bytes) -> None: ...
    def got_attached(self, event: Event) -> None: ...
    def got_error(self, event: Event) -> None: ...


_I = _Inputs
_builder = TypeMachineBuilder(_Inputs, Core)

_waiting = _builder.state("waiting")  # for the Greeting
_securing = _builder.state("securing")  # TLS is being set up
_asking = _builder.state("asking")  # the role header is sent
_attached = _builder.state("attached")  # the connection is the payload's
_closed = _builder.state("closed")

_waiting.upon(_I.got_greeting).to(_asking)(send)
_waiting.upon(_I.got_tls_greeting).to(_securing).returns(None)
_securing.upon(_I.say_role).to(_asking)(send)
_asking.upon(_I.got_attached).to(_attached)(tell)

_waiting.upon(_I.got_violation).to(_closed)(tell_and_send)
_waiting.upon(_I.lost).to(_closed)(tell_and_send)
_securing.upon(_I.got_violation).to(_closed)(tell_only)
_securing.upon(_I.lost).to(_closed)(tell_only)
_asking.upon(_I.got_error).to(_closed)(tell)
_asking.upon(_I.got_violation).to(_closed)(tell_only)
_asking.upon(_I.lost).to(_closed)(tell_only)
_attached.upon(_I.lost).to(_closed).returns(None)
_closed.upon(_I.lost).loop().returns(None)

for _state in (_waiting, _securing, _asking, _attached, _closed):
    _state.upon(_I.where).loop().returns(_state.name)

_Machine = build(_builder)


class ChannelHandshake(Exchange):
    """The handshake of one payload channel, on the side that opened it.

    It says what it has to by itself; there is nothing for the owner to say.

    :param role: which channel of which migration this is.
    :param secret: the migration's secret, out of PREPARED.
    :param tls: the migration is one in TLS, and so is this channel from the Greeting on.
    :raises LocalError: the role cannot be written as a role header.
    """

    table = table_of(_Machine)
    payload_states = frozenset({"attached"})
    early_states = frozenset({"asking"})
    upgrade_states = frozenset({"securing"})
    role = "channel"

    def __init__(self, role: RoleHeader, secret: bytes, *, tls: bool = False) -> None:
        core = Core()
        machine = _Machine(core)
        super().__init__(machine, core, read_greeting((role.version,)))
        self._inputs = machine
        self._header = role.prove(secret).encode()
        self._tls = tls

    def secured(self) -> None:
        """TLS is there: ask for the channel."""
        self._say(self._inputs.say_role, "secured()", self._header)

    def _heard(self, item: Any) -> None:
        inputs = self._inputs
        match item:
            case Greeting():
                if self._tls:
                    inputs.got_tls_greeting()
                else:
                    inputs.got_greeting(self._header)
                self._state = inputs.where()
            case messages.Attached():
                self._got(inputs.got_attached, "ATTACHED", events.ChannelAttached())
            case messages.Error(code, text):
                self._got(inputs.got_error, "ERROR", events.Failed(code, text, remote=True))
