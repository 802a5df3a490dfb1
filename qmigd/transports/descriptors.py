"""``fd:``: connections that a management app has made and hands over as descriptors.

::

    qmigd                                        management app
    CHANNEL_REQUEST main 0, within 10 s  ------>
                                         <------ getfd (SCM_RIGHTS), add-channel main 0
    the connection is there

Whatever wants a connection of a migration asks :class:`FdAddress` for it as it would ask
any other address, and :class:`ChannelRequests` asks the app.  What comes has to be a stream
socket, connected and open in both directions; of which family is the app's affair.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectError
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IProtocol,
    IProtocolFactory,
    IReactorTime,
    IStreamClientEndpoint,
    IStreamServerEndpoint,
)
from zope.interface import implementer

from qmigd.errors import ArgumentError, MigrationError, NoChannel, QmigdError
from qmigd.transports.adopting import adopt

__all__ = [
    "CONTROL",
    "ChannelRequests",
    "DescriptorAddress",
    "FdAddress",
]

#: What the control connection is called in a request; no payload channel is called so.
CONTROL: Final = "control"

#: Told of an event: its name and its data.
Notify = Callable[[str, Mapping[str, Any]], None]


@implementer(IAddress)
@dataclass(frozen=True)
class DescriptorAddress:
    """Where a connection goes that was handed over: nobody here knows."""

    def __str__(self) -> str:
        return "fd:"


# What is asked for.


@dataclass
class _Request:
    """One that waits for its answer."""

    answered: Deferred[socket.socket]
    expiry: IDelayedCall


@dataclass
class _Planned:
    """The payload channels that one migration is going to want.

    :ivar in_band: they begin in the handshake's in-band form.
    :ivar given: the channels that the app has handed over.
    :ivar kept: those of them that have not been asked for yet.
    """

    role: str
    channels: frozenset[tuple[str, int]]
    in_band: bool = False
    given: set[tuple[str, int]] = field(default_factory=set)
    kept: dict[tuple[str, int], socket.socket] = field(default_factory=dict)


class ChannelRequests:
    """The requests of one daemon."""

    def __init__(self, clock: IReactorTime, notify: Notify) -> None:
        """:param notify: tells every management client of an event."""
        self._clock = clock
        self._notify = notify
        self._requests: dict[tuple[str, str, int], _Request] = {}
        self._planned: dict[str, _Planned] = {}

    def plan(
        self,
        migration: str,
        guest: str,
        role: str,
        channels: Iterable[tuple[str, int]],
        *,
        in_band: bool = False,
    ) -> None:
        """Tell the app which payload channels a migration will want.

        :param in_band: they begin in the handshake's in-band form.

        A source asks for each when it is to be opened.  A destination asks at once, and
        waits for as long as the migration lasts: they come when the source opens them.
        """
        channels = tuple(channels)
        self._planned[migration] = _Planned(role, frozenset(channels), in_band)
        who = {"id": migration, "guest": guest, "role": role}
        self._tell(who, channels, settled=True)
        if role == "destination":
            for name, index in channels:
                self._notify("CHANNEL_REQUEST", {**who, "channel": name, "index": index})

    def foresee(self, migration: str, guest: str, channels: Iterable[tuple[str, int]]) -> None:
        """Tell the app which payload channels a source may come to want, at the most."""
        self._tell({"id": migration, "guest": guest, "role": "source"}, channels, settled=False)

    def _tell(
        self, who: Mapping[str, Any], channels: Iterable[tuple[str, int]], *, settled: bool
    ) -> None:
        named = [{"name": name, "index": index} for name, index in channels]
        self._notify("CHANNEL_PLAN", {**who, "channels": named, "settled": settled})

    def ask(
        self, migration: str, guest: str, name: str, index: int, seconds: float
    ) -> Deferred[socket.socket]:
        """Ask for one channel of a source; cancelling takes the request back.

        :return: fails with :class:`~qmigd.errors.NoChannel` after ``seconds``.
        """
        planned = self._planned.get(migration)
        if planned is not None and (name, index) in planned.kept:
            return succeed(planned.kept.pop((name, index)))
        key = migration, name, index
        if key in self._requests:
            return fail(NoChannel(f"Channel {name} {index} was asked for already."))

        def expired() -> None:
            self._done(key).errback(
                NoChannel(
                    f"nobody has answered CHANNEL_REQUEST for channel {name} {index} within "
                    f"{seconds:g} seconds; the management app has to hand a connection over with "
                    f"getfd and add-channel"
                )
            )

        def taken_back(_: object) -> None:
            self._done(key)

        answered: Deferred[socket.socket] = Deferred(taken_back)
        self._requests[key] = _Request(answered, self._clock.callLater(seconds, expired))
        self._notify(
            "CHANNEL_REQUEST",
            {
                "id": migration,
                "guest": guest,
                "role": "source",
                "channel": name,
                "index": index,
                "timeout": seconds,
            },
        )
        return answered

    def _done(self, key: tuple[str, str, int]) -> Deferred[socket.socket]:
        request = self._requests.pop(key)
        if request.expiry.active():
            request.expiry.cancel()
        return request.answered

    def answer(self, migration: str, name: str, index: int, sock: socket.socket) -> bool:
        """Take what the app hands over for a channel.

        :return: false: it is one of a destination's, to be taken like a connection that
            came by itself.
        :raises MigrationError: nobody wants it; the socket stays the caller's.
        """
        key, channel = (migration, name, index), (name, index)
        planned = self._planned.get(migration)
        if key in self._requests:
            if planned is not None:
                planned.given.add(channel)
            self._done(key).callback(sock)
            return True
        if planned is None:
            raise MigrationError(f"no migration {migration} wants channels from fd: here")
        if channel not in planned.channels:
            channels = ", ".join(f"{name} {index}" for name, index in sorted(planned.channels))
            raise MigrationError(
                f"migration {migration} has asked for no channel {name} {index}; it is to have "
                f"{channels or 'none but the control connection'}"
            )
        if planned.role == "destination":
            return False
        if channel in planned.given:
            raise MigrationError(
                f"channel {name} {index} of migration {migration} was handed over already"
            )
        planned.given.add(channel)
        planned.kept[channel] = sock
        return True

    def in_band(self, migration: str) -> bool:
        """Whether a migration's channels begin in the handshake's in-band form."""
        planned = self._planned.get(migration)
        return planned is not None and planned.in_band

    def withdraw(self, migration: str, error: QmigdError) -> None:
        """Whoever waits for a channel of this migration gets ``error`` instead."""
        for key in [key for key in self._requests if key[0] == migration]:
            self._done(key).errback(error)

    def forget(self, migration: str) -> None:
        """The migration is over: close what it has not used."""
        planned = self._planned.pop(migration, None)
        if planned is not None:
            for sock in planned.kept.values():
                sock.close()


# What a URI is.


@dataclass(frozen=True)
class FdAddress:
    """``fd:``, at first any, then (:meth:`bind`) one migration's, and one channel of it."""

    migration: str = ""
    guest: str = ""
    channel: str = CONTROL
    index: int = 0
    timeout: float = 0.0
    requests: ChannelRequests | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return "fd:"

    @property
    def is_loopback(self) -> bool:
        """Always false: it can lead anywhere."""
        return False

    def bind(
        self, requests: ChannelRequests, migration: str, guest: str, timeout: float
    ) -> FdAddress:
        """Return the address whose connections are those of a migration.

        :param timeout: seconds that the app has to answer a request.
        """
        return replace(self, requests=requests, migration=migration, guest=guest, timeout=timeout)

    def to(self, channel: str, index: int) -> FdAddress:
        """Return the address of one payload channel."""
        return replace(self, channel=channel, index=index)

    def foresee(self, channels: Iterable[tuple[str, int]]) -> None:
        """Tell the app which payload channels there may be, at the most."""
        assert self.requests is not None
        self.requests.foresee(self.migration, self.guest, channels)

    def plan(self, channels: Iterable[tuple[str, int]]) -> None:
        """Tell the app which payload channels are going to be asked for."""
        assert self.requests is not None
        self.requests.plan(self.migration, self.guest, "source", channels)

    def ask(self) -> Deferred[socket.socket]:
        """Ask for the connection; see :meth:`ChannelRequests.ask`.

        :raises ArgumentError: the address belongs to no migration.
        """
        if self.requests is None:
            raise ArgumentError("fd: can be connected to as a part of a migration only.")
        return self.requests.ask(self.migration, self.guest, self.channel, self.index, self.timeout)

    def client(self, reactor: object, timeout: float = 30.0) -> IStreamClientEndpoint:
        """What asks for a connection, and waits as long as :meth:`bind` has said."""
        return _Endpoint(reactor, self)

    def server(self, reactor: object, backlog: int = 1024) -> IStreamServerEndpoint:
        """:raises ArgumentError: always."""
        raise ArgumentError(
            "fd: cannot be listened on: hand connections in with the command 'incoming'."
        )


@implementer(IStreamClientEndpoint)
class _Endpoint:
    def __init__(self, reactor: object, address: FdAddress) -> None:
        self._reactor = reactor
        self._address = address

    def connect(self, factory: IProtocolFactory) -> Deferred[IProtocol]:
        def take(sock: socket.socket) -> IProtocol:
            protocol = adopt(self._reactor, sock, factory, DescriptorAddress())
            if protocol is None:
                raise ConnectError(string="nobody wants the connection")
            return protocol

        return self._address.ask().addCallback(take)
