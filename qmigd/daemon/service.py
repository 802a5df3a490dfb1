"""``twistd qmigd``: the daemon, assembled.

Everything below takes what it needs as arguments; this is the one place that knows
all of it.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from twisted.application.service import IService, Service
from twisted.internet.defer import Deferred, DeferredList
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IListeningPort, IProtocolFactory
from twisted.logger import Logger
from twisted.python import usage

from .. import __version__
from ..channels.attach import Attachments
from ..channels.credentials import Credentials, CredentialStore
from ..errors import ConfigError, QmigdError
from ..features.registry import load_features
from ..guests import quirks
from ..interfaces import GuestFacts, IFeature
from ..migration.legacy_incoming import LegacyFactory
from ..migration.listening import IncomingFactory
from ..migration.recovery import Recovery
from ..migration.security import Security
from ..migration.services import Deadlines, HostFacts, Services
from ..migration.status import Records
from ..migration.verdicts import Verdicts
from ..negotiation.policy import Policy
from ..negotiation.terms import Conflict
from ..transports.descriptors import ChannelRequests
from ..transports.leftovers import Leftovers
from ..transports.ports import PortRange
from ..transports.reasons import not_listening
from ..transports.uri import Door, InBandAddress, bare
from ..wire.greeting import TLS
from .commands import Commands
from .config import Config, GuestConfig, unknown_names
from .config_file import load
from .configured_host import configured
from .journal import FileJournal
from .monitor import Monitor
from .registry import GuestRegistry
from .zero_copy import Movers

__all__ = ["Options", "QmigdService", "makeService"]

log = Logger()

#: New objects between two looks of Python's garbage collector: some two migrations' worth.
_GARBAGE = 20_000


class Options(usage.Options):
    """The command line of ``twistd qmigd``."""

    longdesc = (
        "qmigd moves QEMU guests to other hosts, and takes them in.  One daemon runs on "
        "each host; the two negotiate everything.  Talk to it with qmigctl."
    )
    optParameters = [  # noqa: RUF012 - Twisted's way
        ["config", "c", "/etc/qmigd/qmigd.toml", "the configuration file (TOML)"],
    ]


def makeService(options: Options) -> IService:
    """Read the configuration and make the service.

    :raises SystemExit: the configuration is wrong; the message says how.
    """
    try:
        config = load(options["config"], os.environ, os.getuid())
        features = load_features()
        unknown = unknown_names(config.policy, features)
        if unknown:
            raise ConfigError(
                f"{options['config']}: [policy] names {', '.join(unknown)}, but there is no "
                f"feature and no path of that name; there are {', '.join(features)}"
            )
        credentials = _credentials(config)
    except QmigdError as error:
        raise SystemExit(f"qmigd: {error.text}") from None
    # Late, so that twistd can install another one first.
    from twisted.internet import reactor

    return QmigdService(reactor, config, features, credentials)


def _credentials(config: Config) -> CredentialStore | None:
    """Return what ``[tls]`` names, unless the policy does not want it.

    :raises ConfigError: the files are not good.
    """
    if config.tls is None or config.tls_policy == "off":
        return None
    return CredentialStore(config.tls.certificate, config.tls.key, config.tls.authority)


class QmigdService(Service):
    """One daemon."""

    name = "qmigd"

    def __init__(
        self,
        reactor: Any,
        config: Config,
        features: dict[str, IFeature],
        credentials: CredentialStore | None,
        *,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        """:param on_failure: told why it does not start, where the process is somebody else's
        and must not end for that; signals are left alone then as well.
        """
        self._reactor = reactor
        self._on_failure = on_failure
        self._config = config
        daemon = config.daemon
        state = daemon.state_dir
        try:
            self._lock = _locked(_private(state) / "lock")
            # What an earlier life left here are sockets that nobody listens on any more.
            shutil.rmtree(state / "run", ignore_errors=True)
            run_dir = _private(state / "run")
            host = configured(config, run_dir)
            journal = FileJournal(_private(state / "migrations"))
            leftovers = Leftovers(reactor, _private(state / "programs"))
            self._guests = GuestRegistry(reactor, config.guests, state, daemon.guest_deadline)
        except OSError as error:
            raise SystemExit(
                f"qmigd: the state directory {state} cannot be used: {error.strerror} "
                f"({error.filename}); name another one with 'state-dir' in [daemon]"
            ) from None
        self._journal = journal
        self._records = Records(self._event)
        self._services = Services(
            reactor=reactor,
            facts=HostFacts(host),
            features=features,
            policy=_policy(config),
            guests=self._guests,
            records=self._records,
            journal=journal,
            attachments=Attachments(),
            verdicts=Verdicts(),
            requests=ChannelRequests(reactor, self._event),
            conflicts=_conflicts,
            unawaited=quirks.unawaited,
            ports=PortRange(daemon.direct_ports) if daemon.direct_ports else None,
            run_dir=run_dir,
            deadlines=Deadlines(
                daemon.handshake_deadline, daemon.peer_deadline, daemon.guest_deadline
            ),
            leftovers=leftovers,
            source_after=config.source_after,
            security=_security(config, credentials),
        )
        self._commands = Commands(self._services, self._guests)
        self._monitor = Monitor(reactor, daemon.monitor, self._commands)
        self._movers = Movers(
            reactor,
            state,
            daemon.zero_copy,
            lambda zero_copy: self._services.facts.learn(zero_copy=zero_copy),
        )
        self._ports: list[IListeningPort] = []

    def startService(self) -> None:
        """Bring interrupted migrations to an end, then open the doors."""
        super().startService()
        self._reactor.callWhenRunning(lambda: Deferred.fromCoroutine(self._start()))

    async def _start(self) -> None:
        if self._on_failure is None:  # the process is qmigd's own
            # What has been loaded stays; looking at it again and again would cost each
            # migration half a millisecond, while it waits.
            gc.freeze()
            gc.set_threshold(_GARBAGE)
            # Only now, when the reactor has taken the signals that it wants.
            signal.signal(signal.SIGHUP, lambda *_: self._reactor.callFromThread(self._reload))
        if (credentials := self._services.security.store) is not None:
            self._report(credentials.current)
        try:
            for migration, role, entry in list(self._journal.entries()):
                # The guests are reserved at once; QEMU may still take its time.
                interrupted = Recovery(self._services, migration, role, entry)
                Deferred.fromCoroutine(interrupted.begin())
            self._services.leftovers.start()
            self._movers.start()
            Deferred.fromCoroutine(self._guests.start_guests())
            for uri in self._config.daemon.listen:
                factory = IncomingFactory(
                    self._services,
                    tls_required=self._tls_required(bare(uri)),
                    in_band=isinstance(uri, InBandAddress),
                )
                await self._listen(uri, factory, "'listen' in [daemon]")
                log.info("qmigd {version} listens on {uri}", version=__version__, uri=str(uri))
            for guest in self._config.guests.values():
                await self._listen_legacy(guest)
            await self._monitor.start()
        except QmigdError as error:
            self._give_up(error.text)
        except Exception as error:
            self._give_up(str(error))
        else:
            log.info(
                "features: {features}; management socket: {monitor}",
                features=", ".join(self._services.features) or "none",
                monitor=self._config.daemon.monitor,
            )

    async def _listen(
        self, uri: Door | InBandAddress[Door], factory: IProtocolFactory, key: str
    ) -> None:
        """:raises QmigdError: that is not possible."""
        try:
            self._ports.append(await bare(uri).server(self._reactor).listen(factory))
        except CannotListenError as error:
            raise ConfigError(
                f"it cannot listen on {uri} ({key}): {not_listening(error)}"
            ) from None

    async def _listen_legacy(self, guest: GuestConfig) -> None:
        if guest.legacy_listen is None:
            return
        factory = LegacyFactory(self._services, guest.name)
        key = f"'legacy-listen' in [guest.{guest.name}]"
        await self._listen(guest.legacy_listen, factory, key)
        log.info(
            "guest {guest} can come in as QEMU's plain stream on {uri}",
            guest=guest.name,
            uri=str(guest.legacy_listen),
        )

    def _tls_required(self, uri: Door) -> bool:
        """Whether who comes in there has to go over to TLS."""
        if self._config.tls_policy == "require":
            return True
        return not (self._config.daemon.insecure or uri.is_loopback)

    def _reload(self) -> None:
        """Read the certificates anew: SIGHUP."""
        credentials = self._services.security.store
        if credentials is None:
            log.info("SIGHUP: this daemon uses no certificates, so there is nothing to read anew")
            return
        try:
            self._report(credentials.reload())
        except ConfigError as error:
            log.error("SIGHUP: the certificates stay as they were: {reason}", reason=error.text)

    def _report(self, credentials: Credentials) -> None:
        log.info(
            "certificate for {names}, good until {expires}, SHA-256 {fingerprint}",
            names=", ".join(credentials.names),
            expires=credentials.expires.isoformat(),
            fingerprint=credentials.fingerprint,
        )
        for sentence in credentials.warnings(datetime.fromtimestamp(self._reactor.seconds(), UTC)):
            log.warn("{sentence}", sentence=sentence)

    def _give_up(self, reason: str) -> None:
        log.error("qmigd does not start: {reason}", reason=reason)
        if self._on_failure is not None:
            self._on_failure(reason)
            return
        # twistd would end with exit code 0 here, and a service manager take it for a success.
        atexit.register(os._exit, 1)
        self._reactor.stop()

    def _event(self, name: str, data: Mapping[str, Any]) -> None:
        self._monitor.event(name, data)

    def stopService(self) -> Deferred[Any]:
        """Close the doors.  QEMUs go on; relays end with this process, and so do saves."""
        super().stopService()
        self._services.leftovers.stop()
        closing = [Deferred.fromCoroutine(self._commands.stop())]
        closing += [Deferred.fromCoroutine(self._monitor.stop()), self._movers.stop()]
        closing += [_deferred(port.stopListening()) for port in self._ports]
        # Behind that the reactor closes all connections, and migrations end that have not ended.
        return DeferredList(closing).addCallback(lambda _: self._journal.close())


def _policy(config: Config) -> Policy:
    """Return the policy, with what ``tls`` in ``[policy]`` adds to it."""
    if config.tls_policy == "require" and TLS not in config.policy.require:
        return config.policy.narrowed(require=[TLS])
    return config.policy


def _security(config: Config, credentials: CredentialStore | None) -> Security:
    insecure = config.daemon.insecure
    if config.tls is None or credentials is None:
        return Security(insecure=insecure)
    return Security(credentials, config.tls.allow, insecure)


def _deferred(result: Any) -> Deferred[Any]:
    if isinstance(result, Deferred):
        return result
    done: Deferred[Any] = Deferred()
    done.callback(result)
    return done


def _private(directory: Path) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def _locked(path: Path) -> IO[bytes]:
    """Return a file that only one process at a time can have.

    A second daemon would take the first one's migrations for interrupted ones.

    :raises SystemExit: another daemon has it.
    """
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(
            f"qmigd: another daemon uses the state directory {path.parent}; stop it first, or "
            f"name another one with 'state-dir' in [daemon]"
        ) from None
    return file


def _conflicts(source: GuestFacts, destination: GuestFacts) -> list[Conflict]:
    return [
        Conflict(features, reason) for features, reason in quirks.conflicts(source, destination)
    ]
