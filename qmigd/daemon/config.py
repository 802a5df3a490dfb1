"""The configuration as the daemon has it: frozen dataclasses, whatever they were read from.

Names of features in ``[policy]`` cannot be checked where the file is, because features are
plugins: :func:`unknown_names` does it when they have been loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import ArgumentError
from ..guests.memory.options import MemoryOptions
from ..interfaces import PATHS
from ..negotiation.allow import Allow
from ..negotiation.policy import Policy
from ..transports.uri import Door, InBandAddress
from . import config_values as values

__all__ = [
    "Config",
    "DaemonConfig",
    "GuestConfig",
    "TlsConfig",
    "default_state_dir",
    "guest_config",
    "unknown_names",
]


@dataclass(frozen=True)
class DaemonConfig:
    """``[daemon]``.

    :ivar listen: where peers connect.
    :ivar monitor: path of the management socket.
    :ivar state_dir: where the daemon keeps what it needs between two runs, and
        the sockets between itself and QEMU.
    :ivar direct_ports: ports that the QEMUs of destinations may listen on; empty
        where none are offered.
    :ivar zero_copy: what moves bytes in a relay: ``measure``, ``off``, or a mover's name.
    :ivar mptcp: connections to and from peers are Multipath TCP where both kernels have it.
    :ivar insecure: peers without TLS are served beyond loopback as well.
    :ivar handshake_deadline: seconds that a peer has for the handshake.
    :ivar peer_deadline: seconds without a sign of life after which a peer is lost.
    :ivar guest_deadline: seconds that a QEMU has for an answer.
    """

    listen: tuple[Door | InBandAddress[Door], ...]
    monitor: str
    state_dir: Path
    direct_ports: range
    zero_copy: str
    mptcp: bool
    insecure: bool
    handshake_deadline: float
    peer_deadline: float
    guest_deadline: float


@dataclass(frozen=True)
class GuestConfig:
    """``[guest.NAME]``: a QEMU that runs, or one that the daemon starts to receive a guest.

    Or a memory guest, which the daemon starts to run, or to receive it.

    :ivar qmp: path of its QMP socket, or ``None``.
    :ivar launch: the command that starts it, or empty.
    :ivar memory: the memory guest, or ``None``.
    :ivar legacy_listen: where it comes in from a QEMU that no qmigd drives, or ``None``.
    """

    name: str
    qmp: str | None = None
    launch: tuple[str, ...] = ()
    legacy_listen: Door | None = None
    memory: MemoryOptions | None = None

    @property
    def command(self) -> tuple[str, ...]:
        """What the daemon starts it with; empty if that is not the daemon's affair."""
        return tuple(self.memory.argv(self.name)) if self.memory is not None else self.launch


@dataclass(frozen=True)
class TlsConfig:
    """``[tls]``: who this host is, whom it believes, and whose guests it takes.

    What is in the files is not looked at here.

    :ivar certificate: of this host, PEM.
    :ivar key: the certificate's, PEM.
    :ivar authority: ``ca``, the CAs that sign hosts' certificates, PEM.
    :ivar allow: which peers may send which guests here.
    """

    certificate: Path
    key: Path
    authority: Path
    allow: Allow = field(default_factory=Allow)


@dataclass(frozen=True)
class Config:
    """The whole file.

    :ivar policy: features and paths that the operator prefers, requires, excludes.
    :ivar tls: certificates; ``None`` where there are none.
    :ivar tls_policy: whether connections to peers are secured; ``"off"`` without
        certificates.
    :ivar source_after: what becomes of the source's QEMU after a good migration.
    """

    daemon: DaemonConfig
    policy: Policy = field(default_factory=Policy)
    tls: TlsConfig | None = None
    tls_policy: values.TlsPolicy = "off"
    source_after: Literal["keep", "quit"] = "keep"
    guests: Mapping[str, GuestConfig] = field(default_factory=dict)


def guest_config(name: str, qmp: str) -> GuestConfig:
    """Check the name and the QMP socket's URI that ``guest-add`` was given.

    :raises ArgumentError: one of them is wrong.
    """
    try:
        values.guest_name(name)
    except values.BadValue as error:
        raise ArgumentError(f"guest-add: {error}.") from None
    try:
        return GuestConfig(name, values.unix_path(qmp))
    except values.BadValue as error:
        raise ArgumentError(f"guest-add: 'qmp' {error}.") from None


def unknown_names(policy: Policy, features: Iterable[str]) -> list[str]:
    """Return the names in a policy that are neither of a feature nor of a path."""
    return list(policy.unknown([*features, *PATHS]))


def default_state_dir(environ: Mapping[str, str], uid: int) -> Path:
    """Return ``/var/lib/qmigd`` for root, and a place of one's own for anybody else."""
    if uid != 0:
        for variable, below in (("XDG_STATE_HOME", "qmigd"), ("HOME", ".local/state/qmigd")):
            if os.path.isabs(base := environ.get(variable, "")):
                return Path(base, below)
    return Path("/var/lib/qmigd")
