"""What the management commands do.

One method a command, by the command's name with underscores; the arguments have been
checked against :mod:`qmigd.api` before.  Everything that takes longer than a look at
a QEMU is started here and goes on by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred, DeferredList

from .. import __version__
from ..api import COMMANDS, nearest, schema
from ..backend import Guest, Tunable
from ..errors import ArgumentError, GuestNotFound, MigrationError
from ..interfaces import PATHS, PROCESS, GuestFacts, No, Role
from ..migration.offer import not_offered
from ..migration.restoring import RestoreOptions, Restoring
from ..migration.saving import SaveOptions, Saving
from ..migration.services import Services
from ..migration.source import Outgoing, new_id
from ..negotiation.obstacles import Obstacle
from ..negotiation.policy import Legacy, Policy
from ..transports.uri import Address, InBandAddress, TcpAddress, bare, parse_peer
from ..wire.greeting import VERSION
from .channel_commands import ChannelCommands
from .config import guest_config, unknown_names
from .registry import GuestRegistry

__all__ = ["Commands"]


class Commands(ChannelCommands):
    """The commands of one daemon."""

    def __init__(self, services: Services, guests: GuestRegistry) -> None:
        super().__init__(services)
        self._guests = guests
        self._outgoing: dict[str, Outgoing | Saving | Restoring] = {}
        self._filing: dict[Saving | Restoring, Deferred[Any]] = {}

    # about the daemon

    async def query_version(self) -> dict[str, Any]:
        major, minor, micro = (int(word) for word in __version__.split("."))
        return {
            "qmigd": __version__,
            "protocol": [VERSION],
            "qemu": {"major": major, "minor": minor, "micro": micro},
            "package": f"qmigd {__version__}",
        }

    async def query_commands(self) -> list[dict[str, Any]]:
        return [{"name": name} for name in COMMANDS]

    async def query_qmp_schema(self) -> list[dict[str, Any]]:
        return schema()

    # guests

    async def query_guests(self) -> list[dict[str, Any]]:
        return await self._guests.query()

    async def guest_add(self, name: str, qmp: str) -> dict[str, Any]:
        return await self._guests.add(guest_config(name, qmp))

    async def guest_remove(self, name: str) -> None:
        self._guests.remove(name)

    async def query_features(
        self,
        guest: str | None = None,
        uri: str | None = None,
        tls_hostname: str | None = None,
        argv: Sequence[str] = (),
    ) -> dict[str, Any]:
        if guest is not None and uri is not None:
            answer = await self._pair_features(guest, self._address(uri, argv), tls_hostname)
        elif guest is not None:
            answer = await self._guest_features(guest)
        elif uri is None:
            answer = {"features": self._described(not_offered(self._services))}
        else:
            raise ArgumentError("query-features: 'uri' goes with 'guest'")
        if warnings := self._warnings():
            answer["warnings"] = warnings
        return answer

    async def _guest_features(self, guest: str) -> dict[str, Any]:
        async with self._guests.borrowed(guest) as held:
            examined = await held.examine()
        role: Role = "destination" if examined.status == "inmigrate" else "source"
        answer: dict[str, Any] = {
            "guest": guest,
            "features": self._described(self._obstacles(examined.facts, role)),
        }
        if examined.facts.blockers:
            answer["blocked-reasons"] = list(examined.facts.blockers)
        return answer

    def _warnings(self) -> list[str]:
        credentials = self._services.security.store
        if credentials is None:
            return []
        now = datetime.fromtimestamp(self._services.reactor.seconds(), UTC)
        return credentials.current.warnings(now)

    def _described(self, obstacles: Mapping[str, Obstacle]) -> list[dict[str, Any]]:
        return [
            _feature(name, feature.summary, obstacles.get(name))
            for name, feature in self._services.features.items()
        ]

    def _obstacles(self, facts: GuestFacts, role: Role) -> dict[str, Obstacle]:
        """What stands in the way here, with this guest."""
        found = not_offered(self._services)
        for name, feature in self._services.features.items():
            answer = feature.probe_guest(facts, role)
            if name not in found and isinstance(answer, No):
                found[name] = Obstacle.of(answer, PROCESS)
        return found

    async def _pair_features(
        self, guest: str, address: Address, tls_hostname: str | None
    ) -> dict[str, Any]:
        uri = str(address)
        record = self._services.records.new(new_id(), guest, "source", uri)
        outgoing = Outgoing(self._services, record, address, self._services.policy, tls_hostname)
        plan = await outgoing.probe(self._guests.take(guest, record.id))
        features = []
        here = not_offered(self._services)
        for name, feature in self._services.features.items():
            entry = _feature(name, feature.summary, plan.left_out.get(name))
            entry["offered"] = name not in here
            entry["selected"] = name in plan.features
            features.append(entry)
        return {
            "guest": guest,
            "peer": uri,
            "path": plan.path,
            "path-reason": plan.path_reason,
            "features": features,
        }

    async def query_tunables(self, guest: str) -> list[dict[str, Any]]:
        async with self._guests.borrowed(guest) as held:
            tunables = await held.tunables()
        negotiated = self._negotiated()
        return [_tunable(tunable) for tunable in tunables if tunable.name not in negotiated]

    # migrations

    async def migrate(
        self,
        guest: str,
        uri: str,
        tunables: Mapping[str, Any] | None = None,
        prefer: Iterable[str] = (),
        require: Iterable[str] = (),
        exclude: Iterable[str] = (),
        tls_hostname: str | None = None,
        argv: Sequence[str] = (),
        legacy: Legacy | None = None,
    ) -> dict[str, Any]:
        services = self._services
        address = self._address(uri, argv)
        self._check_names((*prefer, *require, *exclude))
        policy = services.policy.narrowed(prefer, require, exclude, legacy)
        record = services.records.new(new_id(), guest, "source", str(address))
        held = self._guests.take(guest, record.id)
        outgoing = Outgoing(services, record, address, policy, tls_hostname)
        try:
            await outgoing.attach(held)
            outgoing.tunables = await self._checked(held, tunables or {})
        except BaseException:
            outgoing.let_go()
            raise
        record.tunables = outgoing.tunables
        services.records.add(record)
        self._outgoing[guest] = outgoing
        Deferred.fromCoroutine(outgoing.begin()).addBoth(lambda _: self._outgoing.pop(guest, None))
        return {"id": record.id}

    async def save(
        self,
        guest: str,
        file: str,
        format: str | None = None,
        live: bool = False,
        after: str | None = None,
        replace: bool = False,
        checksum: bool = True,
        tunables: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        services = self._services
        path = _absolute(file)
        self._check_tunables(tunables or {})
        options = SaveOptions(
            format, live, after or services.source_after, replace, checksum, tunables or {}
        )
        record = services.records.new(new_id(), guest, "source", f"file:{path}")
        saving = Saving(services, record, path, options)
        await saving.prepare(self._guests.take(guest, record.id))
        return self._begin(guest, saving)

    async def restore(
        self,
        guest: str,
        file: str,
        verify: bool = True,
        tunables: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        services = self._services
        path = _absolute(file)
        self._check_tunables(tunables or {})
        self._guests.check_free(guest)
        record = services.records.new(new_id(), guest, "destination", f"file:{path}")
        options = RestoreOptions(verify, tunables or {})
        return self._begin(guest, Restoring(services, record, path, options))

    def _begin(self, guest: str, filing: Saving | Restoring) -> dict[str, Any]:
        self._services.records.add(filing.record)
        self._outgoing[guest] = filing
        done = Deferred.fromCoroutine(filing.begin())
        self._filing[filing] = done
        done.addBoth(lambda _: (self._outgoing.pop(guest, None), self._filing.pop(filing)))
        return {"id": filing.record.id}

    async def stop(self) -> None:
        """Before the daemon ends: a guest that stands still for its save is let run on."""
        ending = []
        for filing, done in list(self._filing.items()):
            with suppress(MigrationError):  # it is just ending by itself
                filing.cancel("qmigd is being stopped")
            ending.append(done)
        await DeferredList(ending)

    async def query_migrate(
        self, guest: str | None = None, id: str | None = None
    ) -> list[dict[str, Any]]:
        records = list(self._services.records)
        if guest is not None:
            records = [record for record in records if record.guest == guest]
            if not records and guest not in self._guests:
                raise GuestNotFound(self._guests.unknown(guest))
        if id is not None:
            records = [record for record in records if record.id == id]
            if not records:
                raise MigrationError(f"there is no migration {id}")
        return [record.to_json() for record in records]

    async def migrate_start_postcopy(self, guest: str) -> None:
        await self._running(guest).start_postcopy()

    async def migrate_cancel(self, guest: str) -> None:
        self._running(guest).cancel("cancelled by the user")

    async def migrate_set_parameters(self, guest: str, tunables: Mapping[str, Any]) -> None:
        outgoing = self._running(guest)
        if outgoing.guest is None:
            raise MigrationError(f"the migration of {guest} is just ending")
        await outgoing.set_tunables(await self._checked(outgoing.guest, tunables))

    # inside

    def _address(self, uri: str, argv: Sequence[str]) -> Address:
        """:raises ArgumentError: it is no place where a peer could be."""
        address = parse_peer(uri, argv)
        place = bare(address)
        if isinstance(place, TcpAddress) and self._services.host.mptcp:
            place = replace(place, mptcp=True)
        return InBandAddress(place) if isinstance(address, InBandAddress) else place

    def _running(self, guest: str) -> Outgoing | Saving | Restoring:
        if guest in self._outgoing:
            return self._outgoing[guest]
        if guest not in self._guests:
            raise GuestNotFound(self._guests.unknown(guest))
        for record in self._services.records.of(guest):
            if record.role == "destination" and record.ended is None:
                raise MigrationError(
                    f"guest {guest} is on its way here; what becomes of it is for the qmigd to be "
                    f"told that it comes from"
                )
        raise MigrationError(f"guest {guest} is not being migrated from here")

    def _check_names(self, names: Iterable[str]) -> None:
        """:raises ArgumentError: one is neither a feature nor a path."""
        known = (*self._services.features, *PATHS)
        for name in unknown_names(Policy(prefer=tuple(names)), known):
            raise ArgumentError(
                f"there is no feature and no path called '{name}'{nearest(name, known) or '.'}"
            )

    async def _checked(self, guest: Guest, tunables: Mapping[str, Any]) -> dict[str, Any]:
        """Have the guest's QEMU's schema check a user's values.

        :raises ArgumentError: a name is a feature or unknown, or a value does not fit.
        """
        self._check_tunables(tunables)
        return await guest.checked(tunables) if tunables else {}

    def _check_tunables(self, tunables: Mapping[str, Any]) -> None:
        """:raises ArgumentError: a name is a feature, or a parameter that is a feature's own."""
        negotiated = self._negotiated()
        for name in tunables:
            if name in self._services.features:
                what, it = "is a feature and no tunable", "it"
            elif name in negotiated:
                it = f"'{negotiated[name]}'"
                what = f"is no tunable: the feature {it} sets it"
            else:
                continue
            raise ArgumentError(
                f"'{name}' {what}; {it} is negotiated, and on wherever both sides can; "
                "'prefer', 'require' and 'exclude' have a say in that"
            )

    def _negotiated(self) -> dict[str, str]:
        """The migration parameters that are features' own, each with its feature's name."""
        features = self._services.features.values()
        return {name: feature.name for feature in features for name in feature.parameters}


def _absolute(file: str) -> Path:
    """:raises ArgumentError: it is no path that means the same to everybody."""
    if not file.startswith("/") or "\0" in file:
        raise ArgumentError(f"'file' has to be an absolute path, which '{file}' is not")
    return Path(file)


def _feature(name: str, summary: str, obstacle: Obstacle | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "summary": summary, "offered": obstacle is None}
    if obstacle is not None:
        entry |= obstacle.to_json()
    return entry


def _tunable(tunable: Tunable) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": tunable.name,
        "type": tunable.type,
        "value": tunable.value,
        "deprecated": tunable.deprecated,
        "unstable": tunable.unstable,
    }
    if tunable.values:
        entry["values"] = list(tunable.values)
    return entry
