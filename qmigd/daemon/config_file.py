"""The configuration file: TOML in, a :class:`~qmigd.daemon.config.Config` out, all of it checked.

The file is checked as a whole, and all that is wrong with it is said at once,
each problem with its key and, where it can be known, its line.  Every key has a
default, so that an empty file is a good one.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..api import default_socket, nearest
from ..errors import ConfigError
from ..negotiation.allow import Allow
from ..negotiation.policy import Policy
from ..transports.uri import Door, InBandAddress, TcpAddress, UnixAddress, bare
from . import config_values as values
from .config import Config, DaemonConfig, GuestConfig, TlsConfig, default_state_dir
from .legacy_ports import objection
from .toml_lines import Key, find_lines, syntax_error_line

__all__ = ["load", "parse"]


def load(path: str, environ: Mapping[str, str], uid: int) -> Config:
    """Read and check a file.

    :param environ: the process's environment.
    :param uid: the process's user, on whom the default paths depend.
    :raises ConfigError: the file cannot be read, or something in it is wrong.
    """
    try:
        text = Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"There is no configuration file {path}; conf/qmigd.toml of the distribution "
            f"is one to begin with."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 from byte {error.start} on.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    return parse(text, path, environ, uid)


def parse(text: str, source: str, environ: Mapping[str, str], uid: int) -> Config:
    """Check the text of a file.

    :param source: what the file is called in errors.
    :raises ConfigError: something is wrong; the text has everything that is.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = syntax_error_line(error)
        where = f", line {line}" if line else ""
        raise ConfigError(f"{source}{where}: this is not TOML: {error}.") from None
    reader = _Reader(document, environ, uid)
    config = reader.config()
    if reader.problems:
        raise ConfigError(_report(source, reader.problems, find_lines(text)))
    return config


def _report(source: str, problems: Sequence[tuple[Key, str]], lines: Mapping[Key, int]) -> str:
    found = []
    for key, sentence in problems:
        # what is missing has no line of its own: its table's will do
        line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), 0)
        found.append((line, sentence if sentence.endswith("?") else f"{sentence}."))
    found.sort()
    if len(found) == 1:
        line, sentence = found[0]
        return f"{source}{f', line {line}' if line else ''}: {sentence}"
    said = [f"line {line}: {sentence}" if line else sentence for line, sentence in found]
    return "\n  ".join([f"{source} has {len(said)} problems:", *said])


_Read = Callable[[Any], Any]

_DAEMON: Mapping[str, _Read] = {
    "listen": values.listen,
    "monitor": values.unix_path,
    "state-dir": values.path,
    "direct-ports": values.ports,
    "listen-group": values.group,
    "zero-copy": values.zero_copy,
    "mptcp": values.flag,
    "insecure": values.flag,
    "handshake-deadline": values.seconds,
    "peer-deadline": values.seconds,
    "guest-deadline": values.seconds,
}
_POLICY: Mapping[str, _Read] = {
    "prefer": values.names,
    "require": values.names,
    "exclude": values.names,
    "tls": values.tls_policy,
    "legacy": values.legacy,
    "source-after": values.source_after,
}
_TLS: Mapping[str, _Read] = {
    "certificate": values.path,
    "key": values.path,
    "ca": values.path,
    "allow": values.allow,
}
_GUEST: Mapping[str, _Read] = {
    "qmp": values.unix_path,
    "launch": values.launch,
    "memory": values.memory,
    "legacy-listen": values.door,
}
_TABLES = ("daemon", "tls", "policy", "guest")


class _Reader:
    """Reads a document, and collects what is wrong with it."""

    def __init__(self, document: dict[str, Any], environ: Mapping[str, str], uid: int) -> None:
        self._document = document
        self._environ = environ
        self._uid = uid
        self.problems: list[tuple[Key, str]] = []

    def config(self) -> Config:
        """Return what could be read; of no use if there are problems."""
        for name in self._document:
            if name not in _TABLES:
                self._problem((name,), f"there is nothing called '{name}'{nearest(name, _TABLES)}")
        policy = self._section(("policy",), _POLICY)
        lists = {name: policy.get(name, ()) for name in ("prefer", "require", "exclude")}
        for name in lists["exclude"]:
            for other in ("prefer", "require"):
                if name in lists[other]:
                    self._problem(
                        ("policy", "exclude"), f"[policy] has '{name}' in {other} and in exclude"
                    )
        tls = self._tls()
        tls_policy = self._tls_policy(policy.get("tls"), lists, tls)
        daemon = self._daemon()
        self._check_listen(daemon, secured=tls_policy != "off")
        legacy = policy.get("legacy", "refuse")
        if legacy == "allow" and tls_policy == "require":
            self._problem(
                ("policy", "legacy"),
                '[policy] has legacy = "allow", but TLS is required, and QEMU\'s plain stream has '
                "none",
            )
        config = Config(
            daemon,
            Policy(**lists, legacy=legacy),
            tls,
            tls_policy,
            policy.get("source-after", "keep"),
            self._guests(),
        )
        for guest in config.guests.values():
            self._check_legacy_listen(config, guest, guest.legacy_listen)
        return config

    def _tls(self) -> TlsConfig | None:
        found = self._section(("tls",), _TLS)
        given = self._table(("tls",), "[tls]")
        if not given:
            return None
        for name in ("certificate", "key", "ca"):
            if name not in given:
                self._problem(
                    ("tls",),
                    f"[tls] needs {name}: certificate, key and ca go together; 'qmigctl pki' "
                    f"makes all three",
                )
        nowhere = Path()  # of no use: there are problems
        return TlsConfig(
            found.get("certificate", nowhere),
            found.get("key", nowhere),
            found.get("ca", nowhere),
            found.get("allow", Allow()),
        )

    def _tls_policy(
        self,
        given: values.TlsPolicy | None,
        lists: Mapping[str, Sequence[str]],
        tls: TlsConfig | None,
    ) -> values.TlsPolicy:
        """Return what holds: of the key, of the lists that can say the same, or by default."""
        key: Key = ("policy", "tls")
        meanings: Mapping[str, values.TlsPolicy] = {"require": "require", "exclude": "off"}
        said = [name for name in meanings if "tls" in lists[name]]
        if len(said) == 1:  # in both: that is a problem already
            meaning = meanings[said[0]]
            if given is None:
                given, key = meaning, ("policy", said[0])
            elif given != meaning:
                self._problem(
                    key, f"[policy] has tls = \"{given}\", and 'tls' in {said[0]}; say it once"
                )
        if given is None:
            return "prefer" if tls else "off"
        if given != "off" and tls is None:
            self._problem(
                key,
                f"[policy] asks for TLS ({given}), but there are no certificates: name them in "
                f"[tls]; 'qmigctl pki' makes some",
            )
        return given

    def _daemon(self) -> DaemonConfig:
        found = self._section(("daemon",), _DAEMON)
        mptcp, group = found.get("mptcp", False), found.get("listen-group")
        listen = found.get("listen", values.listen([values.LISTEN]))
        return DaemonConfig(
            listen=tuple(_open(door, mptcp, group) for door in listen),
            monitor=found.get("monitor", default_socket(self._environ, self._uid)[len("unix:") :]),
            state_dir=found.get("state-dir", default_state_dir(self._environ, self._uid)),
            direct_ports=found.get("direct-ports", values.ports(values.PORTS)),
            zero_copy=found.get("zero-copy", values.MEASURE),
            mptcp=mptcp,
            insecure=found.get("insecure", False),
            handshake_deadline=found.get("handshake-deadline", 10.0),
            peer_deadline=found.get("peer-deadline", 10.0),
            guest_deadline=found.get("guest-deadline", 10.0),
        )

    def _check_listen(self, daemon: DaemonConfig, *, secured: bool) -> None:
        grouped = self._table(("daemon",), "[daemon]").get("listen-group")
        if grouped and not any(isinstance(bare(door), UnixAddress) for door in daemon.listen):
            self._problem(
                ("daemon", "listen-group"),
                "[daemon] listen-group is for unix sockets, and there is none in listen",
            )
        for address in daemon.listen:
            place = bare(address)
            if not (daemon.insecure or secured or place.is_loopback):
                self._problem(
                    ("daemon", "listen"),
                    f'[daemon] listen has "{address}", which other hosts can reach, and there is '
                    f"no TLS: everybody on the way could read a guest's RAM, and anybody could "
                    f"send a guest. Name certificates in [tls] ('qmigctl pki' makes them), listen "
                    f"on a loopback address or, in a network that only hypervisors can reach, say "
                    f"'insecure = true'",
                )
            if not isinstance(place, UnixAddress) and place.port in daemon.direct_ports:
                self._problem(
                    ("daemon", "direct-ports"),
                    f"[daemon] direct-ports has {place.port} in it, where the daemon listens",
                )

    def _guests(self) -> dict[str, GuestConfig]:
        guests = {}
        owners: dict[str, str] = {}
        for name, section in self._table(("guest",), "[guest.NAME]").items():
            key = ("guest", name)
            try:
                values.guest_name(name)
            except values.BadValue as error:
                self._problem(key, f"[guest] {error}")
            found = self._section(key, _GUEST)
            kinds = {"qmp", "launch", "memory"}
            if isinstance(section, dict) and len(kinds & section.keys()) != 1:
                self._problem(
                    key,
                    f"{_title(key)} needs exactly one of qmp, the socket of a QEMU that runs, "
                    f"launch, the command that starts one to receive a guest, and memory, a guest "
                    f"without a QEMU",
                )
            guest = GuestConfig(
                name,
                found.get("qmp"),
                found.get("launch", ()),
                found.get("legacy-listen"),
                found.get("memory"),
            )
            if guest.qmp is not None and owners.setdefault(guest.qmp, name) != name:
                self._problem(
                    (*key, "qmp"),
                    f"{_title(key)} has the QMP socket of [guest.{owners[guest.qmp]}]; it is "
                    f"one process, and one guest",
                )
            if guest.launch and not shutil.which(guest.launch[0], path=self._environ.get("PATH")):
                self._problem(
                    (*key, "launch"),
                    f"{_title(key)} launch: there is no program '{guest.launch[0]}'",
                )
            guests[name] = guest
        return guests

    def _check_legacy_listen(
        self, config: Config, guest: GuestConfig, address: Door | None
    ) -> None:
        if address is None:
            return
        title, key = _title(("guest", guest.name)), ("guest", guest.name, "legacy-listen")
        reason = objection(
            address,
            tls_required=config.tls_policy == "require",
            allow=config.tls is not None and config.tls.allow.entries is not None,
            insecure=config.daemon.insecure,
            listen=config.daemon.listen,
            direct_ports=config.daemon.direct_ports,
            others=[
                (_title(("guest", other.name)), other.legacy_listen)
                for other in config.guests.values()
                if other is not guest
            ],
        )
        if reason is not None:
            self._problem(key, f'{title} legacy-listen "{address}": {reason}')

    def _table(self, key: Key, title: str) -> dict[str, Any]:
        value: Any = self._document
        for part in key:
            value = value.get(part, {}) if isinstance(value, dict) else {}
        if isinstance(value, dict):
            return value
        self._problem(key, f"'{'.'.join(key)}' must be a table {title}, not {values.kind(value)}")
        return {}

    def _section(self, key: Key, readers: Mapping[str, _Read]) -> dict[str, Any]:
        """Return what could be read of a table, by its keys."""
        found = {}
        for name, value in self._table(key, _title(key)).items():
            if name not in readers:
                others = nearest(name, readers) or f"; there are {', '.join(readers)}"
                self._problem((*key, name), f"{_title(key)} has no key '{name}'{others}")
                continue
            try:
                found[name] = readers[name](value)
            except values.BadValue as error:
                self._problem((*key, name), f"{_title(key)} {name} {error}")
        return found

    def _problem(self, key: Key, sentence: str) -> None:
        self.problems.append((key, sentence))


def _open(
    door: Door | InBandAddress[Door], mptcp: bool, group: str | None
) -> Door | InBandAddress[Door]:
    """Return where to listen, in the way that other keys ask for."""
    if isinstance(door, InBandAddress):
        return InBandAddress(_open_place(door.inner, mptcp, group))
    return _open_place(door, mptcp, group)


def _open_place(door: Door, mptcp: bool, group: str | None) -> Door:
    if isinstance(door, TcpAddress):
        return replace(door, mptcp=mptcp or door.mptcp)
    return replace(door, group=group) if isinstance(door, UnixAddress) else door


def _title(key: Key) -> str:
    return f"[{'.'.join(key)}]"
