"""What a feature is, and what it is given: the one page that a plugin author reads.

A *feature* is something that a migration can use where both ends have it:
several channels, postcopy, a codec over every channel.  It is an object that
provides :class:`IFeature`; :class:`Feature` has an answer for every member, so
that a plugin writes down only what is special about it.  It is found by the
entry-point group ``qmigd.features`` or by a drop-in module in
``twisted/plugins``, and its life in one migration has these moments::

    source daemon                              destination daemon
    -------------                              ------------------
                                               probe_host()      -> offered in the greeting
    probe_host(), probe_guest()  -> selected
    propose()     ---- FEATURE message ---->   probe_guest()
                                               answer()
    accept()      <--- FEATURE message -----
    settings(), channels(),                    settings(), channels(),
    uri(), codec(), mover()                    uri(), codec(), mover()

What :meth:`IFeature.answer` returns is the *agreement*: after
:meth:`IFeature.accept` has seen it, both sides hand the same mapping to
``settings``, ``channels``, ``uri``, ``codec`` and ``mover``.  Whoever has to give the feature up in
between raises :class:`Withdraw` with the reason; the migration goes on without.

A feature does no I/O of its own, keeps no state between migrations, and never
reaches into the daemon.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Literal

from zope.interface import Attribute, Interface, implementer

__all__ = [
    "CONFLICT",
    "COPY",
    "DIRECT",
    "FORMATS",
    "GUEST",
    "HANDOVER",
    "HOST",
    "KERNEL",
    "MAPPED_RAM",
    "MOVERS",
    "PATH",
    "PATHS",
    "PLACES",
    "POLICY",
    "PROCESS",
    "RELAY",
    "STREAM",
    "TCP",
    "TRANSPORTS",
    "ZSTD",
    "Answer",
    "Channels",
    "Feature",
    "GuestFacts",
    "Host",
    "ICodec",
    "IFeature",
    "No",
    "PeerIdentity",
    "Process",
    "RamBlock",
    "Rank",
    "RdmaDevice",
    "Role",
    "Settings",
    "Withdraw",
    "Yes",
    "ZeroCopy",
]

Role = Literal["source", "destination"]

#: The paths that stream bytes can take from QEMU to QEMU (docs/paths).
DIRECT = "direct"
HANDOVER = "handover"
RELAY = "relay"
PATHS = (HANDOVER, DIRECT, RELAY)

#: How daemons can be connected to each other, by the schemes of QEMU's URIs.
TCP = "tcp"
TRANSPORTS = (TCP, "unix", "vsock", "exec", "fd")

#: Where an obstacle is, as users are told.  The first four are on one side: the machine
#: and what is plugged in, its kernel, the guest's process with what it knows, the guest itself.
HOST = "host"
KERNEL = "kernel"
PROCESS = "process"
GUEST = "guest"
POLICY = "policy"
CONFLICT = "conflict"
PATH = "path"
PLACES = (HOST, KERNEL, PROCESS, GUEST, POLICY, CONFLICT, PATH)

#: The ways in which a relay can move bytes from socket to socket (docs/paths).
COPY = "copy"
MOVERS = (COPY, "splice", "zerocopy")

#: What a saved guest's RAM is in a file (docs/saved-guests): each page at a place of its own,
#: QEMU's stream, or that stream compressed.
MAPPED_RAM = "mapped-ram"
STREAM = "stream"
ZSTD = "zstd"
FORMATS = (MAPPED_RAM, STREAM, ZSTD)


@dataclass(frozen=True)
class Yes:
    """The feature can be had."""

    def __bool__(self) -> bool:
        return True


@dataclass(frozen=True)
class No:
    """The feature cannot be had, because ``reason`` (half a sentence, for people).

    ``where`` is one of :data:`PLACES`; ``None`` stands for ``HOST`` in an answer of
    ``probe_host``, and for ``QEMU`` in one of ``probe_guest``.
    """

    reason: str
    where: str | None = None

    def __bool__(self) -> bool:
        return False


Answer = Yes | No


class Withdraw(Exception):
    """Raised in ``propose`` or ``answer``: this migration goes on without the feature.

    :ivar reason: half a sentence for people.
    :ivar where: one of :data:`PLACES`; ``None`` stands for ``QEMU``.
    """

    def __init__(self, reason: str, where: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = where


class Rank(IntEnum):
    """What a feature gains.  Where two exclude each other, the higher one is taken.

    One that is ``ON_REQUEST`` is offered, but taken only if somebody prefers or requires it.
    ``THRIFT`` is CPU time on the way that is taken anyhow: one of these is never a reason
    for another path, unless somebody prefers or requires it.
    """

    ON_REQUEST = 0
    THRIFT = 1
    SPEED = 2
    CERTAINTY = 3
    SECURITY = 4


@dataclass(frozen=True)
class RdmaDevice:
    """An RDMA device of this host."""

    #: The kernel's name for it, ``"mlx5_0"``.
    name: str
    #: The IP addresses of the network interfaces that it serves, each with the length of
    #: its prefix: ``"192.0.2.1/24"``.
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class ZeroCopy:
    """How a relay on this host moves a guest's stream, out of :data:`MOVERS`."""

    #: From QEMU to the network.
    send: str = COPY
    #: From the network to QEMU.
    receive: str = COPY
    #: Why it copies, where it does so both ways.
    obstacle: No = No("it is not known yet whether this host would gain")


@dataclass(frozen=True)
class Host:
    """What a feature may know of the host that its daemon runs on.

    All but ``address`` is gathered once, when the daemon starts, and what takes time to find
    out some time after that.
    """

    #: CPUs that this process may use.
    cpus: int
    #: Whether it has certificates for TLS, and wants it.
    tls: Answer = No("no certificates are configured ([tls] in the daemon's configuration)")
    #: Whether its kernel takes over TLS connections.
    kernel_tls: Answer = No("not looked for")
    #: A directory with the certificates under the names that QEMU's ``tls-creds-x509``
    #: wants; ``None``: there are none.
    tls_directory: str | None = None
    #: The kernel's release, as ``uname -r`` has it.
    kernel: str = ""
    #: The RDMA devices with a port that is up; soft ones (``rdma_rxe``) included.
    rdma: tuple[RdmaDevice, ...] = ()
    #: Whether the kernel lets a TCP socket send without copying (``SO_ZEROCOPY``).
    zero_copy_sockets: bool = False
    #: The most bytes that a TCP socket's send buffer can grow to by itself: the third
    #: number of ``net.ipv4.tcp_wmem``; ``None``: not known.
    tcp_send_buffer: int | None = None
    #: What moves bytes at the least cost in a relay; found out some time after the start.
    zero_copy: ZeroCopy = field(default_factory=ZeroCopy)
    #: Whether connections to and from it are to be Multipath TCP.
    mptcp: Answer = No("not looked for")
    #: The IP address of this host at which the source has reached it; only in ``answer``, and
    #: empty where that was over no IP network.
    address: str = ""


@dataclass(frozen=True)
class RamBlock:
    """A block of a guest's RAM."""

    #: QEMU's name for it, the same on both sides: ``"pc.ram"``.
    name: str
    #: Bytes.
    size: int
    #: Bytes of a page of what backs it: more than the kernel's own are huge pages.
    page_size: int
    #: Whether other processes can share it (``share=on``); ``None``: QEMU does not say.
    shared: bool | None = None
    #: The kind of file system of the file that it is in, ``"ext4"``; ``None``: it is in no
    #: file of its own, or that is not known.
    filesystem: str | None = None


@dataclass(frozen=True)
class Process:
    """What a feature may know of the process of a guest's QEMU."""

    pid: int
    uid: int
    #: Bytes that it may lock in memory (RLIMIT_MEMLOCK, the soft limit); ``None``: no limit,
    #: also because it has CAP_IPC_LOCK.
    memlock: int | None
    #: Whether the system call ``userfaultfd`` gives it one that handles the kernel's faults
    #: too: for CAP_SYS_PTRACE, or with ``vm.unprivileged_userfaultfd`` at 1.
    userfaultfd: bool
    #: Whether it may open ``/dev/userfaultfd``, which gives it one as well.
    userfaultfd_device: bool


@dataclass(frozen=True)
class GuestFacts:
    """What a feature may know of the guest on its own side.

    What cannot be found out is ``None``, or absent, and no reason to refuse anything: the
    QEMU is tried in the end.
    """

    name: str
    #: Which kind of guest: ``"qemu"``, or ``"memory"`` (docs/memory-guest).
    backend: str
    #: The QEMU's version, ``(10, 0, 2)``.
    version: tuple[int, int, int]
    #: The machine type with its version, ``"pc-i440fx-7.2"``.
    machine: str
    #: The migration capabilities that this QEMU knows, by QEMU's names, and whether
    #: each is on at present.
    capabilities: Mapping[str, bool]
    #: The migration parameters that this QEMU knows, with their present values.
    parameters: Mapping[str, Any]
    #: Bytes of RAM, hot-plugged ones included.
    memory: int | None = None
    #: The named blocks of its RAM, by name.
    ram: tuple[RamBlock, ...] = ()
    #: Why this QEMU does not let its guest be moved at all, in its own words.
    blockers: tuple[str, ...] = ()
    #: Types of QEMU's object model that depend on how it was built, and whether this
    #: QEMU has them, or why not: ``"qio-channel-rdma"``, ``"tls-creds-x509"``.
    types: Mapping[str, Answer] = field(default_factory=dict)
    #: Its QEMU's process; ``None`` where it cannot be looked at from here.
    process: Process | None = None


@dataclass(frozen=True)
class Settings:
    """Migration capabilities and parameters of a QEMU, by QEMU's own names.

    :ivar objects: what is to be made with QMP's ``object-add`` beforehand, by its id: the
        other arguments, ``qom-type`` among them.  ``None``: there is no such object.
    """

    capabilities: Mapping[str, bool] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    objects: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    def __or__(self, other: Settings) -> Settings:
        """Both; where both have a name, the other's value."""
        return Settings(
            {**self.capabilities, **other.capabilities},
            {**self.parameters, **other.parameters},
            {**self.objects, **other.objects},
        )

    def __bool__(self) -> bool:
        return bool(self.capabilities or self.parameters or self.objects)


@dataclass(frozen=True)
class PeerIdentity:
    """Whom a migration in TLS is with, as the peer's certificate has shown.

    :ivar hostname: on the source: what the destination's certificate was checked for.
    :ivar subject: the certificate's subject, a distinguished name in the form of RFC 4514.
    """

    hostname: str
    subject: str


@dataclass(frozen=True)
class Channels:
    """Payload channels that a feature adds to ``main``: ``count`` of the same ``name``."""

    name: str
    count: int = 1


class ICodec(Interface):
    """Turns the bytes of one direction of one payload channel into others, and back.

    One object serves one direction of one channel, on one side.  It is called
    outside the reactor's thread.
    """

    def encode(data: memoryview) -> bytes:
        """Turn stream bytes into wire bytes.

        Nothing may be held back: what went in must come out at the peer's
        ``decode`` without a further call, or the guests would wait for each other.
        """

    def finish() -> bytes:
        """Return what the wire still needs after the stream's last byte."""

    def decode(data: memoryview) -> bytes:
        """Turn wire bytes, cut anywhere, into stream bytes.

        :raises ValueError: the bytes are not of this codec; the migration ends.
        """


class IFeature(Interface):
    """One negotiable feature."""

    name = Attribute(
        """The name in the handshake, ``str``: QEMU's capability name where there is
        one, else a short new one; third parties use QAPI's downstream form,
        ``__org.example_thing``.""",
    )
    summary = Attribute("What it does, ``str``: half a sentence for people.")
    requires = Attribute("Features that it cannot do without, ``frozenset[str]``.")
    excludes = Attribute("Features that it cannot be combined with, ``frozenset[str]``.")
    paths = Attribute("The paths that can carry it, ``frozenset[str]`` out of ``PATHS``.")
    paths_with = Attribute(
        """Further paths that can carry it together with another feature, by that one's
        name: ``Mapping[str, frozenset[str]]``.""",
    )
    transports = Attribute(
        """The transports that can carry it, out of ``TRANSPORTS``: ``frozenset[str]``.  It is
        the source's connection to the peer that counts.""",
    )
    avoids = Attribute(
        """Paths out of ``paths`` that are taken only where no other one carries everything,
        or where somebody asks for them: ``frozenset[str]``.""",
    )
    rank = Attribute("What it gains, a :class:`Rank`.")
    abilities = Attribute(
        """What the daemon can do thanks to it, ``frozenset[str]``.  It asks for three:
        ``"postcopy"``; ``"kernel-tls"``, where the host's kernel can take over the TLS
        of a connection; and ``"multipath"``, with which payload channels are Multipath TCP.""",
    )
    formats = Attribute(
        """The formats of a saved guest's file that it goes with, ``frozenset[str]`` out of
        ``FORMATS``.  It then proposes and answers on the same side.""",
    )
    tunables = Attribute(
        """Parameters that both sides must set alike, ``frozenset[str]``: a user's
        value for one goes to ``propose`` and not straight to QEMU.""",
    )
    parameters = Attribute(
        """Parameters that only this feature sets, ``frozenset[str]``: they are no tunables, and a
        user who gives one is told whose it is.""",
    )

    def probe_host(host: Host) -> Answer:
        """Say whether this host can do it; :class:`No` with the reason if not."""

    def probe_guest(guest: GuestFacts, role: Role) -> Answer:
        """Say whether this guest and its QEMU can do it in this role."""

    def paths_for(guest: GuestFacts, host: Host) -> frozenset[str]:
        """Return those of ``paths`` that can carry it on this side, with this guest."""

    def propose(guest: GuestFacts, host: Host, tunables: Mapping[str, Any]) -> dict[str, Any]:
        """Return the source's parameters for the FEATURE message, a JSON object.

        :param tunables: the user's values for the names in ``self.tunables``.
        :raises Withdraw: the migration should go on without this feature.
        """

    def answer(guest: GuestFacts, host: Host, proposal: Mapping[str, Any]) -> dict[str, Any]:
        """Return the agreement: the destination's reply to the source's parameters.

        :raises Withdraw: the migration should go on without this feature.
        :raises ValueError: the proposal makes no sense; the migration ends.
        """

    def accept(proposal: Mapping[str, Any], agreement: Mapping[str, Any]) -> None:
        """Look at the destination's reply, on the source.

        :raises ValueError: it does not follow from the proposal; the migration ends.
        """

    def settings(agreement: Mapping[str, Any], role: Role) -> Settings:
        """Return what has to be set on the QEMU of this side."""

    def settings_direct(
        agreement: Mapping[str, Any], host: Host, role: Role, peer: PeerIdentity
    ) -> Settings:
        """Return what has to be set besides where the QEMUs connect to each other in TLS."""

    def channels(agreement: Mapping[str, Any]) -> Sequence[Channels]:
        """Return the payload channels that it adds, in the order QEMU connects them."""

    def uri(agreement: Mapping[str, Any], host: str, port: int) -> str | None:
        """Return where QEMU is to listen, and to connect to, on the path ``DIRECT``.

        ``None`` stands for ``tcp:HOST:PORT``.  Only one feature in a plan can have a say.

        :param host: the destination's address, as the source has reached it.
        :param port: one of the destination's ``direct-ports``.
        """

    def codec(agreement: Mapping[str, Any]) -> Callable[[], ICodec] | None:
        """Return what makes an :class:`ICodec` for a direction of a channel, or ``None``.

        Only a feature whose ``paths`` is ``{RELAY}`` can have one.
        """

    def mover(agreement: Mapping[str, Any], role: Role) -> str | None:
        """Return how the relay of this side moves the stream, or ``None``: as it likes.

        One of :data:`MOVERS`; with a codec, the relay copies all the same.
        """


@implementer(IFeature)
class Feature:
    """A feature with nothing special about it: the base class for plugins."""

    name: str
    summary: str
    requires: frozenset[str] = frozenset()
    excludes: frozenset[str] = frozenset()
    paths: frozenset[str] = frozenset(PATHS)
    paths_with: Mapping[str, frozenset[str]] = MappingProxyType({})
    transports: frozenset[str] = frozenset(TRANSPORTS)
    avoids: frozenset[str] = frozenset()
    rank: Rank = Rank.SPEED
    abilities: frozenset[str] = frozenset()
    formats: frozenset[str] = frozenset()
    tunables: frozenset[str] = frozenset()
    parameters: frozenset[str] = frozenset()

    def probe_host(self, host: Host) -> Answer:
        return Yes()

    def probe_guest(self, guest: GuestFacts, role: Role) -> Answer:
        return Yes()

    def paths_for(self, guest: GuestFacts, host: Host) -> frozenset[str]:
        return self.paths

    def propose(self, guest: GuestFacts, host: Host, tunables: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def answer(self, guest: GuestFacts, host: Host, proposal: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def accept(self, proposal: Mapping[str, Any], agreement: Mapping[str, Any]) -> None:
        pass

    def settings(self, agreement: Mapping[str, Any], role: Role) -> Settings:
        return Settings()

    def settings_direct(
        self, agreement: Mapping[str, Any], host: Host, role: Role, peer: PeerIdentity
    ) -> Settings:
        return Settings()

    def channels(self, agreement: Mapping[str, Any]) -> Sequence[Channels]:
        return ()

    def uri(self, agreement: Mapping[str, Any], host: str, port: int) -> str | None:
        return None

    def codec(self, agreement: Mapping[str, Any]) -> Callable[[], ICodec] | None:
        return None

    def mover(self, agreement: Mapping[str, Any], role: Role) -> str | None:
        return None
