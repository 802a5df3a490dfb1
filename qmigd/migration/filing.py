"""What a guest's QEMU is told where its stream goes to a file, or comes from one."""

from __future__ import annotations

import os
import socket
import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure

from ..channels.saved_files import NewFile, SavedFile
from ..errors import ArgumentError, FeatureError, FileError, MigrationError, QmigdError
from ..interfaces import (
    MAPPED_RAM,
    STREAM,
    ZSTD,
    GuestFacts,
    No,
    Role,
    Settings,
    Withdraw,
)
from ..waiting import in_thread
from .move import Move
from .offer import not_offered
from .proposing import Cancelled
from .services import Services
from .status import Record

__all__ = ["DIRECT_IO", "Filing", "Way", "way"]

T = TypeVar("T")

log = Logger()

#: Capabilities that are for two QEMUs that talk to each other, or for a guest that is
#: sent piece by piece.  With some of them QEMU refuses a file (migrate_caps_check in
#: migration/options.c), with others it waits for what a file never says.
_OFF: Final = (
    "background-snapshot",
    "block",
    "compress",
    "pause-before-switchover",
    "release-ram",
    "return-path",
    "switchover-ack",
    "x-colo",
    "x-ignore-shared",  # or RAM that other processes share would not be in the file
    "xbzrle",
)

#: Parameters of QEMU's file channels; without them they mean nothing.
_FOR_MAPPED = ("direct-io",)

_COMPRESSION = "multifd-compression"
_BANDWIDTH = "max-bandwidth"
_CREDENTIALS = "tls-creds"
DIRECT_IO: Final = "direct-io"

#: Bytes a second: none that a disk could be too fast for.  QEMU's own default is meant for
#: a network that others use as well.
_UNBOUNDED = 1 << 50

#: CPUs with which a restore is faster without further threads, unless somebody asks for them:
#: QEMU's main thread spins while it waits for those (multifd_recv in migration/multifd.c).
#: Medians of five restores of 777 MiB out of the page cache on 2 CPUs, QEMU 10.0 and 11.1:
#: 0.16 and 0.27 s without, 0.72 and 1.04 s with two channels, 0.59 and 1.20 s with four; and
#: from the disk, whose readahead they spoil, 3.4 and 2.6 s without, 9.8 and 11.0 s with two.
_FEW = 2


@dataclass(frozen=True)
class Way:
    """How a guest goes into a file, or out of it.

    :ivar format: one of :data:`~qmigd.interfaces.FORMATS`.
    :ivar features: the capabilities of QEMU's that are used for it.
    :ivar settings: all that is to be set on its QEMU, the user's tunables included.
    """

    format: str
    features: tuple[str, ...]
    settings: Settings


def maps(facts: GuestFacts) -> bool:
    """Whether this QEMU writes mapped RAM into a file that it is handed.

    That is so from QEMU 9.1 on, which brought ``direct-io`` as well; 9.0 knows the
    capability, but opens files by their names only.
    """
    return MAPPED_RAM in facts.capabilities and DIRECT_IO in facts.parameters


def way(
    services: Services,
    facts: GuestFacts,
    role: Role,
    tunables: Mapping[str, Any],
    format: str | None,
) -> Way:
    """Choose how.

    :param format: what is wanted, or what the file has; ``None``: the best one.
    :raises QmigdError: this QEMU cannot do that, or the tunables do not go with it.
    """
    mapped = maps(facts) if format is None else format == MAPPED_RAM
    if mapped and not maps(facts):
        raise FeatureError(
            f"guest {facts.name} has no {MAPPED_RAM}, which QEMU has from version 9.1 on; "
            + (
                f"save it with the format {STREAM} or {ZSTD}"
                if role == "source"
                else f"save it there with the format {STREAM} or {ZSTD}, or restore it here "
                "into a newer one"
            )
        )
    format = MAPPED_RAM if mapped else format or STREAM
    own = _checked(services, facts, format, tunables)
    known = facts.capabilities
    names = (*services.features, *_OFF, MAPPED_RAM)
    settings = Settings({name: False for name in names if name in known})
    settings |= Settings({"events": True} if "events" in known else {})
    if facts.parameters.get(_CREDENTIALS):
        settings |= Settings({}, {_CREDENTIALS: None})
    if role == "source":
        settings |= Settings({}, {_BANDWIDTH: _UNBOUNDED})
    features = []
    if mapped:
        features.append(MAPPED_RAM)
        settings |= Settings({MAPPED_RAM: True})
        # The switch that is in the way is about to be set as it has to be.
        bare = replace(facts, capabilities={**known, MAPPED_RAM: False})
        own = {_COMPRESSION: "none", **own} if _COMPRESSION in facts.parameters else own
        for name, wanted in _agreed(services, bare, role, format, own).items():
            features.append(name)
            settings |= wanted
    negotiated = set().union(*(feature.tunables for feature in services.features.values()))
    plain = {name: value for name, value in own.items() if name not in negotiated}
    return Way(format, tuple(features), settings | Settings({}, plain))


def _checked(
    services: Services, facts: GuestFacts, format: str, tunables: Mapping[str, Any]
) -> dict[str, Any]:
    """See that the tunables go with the format."""
    several = {
        name
        for feature in services.features.values()
        if feature.formats
        for name in feature.tunables
    }
    for name, value in tunables.items():
        if format != MAPPED_RAM and name in {*several, *_FOR_MAPPED}:
            raise ArgumentError(
                f"'{name}' means nothing with the format {format}, whose stream is one: leave it "
                f"out, or save with the format {MAPPED_RAM}"
            )
        if name == _COMPRESSION and value != "none":
            raise ArgumentError(
                f"'{name}' does not go with {MAPPED_RAM}, in which each page has its place and "
                f"its size: save with the format {ZSTD} instead"
            )
    return dict(tunables)


def _agreed(
    services: Services, facts: GuestFacts, role: Role, format: str, tunables: Mapping[str, Any]
) -> dict[str, Settings]:
    """Ask the features that go with a format; what each of those that can be had sets."""
    found: dict[str, Settings] = {}
    refused = not_offered(services)
    for name, feature in services.features.items():
        if format not in feature.formats or name in refused:
            continue
        if isinstance(feature.probe_guest(facts, role), No):
            continue
        own = {key: value for key, value in tunables.items() if key in feature.tunables}
        if role == "destination" and services.host.cpus <= _FEW and own.keys() <= {_COMPRESSION}:
            continue
        try:
            proposal = feature.propose(facts, services.host, own)
            agreement = feature.answer(facts, services.host, proposal)
        except Withdraw:
            continue
        except ValueError as error:
            raise ArgumentError(f"the tunables for {name} make no sense: {error}") from None
        found[name] = feature.settings(agreement, role)
    return found


class Filing(Move):
    """A move between a guest and a file.

    :ivar path: the file's.
    :ivar cancelled: why the user wants an end of it, or ``None``.
    """

    #: What is said of one that cannot be ended any more.
    too_late = ""
    #: And of one whose QEMU is not at work.
    not_now = ""

    def __init__(self, services: Services, record: Record, path: Path) -> None:
        super().__init__(services, record)
        self.path = path
        self.cancelled: str | None = None
        self._moving = False
        self._broken: BaseException | None = None
        self._stop = threading.Event()
        self._settled = False
        self._stream: socket.socket | None = None
        self._lent = ""

    def cancel(self, reason: str) -> None:
        """Ask for the end.

        :raises MigrationError: it is too late.
        """
        if self._settled:
            raise MigrationError(f"it is too late to cancel: {self.too_late}")
        self.cancelled = reason
        self._stop.set()
        self.wake()

    @abstractmethod
    def note(self) -> None:
        """Put down in the journal what a daemon has to know that finds it interrupted."""

    async def set_tunables(self, tunables: Mapping[str, Any]) -> None:
        """Set migration parameters while it runs.

        :raises MigrationError: it does not.
        """
        if not self._moving:
            raise MigrationError(self.not_now)
        await self.tune(tunables, self.note)

    async def start_postcopy(self) -> None:
        """Postcopy needs a destination.

        :raises FeatureError: always.
        """
        raise FeatureError("there is no postcopy with a file: nobody could be asked for a page")

    def raise_if_cancelled(self) -> None:
        """:raises Cancelled: the user wants an end of it."""
        if self.cancelled is not None:
            raise Cancelled(self.cancelled)

    def work(self, descriptor: int, what: str, act: Callable[[int], T]) -> Deferred[T]:
        """Have a thread work on a file, with a descriptor of its own: nobody waits for its end."""
        own = os.dup(descriptor)

        def run() -> T:
            try:
                return act(own)
            finally:
                os.close(own)

        return in_thread(self.services.reactor, f"{what} {self.record.guest}", run)

    async def done(self, working: Deferred[T]) -> T:
        """Wait for what a thread does, or for the user to want an end of it.

        :raises Cancelled: that one; the thread is told, and left to itself.
        """
        ended: list[T | Failure] = []

        def end(result: T | Failure) -> None:
            ended.append(result)
            self.wake()

        working.addBoth(end)
        while not ended:
            self.raise_if_cancelled()
            await self.rest()
        result = ended[0]
        self.raise_if_cancelled()
        if isinstance(result, Failure):
            result.raiseException()
        return result

    async def lend(self, file: NewFile | SavedFile, facts: GuestFacts) -> str:
        """Give QEMU the file, which it need not be allowed to open; returns its name for it."""
        assert self.guest is not None
        direct = self.record.tunables.get(DIRECT_IO, facts.parameters.get(DIRECT_IO))
        opened = []
        try:
            # With direct-io it wants one of each kind (file_parse_fdset in migration/file.c).
            for past_cache in (False, True) if direct else (False,):
                opened.append(file.opened(direct=past_cache))
            self._lent = await self.guest.lend(*opened)
        finally:
            for descriptor in opened:
                os.close(descriptor)
        return self._lent

    async def take_back(self) -> None:
        """Take the file away from QEMU again, if it is still there."""
        try:
            if self._lent and self.guest is not None:
                await self.guest.unlend(self._lent)
        except QmigdError as error:
            log.info("guest {guest}: {error}", guest=self.record.guest, error=error.text)
        self._lent = ""

    def poured(self, result: object, ours: socket.socket) -> None:
        """What goes between QEMU and the file has come to its end, or cannot."""
        self._broken = result.value if isinstance(result, Failure) else None
        # Not before: QEMU fails where its stream ends early, and would say no more than that.
        ours.close()
        self.wake()

    def raise_if_broken(self) -> None:
        """Give up where it was the file that failed; QEMU would only say that its stream ended.

        :raises FileError: it was, and why.
        """
        if isinstance(self._broken, QmigdError):
            raise FileError(f"{self.path}: {self._broken.text}")
        if self._broken is not None:
            raise self._broken

    def cut_stream(self) -> None:
        """Have QEMU and the thread find the stream closed; it is closed when that one has ended."""
        if self._stream is not None:
            with suppress(OSError):
                self._stream.shutdown(socket.SHUT_RDWR)
            self._stream = None
