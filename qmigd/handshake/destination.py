"""The destination's side of the handshake.

Theory of operation
-------------------
The destination speaks first.  What the peer says then decides what the
connection is.

*A role header* makes it a payload channel.  The machine cannot judge the proof,
for the secret is the owner's: it waits, reads nothing (``opened``), and goes on
with the owner's ``attached()``; from there every byte is payload.

*A Reply* makes it a control connection.  One that selects TLS is the last thing in
clear (``securing``); inside TLS the source says first what it has seen of the
opening, and this side answers with the same.  The source may describe its guest
(in one GUEST or in several), the two sides say one FEATURE for each selected feature, and
PREPARE is answered by PREPARED.  Then comes START.  Where no feature was
selected, START may come right after the Reply too, though not between PREPARE
and PREPARED, when the destination's answer would fall into the stream; and in
any case the stream then follows on this very connection (``streaming``).  The
difference between the two kinds of START is made before the machine sees them:
``got_start`` comes where features were selected, ``got_bare_start`` where none.

After START with features the connection goes on to serve control (``started``).
RELEASE hands the guest over and comes once (``released``); nothing can be
cancelled after it.  The destination's OUTCOME is its last word; what the source
said before it heard that is still taken (``finished``).

A source that lost the connection after RELEASE connects again, and says ASK right
after a Reply that selects TLS at the most (``asked``); the OUTCOME answers it.

A CANCEL before START ends the handshake (``cancelled``); after START it is a
request, and the machine stays where it is.

Whatever happens, ``closed`` is the end: it takes nothing and says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from automat import TypeMachineBuilder

from qmigd.errors import ProtocolError
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
)
from qmigd.wire import messages
from qmigd.wire.greeting import TLS, VERSION, Greeting, Reply, binding
from qmigd.wire.opening import read_opening
from qmigd.wire.role import RoleHeader

__all__ = ["DestinationHandshake"]


class _Inputs(Inputs, Protocol):
    def got_reply(self, event: Event) -> None: ...
    def got_tls_reply(self, event: Event) -> None: ...
    def got_binding(self, event: Event, data: bytes) -> None: ...
    def got_role(self, event: Event) -> None: ...
    def got_error(self, event: Event) -> None: ...
    def got_guest(self, event: Event) -> None: ...
    def got_feature(self, event: Event) -> None: ...
    def got_prepare(self, event: Event) -> None: ...
    def got_bare_ask(self, event: Event) -> None: ...
    def got_start(self, event: Event) -> None: ...
    def got_bare_start(self, event: Event) -> None: ...
    def got_heartbeat(self, event: Event) -> None: ...
    def got_status(self, event: Event) -> None: ...
    def got_cancel(self, event: Event) -> None: ...
    def got_release(self, event: Event) -> None: ...
    def say_attached(self, data: bytes) -> None: ...
    def say_feature(self, data: bytes) -> None: ...
    def say_prepared(self, data: bytes) -> None: ...
    def say_heartbeat(self, data: bytes) -> None: ...
    def say_status(self, data: bytes) -> None: ...
    def say_outcome(self, data: bytes) -> None: ...
    def say_error(self, data: bytes) -> None: ...


_I = _Inputs
_builder = TypeMachineBuilder(_Inputs, Core)

_waiting = _builder.state("waiting")  # for a Reply or a role header
_opened = _builder.state("opened")  # a payload channel, not yet accepted
_attached = _builder.state("attached")  # a payload channel, the payload's
_securing = _builder.state("securing")  # TLS is being set up; the source owes BINDING
_replied = _builder.state("replied")
_described = _builder.state("described")  # GUEST or FEATURE came: no ASK any more
_preparing = _builder.state("preparing")  # this side owes PREPARED
_prepared = _builder.state("prepared")
_asked = _builder.state("asked")  # this side owes the OUTCOME of an earlier migration
_started = _builder.state("started")
_released = _builder.state("released")  # the guest is this side's
_finished = _builder.state("finished")  # OUTCOME is said
_cancelled = _builder.state("cancelled")
_streaming = _builder.state("streaming")  # the baseline: the connection is the stream's
_closed = _builder.state("closed")

# What the first item decides.
_waiting.upon(_I.got_reply).to(_replied)(tell)
_waiting.upon(_I.got_tls_reply).to(_securing).returns(None)
_securing.upon(_I.got_binding).to(_replied)(tell_and_send)
_waiting.upon(_I.got_role).to(_opened)(tell)
_opened.upon(_I.say_attached).to(_attached)(send)

# From the Reply to START.
_replied.upon(_I.got_guest).to(_described)(tell)
_replied.upon(_I.got_feature).to(_described)(tell)
_replied.upon(_I.got_prepare).to(_preparing)(tell)
_replied.upon(_I.got_bare_ask).to(_asked)(tell)
_replied.upon(_I.got_bare_start).to(_streaming)(tell)
_replied.upon(_I.say_feature).loop()(send)

_described.upon(_I.got_guest).loop()(tell)
_described.upon(_I.got_feature).loop()(tell)
_described.upon(_I.got_prepare).to(_preparing)(tell)
_described.upon(_I.got_bare_start).to(_streaming)(tell)
_described.upon(_I.say_feature).loop()(send)

_preparing.upon(_I.say_feature).loop()(send)
_preparing.upon(_I.say_prepared).to(_prepared)(send)
_preparing.upon(_I.got_cancel).to(_cancelled)(tell)

_prepared.upon(_I.got_start).to(_started)(tell)
_prepared.upon(_I.got_bare_start).to(_streaming)(tell)
_prepared.upon(_I.got_cancel).to(_cancelled)(tell)

_asked.upon(_I.say_outcome).to(_finished)(send)

# The migration runs.
_started.upon(_I.got_heartbeat).loop()(tell)
_started.upon(_I.got_status).loop()(tell)
_started.upon(_I.got_cancel).loop()(tell)
_started.upon(_I.got_release).to(_released)(tell)
_started.upon(_I.say_heartbeat).loop()(send)
_started.upon(_I.say_status).loop()(send)
_started.upon(_I.say_outcome).to(_finished)(send)

_released.upon(_I.got_heartbeat).loop()(tell)
_released.upon(_I.got_status).loop()(tell)
_released.upon(_I.say_heartbeat).loop()(send)
_released.upon(_I.say_status).loop()(send)
_released.upon(_I.say_outcome).to(_finished)(send)

# The source may have said these before it heard the OUTCOME.
_finished.upon(_I.got_heartbeat).loop()(tell)
_finished.upon(_I.got_status).loop()(tell)
_finished.upon(_I.got_cancel).loop()(tell)
_finished.upon(_I.got_release).loop()(tell)

# The end, expected or not.
for _state in (
    *(_waiting, _securing, _replied, _described, _preparing, _prepared, _asked),
    *(_started, _released),
):
    _state.upon(_I.got_error).to(_closed)(tell)
    _state.upon(_I.got_violation).to(_closed)(tell_and_send)
    _state.upon(_I.lost).to(_closed)(tell_and_send)
    _state.upon(_I.say_error).to(_closed)(send)
_opened.upon(_I.got_violation).to(_closed)(tell_and_send)
_opened.upon(_I.lost).to(_closed)(tell_and_send)
_opened.upon(_I.say_error).to(_closed)(send)
for _state in (_finished, _cancelled):
    _state.upon(_I.got_error).to(_closed)(tell)
    _state.upon(_I.got_violation).to(_closed)(tell_and_send)
    _state.upon(_I.lost).to(_closed).returns(None)
    _state.upon(_I.say_error).to(_closed)(send)
# START is not answered, so an ERROR may be: no such guest, for instance.
_streaming.upon(_I.say_error).to(_closed)(send)
_streaming.upon(_I.lost).to(_closed).returns(None)
_attached.upon(_I.lost).to(_closed).returns(None)
_closed.upon(_I.lost).loop().returns(None)
_closed.upon(_I.say_error).loop().returns(None)

# A timer may fire once more.
_finished.upon(_I.say_heartbeat).loop().returns(None)
_closed.upon(_I.say_heartbeat).loop().returns(None)

for _state in (
    *(_waiting, _opened, _attached, _securing, _replied, _described, _preparing, _prepared),
    *(_asked, _started, _released, _finished, _cancelled, _streaming, _closed),
):
    _state.upon(_I.where).loop().returns(_state.name)

_Machine = build(_builder)


class DestinationHandshake(Exchange):
    """The handshake of one accepted connection.

    :param offer: the features that this side can do, in the order of the Greeting.
    :param versions: the versions of the handshake that this side speaks.
    :raises LocalError: the offer cannot be written as a Greeting.
    """

    table = table_of(_Machine)
    payload_states = frozenset({"streaming", "attached"})
    silent_states = frozenset({"opened"})
    early_states = frozenset({"securing", "replied", "described", "preparing", "prepared", "asked"})
    upgrade_states = frozenset({"securing"})
    role = "destination"

    def __init__(self, offer: Sequence[str], versions: Sequence[int] = (VERSION,)) -> None:
        core = Core()
        machine = _Machine(core)
        super().__init__(machine, core, read_opening(versions))
        self._inputs = machine
        self._offer = frozenset(offer)
        self._greeting = Greeting(tuple(versions), tuple(offer))
        self._reply = Reply(0, ())
        self._in_tls = False
        self._selected: tuple[str, ...] = ()
        self._heard_of: set[str] = set()
        self._spoken_of: set[str] = set()
        core.outgoing += self._greeting.encode()

    @property
    def upgrade(self) -> bool:
        return super().upgrade and not self._in_tls

    def secured(self) -> None:
        """TLS is there: after a Reply that selected it, or at once on a payload channel."""
        self._in_tls = True

    def feature(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Say this side's parameters for a selected feature, once, before PREPARED.

        :raises LocalError: not in this state, not selected, said before, or not JSON.
        """
        data = messages.Feature(name, parameters).encode()
        self._check_feature(name, self._selected, self._spoken_of)
        self._say(self._inputs.say_feature, "feature()", data)
        self._spoken_of.add(name)

    def prepared(self, body: Mapping[str, Any]) -> None:
        """Answer PREPARE."""
        self._say(self._inputs.say_prepared, "prepared()", messages.Prepared(body).encode())

    def attached(self) -> None:
        """Accept a payload channel; from here every byte on it is payload."""
        self._say(self._inputs.say_attached, "attached()", messages.Attached().encode())

    def heartbeat(self) -> None:
        """Say that this side lives.  Harmless once it is over: then nothing is said."""
        self._say(self._inputs.say_heartbeat, "heartbeat()", messages.Heartbeat().encode())

    def status(self, body: Mapping[str, Any]) -> None:
        """Say how this side sees the migration."""
        self._say(self._inputs.say_status, "status()", messages.Status(body).encode())

    def outcome(self, body: Mapping[str, Any]) -> None:
        """Say how it ended; nothing but ``error()`` can be said after it."""
        self._say(self._inputs.say_outcome, "outcome()", messages.Outcome(body).encode())

    def error(self, code: str, text: str) -> None:
        """Give up: say why, and be closed.  Harmless when closed already.

        In the baseline it may be called as long as the connection has not been
        given to the guest.
        """
        self._say(self._inputs.say_error, "error()", messages.Error(code, text).encode())

    def _no_payload_follows(self) -> bool:
        # With features, the stream has channels of its own.
        return bool(self._selected)

    def _heard(self, item: Any) -> None:
        inputs = self._inputs
        match item:
            case Reply(version, features):
                for name in features:
                    if name not in self._offer:
                        raise ProtocolError(
                            f"The Reply selects {name!r}, which was not offered.",
                            code="not-offered",
                        )
                if self._in_tls:
                    raise ProtocolError(
                        "A Reply came in TLS. A control connection goes over to TLS after its "
                        "Reply; only a payload channel begins with it.",
                        code="unexpected-message",
                    )
                self._reply, self._selected = item, features
                take = inputs.got_tls_reply if TLS in features else inputs.got_reply
                self._got(take, "a Reply", events.Selected(version, features))
            case messages.Binding(theirs):
                ours = binding(self._greeting, self._reply)
                self._check_binding(theirs, ours)
                selected = events.Selected(self._reply.version, self._selected)
                answer = messages.Binding(ours).encode()
                self._got(lambda event: inputs.got_binding(event, answer), "BINDING", selected)
            case RoleHeader():
                self._got(inputs.got_role, "a role header", events.ChannelOpened(item))
            case messages.Error(code, text):
                self._got(inputs.got_error, "ERROR", events.Failed(code, text, remote=True))
            case messages.Guest(body):
                self._got(inputs.got_guest, "GUEST", events.GuestDescribed(body))
            case messages.Feature(name, body):
                self._check_peer_feature(name, self._selected, self._heard_of)
                self._got(inputs.got_feature, "FEATURE", events.FeatureSaid(name, body))
            case messages.Prepare(body):
                self._got(inputs.got_prepare, "PREPARE", events.PrepareAsked(body))
            case messages.Ask() if set(self._selected) - {TLS}:
                # A FEATURE of this side's could cross with it.
                raise self._unexpected("ASK with features selected beside TLS")
            case messages.Ask(body):
                self._got(inputs.got_bare_ask, "ASK", events.Asked(body))
            case messages.Start() if self._selected:
                said = "START with selected features, before PREPARED,"
                self._got(inputs.got_start, said, events.Started(baseline=False))
            case messages.Start():
                self._got(inputs.got_bare_start, "START", events.Started(baseline=True))
            case messages.Heartbeat():
                self._got(inputs.got_heartbeat, "HEARTBEAT", events.Heartbeat())
            case messages.Status(body):
                self._got(inputs.got_status, "STATUS", events.StatusSaid(body))
            case messages.Cancel(reason):
                self._got(inputs.got_cancel, "CANCEL", events.CancelAsked(reason))
            case messages.Release(body):
                self._got(inputs.got_release, "RELEASE", events.Released(body))
