"""The source's side of the handshake.

Theory of operation
-------------------
The source waits for the Greeting (``waiting``), and its owner then chooses
(``greeted``).  From the Reply on it describes its guest if it wants to (once,
and first), says one FEATURE for each selected feature while the destination
says one for each too, and asks the destination to prepare itself.  PREPARED
makes ``start()`` possible.

A Reply that selects TLS is the last thing in clear (``securing``).  Inside TLS this side
says first what it has seen of the opening (``binding``), and goes on once the
destination has said the same.

Where no feature was selected, ``start()`` is possible right after the Reply as
well, though not between PREPARE and PREPARED; and in any case the stream then
follows on this very connection (``streaming``).  The machine has two inputs for
it: ``say_start`` where features were selected, ``say_bare_start`` where none.

After START with features the connection goes on to serve control (``started``).
``release()`` hands the guest over, once (``released``); nothing can be cancelled
after it.  The destination's OUTCOME ends the conversation (``finished``).

A source that lost the connection after ``release()`` connects again and asks what
became of the guest (``asking``), right after a Reply that selects TLS at the most; an
OUTCOME answers it.

A ``cancel()`` before START ends the handshake (``cancelled``): what the
destination said before it heard that is ignored, and both sides close.  After
START it is a request, and the destination's OUTCOME tells what became of it.

Whatever happens, ``closed`` is the end: it takes nothing and says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from automat import TypeMachineBuilder

from qmigd.errors import LocalError
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
from qmigd.wire.greeting import TLS, VERSION, Greeting, Reply, binding, read_greeting

__all__ = ["SourceHandshake"]


class _Inputs(Inputs, Protocol):
    def got_greeting(self, event: Event) -> None: ...
    def got_binding(self, event: Event) -> None: ...
    def got_error(self, event: Event) -> None: ...
    def got_feature(self, event: Event) -> None: ...
    def got_prepared(self, event: Event) -> None: ...
    def got_heartbeat(self, event: Event) -> None: ...
    def got_status(self, event: Event) -> None: ...
    def got_outcome(self, event: Event) -> None: ...
    def say_reply(self, data: bytes) -> None: ...
    def say_tls_reply(self, data: bytes) -> None: ...
    def say_binding(self, data: bytes) -> None: ...
    def say_guest(self, data: bytes) -> None: ...
    def say_feature(self, data: bytes) -> None: ...
    def say_prepare(self, data: bytes) -> None: ...
    def say_bare_ask(self, data: bytes) -> None: ...
    def say_start(self, data: bytes) -> None: ...
    def say_bare_start(self, data: bytes) -> None: ...
    def say_heartbeat(self, data: bytes) -> None: ...
    def say_status(self, data: bytes) -> None: ...
    def say_cancel(self, data: bytes) -> None: ...
    def say_release(self, data: bytes) -> None: ...
    def say_error(self, data: bytes) -> None: ...


_I = _Inputs
_builder = TypeMachineBuilder(_Inputs, Core)

_waiting = _builder.state("waiting")  # for the Greeting
_greeted = _builder.state("greeted")  # this side owes the Reply
_securing = _builder.state("securing")  # TLS is being set up
_binding = _builder.state("binding")  # the destination owes BINDING
_replied = _builder.state("replied")
_described = _builder.state("described")  # GUEST or FEATURE is said: no ASK any more
_preparing = _builder.state("preparing")  # the destination owes PREPARED
_prepared = _builder.state("prepared")
_asking = _builder.state("asking")  # the destination owes the OUTCOME of an earlier migration
_started = _builder.state("started")
_released = _builder.state("released")  # the guest is the destination's
_finished = _builder.state("finished")  # OUTCOME came
_cancelled = _builder.state("cancelled")
_streaming = _builder.state("streaming")  # the baseline: the connection is the stream's
_closed = _builder.state("closed")

# From the Greeting to START.
_waiting.upon(_I.got_greeting).to(_greeted)(tell)
_greeted.upon(_I.say_reply).to(_replied)(send)
_greeted.upon(_I.say_tls_reply).to(_securing)(send)
_securing.upon(_I.say_binding).to(_binding)(send)
_binding.upon(_I.got_binding).to(_replied)(tell)

_replied.upon(_I.say_guest).to(_described)(send)
_replied.upon(_I.say_feature).to(_described)(send)
_replied.upon(_I.say_prepare).to(_preparing)(send)
_replied.upon(_I.say_bare_ask).to(_asking)(send)
_replied.upon(_I.say_bare_start).to(_streaming)(send)
_replied.upon(_I.got_feature).loop()(tell)

_described.upon(_I.say_guest).loop()(send)
_described.upon(_I.say_feature).loop()(send)
_described.upon(_I.say_prepare).to(_preparing)(send)
_described.upon(_I.say_bare_start).to(_streaming)(send)
_described.upon(_I.got_feature).loop()(tell)

_preparing.upon(_I.got_feature).loop()(tell)
_preparing.upon(_I.got_prepared).to(_prepared)(tell)
_preparing.upon(_I.say_cancel).to(_cancelled)(send)

_prepared.upon(_I.say_start).to(_started)(send)
_prepared.upon(_I.say_bare_start).to(_streaming)(send)
_prepared.upon(_I.say_cancel).to(_cancelled)(send)

# The destination may have said these before it heard the CANCEL.
_cancelled.upon(_I.got_feature).loop().returns(None)
_cancelled.upon(_I.got_prepared).loop().returns(None)

_asking.upon(_I.got_outcome).to(_finished)(tell)

# The migration runs.
_started.upon(_I.got_heartbeat).loop()(tell)
_started.upon(_I.got_status).loop()(tell)
_started.upon(_I.got_outcome).to(_finished)(tell)
_started.upon(_I.say_heartbeat).loop()(send)
_started.upon(_I.say_status).loop()(send)
_started.upon(_I.say_cancel).loop()(send)
_started.upon(_I.say_release).to(_released)(send)

_released.upon(_I.got_heartbeat).loop()(tell)
_released.upon(_I.got_status).loop()(tell)
_released.upon(_I.got_outcome).to(_finished)(tell)
_released.upon(_I.say_heartbeat).loop()(send)
_released.upon(_I.say_status).loop()(send)

# The end, expected or not.
for _state in (
    *(_waiting, _greeted, _securing, _binding, _replied, _described, _preparing, _prepared),
    *(_asking, _started, _released),
):
    _state.upon(_I.got_violation).to(_closed)(tell_and_send)
    _state.upon(_I.lost).to(_closed)(tell_and_send)
    _state.upon(_I.say_error).to(_closed)(send)
for _state in (_finished, _cancelled):
    _state.upon(_I.got_violation).to(_closed)(tell_and_send)
    _state.upon(_I.lost).to(_closed).returns(None)
    _state.upon(_I.say_error).to(_closed)(send)
for _state in (
    *(_greeted, _binding, _replied, _described, _preparing, _prepared, _asking),
    *(_started, _released, _finished, _cancelled),
):
    _state.upon(_I.got_error).to(_closed)(tell)
_streaming.upon(_I.lost).to(_closed).returns(None)
_closed.upon(_I.lost).loop().returns(None)
_closed.upon(_I.say_error).loop().returns(None)

# A timer may fire once more.
_finished.upon(_I.say_heartbeat).loop().returns(None)
_closed.upon(_I.say_heartbeat).loop().returns(None)

for _state in (
    *(_waiting, _greeted, _securing, _binding, _replied, _described, _preparing, _prepared),
    *(_asking, _started, _released, _finished, _cancelled, _streaming, _closed),
):
    _state.upon(_I.where).loop().returns(_state.name)

_Machine = build(_builder)


class SourceHandshake(Exchange):
    """The handshake of one control connection, on the side that opened it.

    :param versions: the versions of the handshake that this side speaks; the
        highest that the destination speaks too is taken.
    """

    table = table_of(_Machine)
    payload_states = frozenset({"streaming"})
    early_states = frozenset(
        {"greeted", "binding", "replied", "described", "preparing", "prepared", "asking"}
    )
    upgrade_states = frozenset({"securing"})
    role = "source"

    def __init__(self, versions: Sequence[int] = (VERSION,)) -> None:
        core = Core()
        machine = _Machine(core)
        super().__init__(machine, core, read_greeting(versions))
        self._inputs = machine
        self._versions = frozenset(versions)
        self._version = 0
        self._offer: frozenset[str] = frozenset()
        self._greeting = Greeting((), ())
        self._binding = b""
        self._selected: tuple[str, ...] = ()
        self._heard_of: set[str] = set()
        self._spoken_of: set[str] = set()

    def reply(self, features: Sequence[str]) -> None:
        """Answer the Greeting: select these features, or with none the baseline.

        With TLS among them, nothing can be said before ``Secured`` has come.

        :raises LocalError: one was not offered, or stands there twice.
        """
        reply = Reply(self._version, tuple(features))
        data = reply.encode()
        for name in features:
            if self.state == "greeted" and name not in self._offer:
                raise LocalError(
                    f"{name!r} cannot be selected: the destination did not offer it.",
                    code="not-offered",
                )
        if TLS in features:
            self._say(self._inputs.say_tls_reply, "reply()", data)
            self._binding = binding(self._greeting, reply)
        else:
            self._say(self._inputs.say_reply, "reply()", data)
        self._selected = tuple(features)

    def secured(self) -> None:
        """TLS is there: say what was seen of the opening."""
        self._say(self._inputs.say_binding, "secured()", messages.Binding(self._binding).encode())

    def guest(self, description: Mapping[str, Any]) -> None:
        """Name or describe the guest; what is said later adds to what was said before."""
        self._say(self._inputs.say_guest, "guest()", messages.Guest(description).encode())

    def feature(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Say this side's parameters for a selected feature, once, before PREPARE.

        :raises LocalError: not in this state, not selected, said before, or not JSON.
        """
        data = messages.Feature(name, parameters).encode()
        self._check_feature(name, self._selected, self._spoken_of)
        self._say(self._inputs.say_feature, "feature()", data)
        self._spoken_of.add(name)

    def prepare(self, body: Mapping[str, Any]) -> None:
        """Ask the destination to prepare itself."""
        self._say(self._inputs.say_prepare, "prepare()", messages.Prepare(body).encode())

    def ask(self, body: Mapping[str, Any]) -> None:
        """Ask what became of an earlier migration, right after a Reply with TLS at the most."""
        data = messages.Ask(body).encode()
        if set(self._selected) - {TLS}:
            # A FEATURE of the destination's could cross with it.
            raise LocalError(
                "ask() can be called only after a Reply that selects no feature beside TLS.",
                code="handshake-misuse",
            )
        self._say(self._inputs.say_bare_ask, "ask()", data)

    def start(self) -> None:
        """Say START; without features the connection is the stream's from here."""
        data = messages.Start().encode()
        if self._selected:
            self._say(self._inputs.say_start, "start()", data)
        else:
            self._say(self._inputs.say_bare_start, "start()", data)

    def heartbeat(self) -> None:
        """Say that this side lives.  Harmless once it is over: then nothing is said."""
        self._say(self._inputs.say_heartbeat, "heartbeat()", messages.Heartbeat().encode())

    def status(self, body: Mapping[str, Any]) -> None:
        """Say how this side sees the migration."""
        self._say(self._inputs.say_status, "status()", messages.Status(body).encode())

    def cancel(self, reason: str) -> None:
        """Ask for the end of it: from PREPARE on, and not after ``release()``."""
        self._say(self._inputs.say_cancel, "cancel()", messages.Cancel(reason).encode())

    def release(self, body: Mapping[str, Any]) -> None:
        """Hand the guest over to the destination, once."""
        self._say(self._inputs.say_release, "release()", messages.Release(body).encode())

    def error(self, code: str, text: str) -> None:
        """Give up: say why, and be closed.  Harmless when closed already."""
        self._say(self._inputs.say_error, "error()", messages.Error(code, text).encode())

    def _no_payload_follows(self) -> bool:
        # The destination's guest says nothing before this side's START.
        return True

    def _heard(self, item: Any) -> None:
        inputs = self._inputs
        match item:
            case Greeting(versions, features):
                self._version = max(self._versions & set(versions))
                self._offer = frozenset(features)
                self._greeting = item
                greeted = events.Greeted(versions, features)
                self._got(inputs.got_greeting, "a Greeting", greeted)
            case messages.Error(code, text):
                self._got(inputs.got_error, "ERROR", events.Failed(code, text, remote=True))
            case messages.Binding(theirs):
                self._check_binding(theirs, self._binding)
                self._got(inputs.got_binding, "BINDING", events.Secured())
            case messages.Feature(name, body):
                self._check_peer_feature(name, self._selected, self._heard_of)
                self._got(inputs.got_feature, "FEATURE", events.FeatureSaid(name, body))
            case messages.Prepared(body):
                self._got(inputs.got_prepared, "PREPARED", events.Prepared(body))
            case messages.Heartbeat():
                self._got(inputs.got_heartbeat, "HEARTBEAT", events.Heartbeat())
            case messages.Status(body):
                self._got(inputs.got_status, "STATUS", events.StatusSaid(body))
            case messages.Outcome(body):
                self._got(inputs.got_outcome, "OUTCOME", events.Outcome(body))
