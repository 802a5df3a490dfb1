"""What the three handshakes have in common: bytes in, events out.

:class:`Exchange` reads one item after the other, asks the state machine of its
role what each means, and collects what is to be sent and told.  It knows no
state by name: which states listen, which take a message, and which have given
the connection away is read off the machine's own table.

The rule for every pair of a state and an input that the table does not have:

- from the peer, it is a violation (``unexpected-message``): the peer gets an
  ERROR, the owner gets :class:`~qmigd.handshake.events.Failed`, and the machine
  is closed.  A message is judged by its header, before its body is read;
- from this side, it is a mistake in the program that uses the handshake:
  :class:`~qmigd.errors.LocalError` is raised, and nothing has changed.
"""

from __future__ import annotations

import hmac
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Final, Protocol, TypeVar, cast

from automat import NoTransition, TypeMachineBuilder

from qmigd.errors import LocalError, ProtocolError
from qmigd.handshake.events import Event, Failed
from qmigd.wire.limits import MAX_BEFORE_START
from qmigd.wire.messages import Error, MessageType, read_message
from qmigd.wire.reading import Decoder, Reading

__all__ = [
    "Core",
    "Exchange",
    "Inputs",
    "Table",
    "Transition",
    "build",
    "send",
    "table_of",
    "tell",
    "tell_and_send",
    "tell_only",
]


@dataclass
class Core:
    """What the outputs of a machine act on."""

    outgoing: bytearray = field(default_factory=bytearray)
    events: list[Event] = field(default_factory=list)


def tell(inputs: object, core: Core, event: Event) -> None:
    """Tell the owner."""
    core.events.append(event)


def send(inputs: object, core: Core, data: bytes) -> None:
    """Send to the peer."""
    core.outgoing += data


def tell_and_send(inputs: object, core: Core, event: Event, data: bytes) -> None:
    """Tell the owner why it is over, and the peer as well."""
    core.events.append(event)
    core.outgoing += data


def tell_only(inputs: object, core: Core, event: Event, data: bytes) -> None:
    """Tell the owner why it is over; the peer can no longer be told."""
    core.events.append(event)


class Inputs(Protocol):
    """The inputs that the machine of every role has.

    ``got_...`` come from the peer and bring the event for the owner, ``say_...``
    come from the owner and bring the bytes for the peer.
    """

    def where(self) -> str:
        """Return the state's name."""

    def got_violation(self, event: Event, data: bytes) -> None:
        """The peer broke the protocol; the data are an ERROR."""

    def lost(self, event: Event, data: bytes) -> None:
        """The connection ended; the data are an ERROR, should the peer still read."""


@dataclass(frozen=True)
class Transition:
    """A line of a machine's table, as it was built."""

    state: str
    input: str
    next: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """What the table of a machine says.

    :ivar initial: the state in which it begins.
    :ivar transitions: all of them, sorted.
    :ivar expected: the messages that each state takes.
    """

    initial: str
    transitions: tuple[Transition, ...]
    expected: Mapping[str, frozenset[MessageType]]


_Inputs = TypeVar("_Inputs", bound="Inputs")


def build(builder: TypeMachineBuilder[_Inputs, Core]) -> Callable[[Core], _Inputs]:
    """Build a machine whose transitions are looked up, each for the first time only.

    Automat goes through its whole list for each input, which in tables like these takes as
    long as all the rest of a transition.

    :param builder: what has the whole table.
    """
    machine: Any = builder.build()
    automaton = machine.__automat_automaton__
    automaton.outputForInput = cache(automaton.outputForInput)
    return cast(Callable[[Core], _Inputs], machine)


def table_of(machine: Any) -> Table:
    """Return the table of a machine that :func:`build` made."""
    automaton = machine.__automat_automaton__
    transitions = sorted(
        (
            Transition(old.name, said, new.name, tuple(output.name for output in outputs))
            for old, said, new, outputs in automaton.allTransitions()
            if said != "where"
        ),
        key=lambda line: (line.state, line.input),
    )
    expected: dict[str, set[MessageType]] = {state.name: set() for state in automaton.states()}
    for line in transitions:
        name = line.input.removeprefix("got_").removeprefix("bare_").upper()
        if line.input.startswith("got_") and name in MessageType.__members__:
            expected[line.state].add(MessageType[name])
    return Table(
        automaton.initialState.name,
        tuple(transitions),
        {state: frozenset(kinds) for state, kinds in expected.items()},
    )


#: Bytes that may be read at once where they are all for the handshake.
READ_AHEAD: Final = 65536


class Exchange(ABC):
    """One connection's handshake, seen from one side.

    Feed it with :meth:`receive` what the socket gives, and send what
    :meth:`data_to_send` gives, always before anything else is done.
    """

    #: What the machine's table says.
    table: ClassVar[Table]
    #: States in which the connection carries payload and is not read any more.
    payload_states: ClassVar[frozenset[str]]
    #: States in which the peer has to wait for this side, and so nothing is read.
    silent_states: ClassVar[frozenset[str]] = frozenset()
    #: States before START, in which the peer's bodies count for the limit.
    early_states: ClassVar[frozenset[str]] = frozenset()
    #: States in which the connection goes over to TLS.
    upgrade_states: ClassVar[frozenset[str]] = frozenset()
    #: This side, for the texts of errors.
    role: ClassVar[str]

    def __init__(self, machine: Inputs, core: Core, first: Reading[Any]) -> None:
        self._machine = machine
        self._core = core
        self._state = machine.where()
        self._decoder: Decoder[Any] = Decoder(first)
        self._leftover = bytearray()
        self._budget = MAX_BEFORE_START

    @property
    def state(self) -> str:
        """The machine's state, for logs and tests."""
        return self._state

    @property
    def closed(self) -> bool:
        """Whether it is over: send what there is to send, then close the connection."""
        return self._state == "closed"

    @property
    def wanted(self) -> int:
        """How many bytes may be read from the socket now, at most.

        Whoever keeps to it never takes a byte that belongs to the payload.  0:
        nothing may be read; the connection carries payload (after
        :class:`~qmigd.handshake.events.Started` with ``baseline``, or
        :class:`~qmigd.handshake.events.ChannelAttached`, or ``attached()``), or
        it is this side's turn, or it is over.
        """
        if self.closed or self._state in self.payload_states | self.silent_states:
            return 0
        return self._decoder.wanted

    @property
    def upgrade(self) -> bool:
        """Whether TLS begins with the next byte, in both directions, and has not yet.

        What there is to send by then is still sent in clear.  Once TLS is there, the
        owner calls :meth:`secured`, and this machine's bytes are those inside.
        """
        return self._state in self.upgrade_states

    @abstractmethod
    def secured(self) -> None:
        """TLS is there: what comes in and goes out from now on is inside it."""

    @property
    def may_read(self) -> int:
        """How many bytes may be read from the socket now, at most.

        The same as :attr:`wanted` as long as payload may come behind the item that is
        being read; much more where none can come on this connection.
        """
        wanted = self.wanted
        return max(wanted, READ_AHEAD) if wanted and self._no_payload_follows() else wanted

    def _no_payload_follows(self) -> bool:
        """Whether the peer cannot send payload here before this side has acted."""
        return False

    @property
    def leftover(self) -> bytes:
        """Payload that was given to :meth:`receive`: empty if ``wanted`` was kept to."""
        return bytes(self._leftover)

    def data_to_send(self) -> bytes:
        """Return what has to be sent, and forget it."""
        data = bytes(self._core.outgoing)
        self._core.outgoing.clear()
        return data

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the peer, cut anywhere; return what they mean.

        More than :attr:`wanted` may be given.  What then is payload is kept in
        :attr:`leftover`; what comes after the end is dropped.
        """
        offset = 0
        try:
            while offset < len(data) and (wanted := self.wanted):
                offset += self._decoder.feed(data[offset : offset + wanted])
                if self._decoder.done:
                    item = self._decoder.item
                    self._decoder = Decoder(read_message(self._admit))
                    self._heard(item)
            if offset < len(data):
                self._surplus(data[offset:])
        except ProtocolError as error:
            return self.refuse(error.code, error.text)
        return self._take_events()

    def eof(self) -> list[Event]:
        """The peer sends nothing more, or the connection is lost; return what that means."""
        middle = " in the middle of what it was saying" if self._decoder.taken else ""
        text = (
            f"The peer closed the connection before its time{middle} (state "
            f'"{self._state}" of the {self.role}).'
        )
        return self._lost(Failed("peer-gone", text, False), Error("peer-gone", text).encode())

    def broken(self, code: str, text: str, remote: bool) -> list[Event]:
        """The TLS that carried it failed; return what that means.  Nothing can be said."""
        return self._lost(Failed(code, text, remote), b"")

    def refuse(self, code: str, text: str) -> list[Event]:
        """This side does not want this peer; return what that means."""
        self._machine.got_violation(Failed(code, text, False), Error(code, text).encode())
        self._state = self._machine.where()
        return self._take_events()

    def _lost(self, event: Event, data: bytes) -> list[Event]:
        self._machine.lost(event, data)
        self._state = self._machine.where()
        return self._take_events()

    @abstractmethod
    def _heard(self, item: Any) -> None:
        """Give an item to the machine by :meth:`_got`."""

    def _got(self, take: Callable[[Event], None], name: str, event: Event) -> None:
        """Give the machine an input from the peer, which the peer calls ``name``."""
        try:
            take(event)
        except NoTransition:
            raise self._unexpected(name) from None
        finally:
            self._state = self._machine.where()

    def _say(self, say: Callable[[bytes], None], what: str, data: bytes) -> None:
        """Give the machine an input from this side.

        :raises LocalError: there is no place for it in this state.
        """
        try:
            say(data)
        except NoTransition:
            raise LocalError(
                f"{what} cannot be called in the state "
                f'"{self._state}" of the {self.role}\'s side of the handshake.',
                code="handshake-misuse",
            ) from None
        finally:
            self._state = self._machine.where()

    def _check_binding(self, theirs: bytes, ours: bytes) -> None:
        """Compare what both sides have seen of the opening.

        :raises ProtocolError: somebody in between has changed it.
        """
        if not hmac.compare_digest(theirs, ours):
            raise ProtocolError(
                "Greeting and Reply are not the same on both sides: somebody in between "
                "changes what is said before TLS, to keep a feature from being used.",
                code="opening-differs",
            )

    def _check_feature(self, name: str, selected: Collection[str], said: Collection[str]) -> None:
        """Refuse a FEATURE of this side that the peer would refuse.

        :raises LocalError: the feature was not selected, or this side said one before.
        """
        if name not in selected:
            raise LocalError(f"The feature {name!r} was not selected.", code="not-offered")
        if name in said:
            raise LocalError(
                f"This side has said its FEATURE {name} already.", code="repeated-feature"
            )

    def _check_peer_feature(self, name: str, selected: Collection[str], heard: set[str]) -> None:
        """Note that the peer has said FEATURE ``name``.

        :raises ProtocolError: the feature was not selected, or the peer said one before.
        """
        if name not in selected:
            raise ProtocolError(
                f"FEATURE came for {name!r}, which was not selected.", code="not-offered"
            )
        if name in heard:
            raise ProtocolError(f"FEATURE {name} came twice.", code="repeated-feature")
        heard.add(name)

    def _admit(self, kind: MessageType, length: int) -> None:
        """Refuse a message by its header."""
        if kind not in self.table.expected[self._state]:
            raise self._unexpected(kind.name)
        if self._state in self.early_states:
            self._budget -= length
            if self._budget < 0:
                raise ProtocolError(
                    f"{kind.name} brings the bodies before START above {MAX_BEFORE_START} bytes.",
                    code="too-long",
                )

    def _unexpected(self, name: str) -> ProtocolError:
        expected = ", ".join(sorted(kind.name for kind in self.table.expected[self._state]))
        return ProtocolError(
            f'{name} has no place in the state "{self._state}" of the {self.role}\'s side of '
            f"the handshake; expected there: {expected or 'nothing'}.",
            code="unexpected-message",
        )

    def _surplus(self, rest: bytes) -> None:
        if self._state in self.payload_states:
            self._leftover += rest
        elif self._state in self.silent_states:
            raise ProtocolError(
                "Payload came before ATTACHED; a channel has to wait for that.",
                code="early-payload",
            )

    def _take_events(self) -> list[Event]:
        events = list(self._core.events)
        self._core.events.clear()
        return events
