"""The destination's side of the three paths (:mod:`qmigd.migration.paths`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from twisted.internet.defer import Deferred

from ..backend import Guest
from ..channels.attach import Line
from ..channels.relay import DestinationRelay
from ..channels.relay_channels import ChannelHeld, ChannelLost, RelayEvent
from ..errors import GuestError, QmigdError
from ..interfaces import DIRECT, RELAY
from ..negotiation.allow import PeerNames
from ..negotiation.plan import MAIN, Plan
from ..transports.uri import Network
from ..wire.greeting import TLS
from .paths import Path, for_qemu
from .services import Services

__all__ = ["DestinationPath"]


class DestinationPath(Path):
    """The destination's side.

    :meth:`expect` lets the source open channels; :meth:`open` has the guest's QEMU wait for
    the stream, and gives it what has come by then.
    """

    def __init__(
        self,
        services: Services,
        plan: Plan,
        migration: str,
        secret: bytes,
        wake: Callable[[], Any],
        guest: Guest,
        peer: PeerNames | None,
    ) -> None:
        super().__init__(services, plan, migration, secret, wake)
        self._guest = guest
        self._peer = peer if TLS in plan.features else None
        self._port: int | None = None
        self._take: Callable[[str, int, Line], None] | None = None
        self._early: list[tuple[str, int, Line]] = []

    def expect(self) -> None:
        """Let the source open its channels, which it may do as soon as it has PREPARED."""
        if self._plan.path != DIRECT:
            channels = self._plan.channels if self._plan.path == RELAY else [MAIN]
            self._services.attachments.expect(
                self._migration, self._secret, channels, self._came, self._peer
            )

    async def open(self, at: Network | None) -> dict[str, Any]:
        """Make ready, and return what the source has to know.

        :param at: the address of this host that the source has connected to.
        :raises QmigdError: QEMU refused, or there is no free port.
        """
        if self._plan.path == DIRECT:
            assert at is not None  # or the path would be closed
            return {"port": await self._listen(at)}
        if self._plan.path == RELAY:
            relay = DestinationRelay(
                self._services.reactor,
                self._services.run_dir,
                self._heard,
                self._codec(),
                self._mover("destination"),
            )
            self._relay = relay
            await self._guest.incoming(str(relay.address))
            self._take_by(partial(self._relay_it, relay))
        else:
            self._take_by(self._hand_over)
        return {}

    async def _listen(self, at: Network) -> int:
        ports = self._services.ports
        assert ports is not None
        refusals: list[GuestError] = []
        for port in ports.candidates(at):
            try:
                await self._guest.incoming(self._uri(at, port))
            except GuestError as error:
                if refusals and error.text == refusals[-1].text:
                    break
                # Somebody may have taken the port in between: try another one.
                refusals.append(error)
                continue
            ports.take(port)
            self._port = port
            return port
        # The first one has the reason: a QEMU that has failed once may say no more than that.
        raise (
            *refusals,
            GuestError("the guest's process could not listen on any of the direct-ports"),
        )[0]

    def _came(self, name: str, index: int, line: Line) -> None:
        if self._take is None:
            self._early.append((name, index, line))
        else:
            self._take(name, index, line)

    def _take_by(self, take: Callable[[str, int, Line], None]) -> None:
        self._take = take
        early, self._early = self._early, []
        for channel in early:
            take(*channel)

    def _relay_it(self, relay: DestinationRelay, name: str, index: int, line: Line) -> None:
        try:
            relay.take(name, index, line.plain())
        except QmigdError as error:
            self._fail(error)

    def _hand_over(self, name: str, index: int, line: Line) -> None:
        async def hand_over() -> None:
            await self._guest.incoming(for_qemu(line.plain()))

        Deferred.fromCoroutine(hand_over()).addErrback(self._refused)

    def _heard(self, event: RelayEvent) -> None:
        if isinstance(event, ChannelHeld) and event.channel == MAIN:
            # The source's QEMU has sent everything, or its qmigd was killed: which of the
            # two it was shows in whether the guest is whole in a while.  Any other channel
            # may end before the stream does.
            event = ChannelLost(event.channel, event.reason)
        super()._heard(event)

    def _refused(self, failure: Any) -> None:
        failure.trap(QmigdError)
        self._fail(failure.value)

    def close(self) -> None:
        super().close()
        self._services.attachments.forget(self._migration)
        early, self._early = self._early, []
        for _, _, line in early:
            line.sock.close()
        if self._port is not None and self._services.ports is not None:
            self._services.ports.free(self._port)
            self._port = None
