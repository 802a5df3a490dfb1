"""RDMA through pyverbs: a queue pair on the port that serves an address, and its memory.

pyverbs is rdma-core's, and comes with the distribution (Debian: ``python3-pyverbs``), built
for its Python.  It is taken from there for itself alone: nothing else in a virtual
environment sees the distribution's packages.

A queue pair here is reliable (RC): what is posted is done in order, or it is an error, and
everything after that is one as well.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import ipaddress
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any, NamedTuple

from qmigd.errors import GuestError
from qmigd.guests import process
from qmigd.guests.memory import roce
from qmigd.guests.memory.channels import Lost
from qmigd.guests.memory.pairing import Endpoint
from qmigd.interfaces import Answer, No, Yes

__all__ = ["DEPTH", "Link", "Piece", "load", "usable"]

#: Where a distribution has the modules of its own Python.
_DISTRIBUTION = ("/usr/lib/python3/dist-packages", "/usr/lib64/python3/site-packages")
_MODULES = ("addr", "cq", "device", "enums", "fork", "mr", "pd", "pyverbs_error", "qp", "wr")

#: Requests that may be under way at once; and signals of the other side that can be received.
DEPTH = 256
_SIGNALS = 2

#: How long is waited for an acknowledgement before it is sent again, and how often: 67 ms
#: (4.096 us * 2^14) and 7 times.  Some devices wait for up to four times that long.
_TIMEOUT, _RETRIES = 14, 7
#: The same where the other side had posted no receive, which does not happen: 6 times 0.64 ms.
_RNR_TIMER, _RNR_RETRIES = 12, 6
_HOPS = 64

#: Bytes that are locked besides the RAM: the queues.
_QUEUES = 1 << 20

#: Where this process's descriptors are, and what the kernel calls those of completion channels
#: and of devices' own events (drivers/infiniband/core/uverbs_std_types.c).
_DESCRIPTORS = "/proc/self/fd"
_EVENTS = "anon_inode:[infinibandevent]"

#: For as long as something is being opened that may have such a descriptor.
_opening = threading.Lock()

#: What the statuses of requests mean (enum ibv_wc_status); others are rarer.
_FAILURES = {
    "IBV_WC_LOC_QP_OP_ERR": "the device cannot send",
    "IBV_WC_REM_ACCESS_ERR": "the other side does not let it write there",
    "IBV_WC_RETRY_EXC_ERR": "the other side acknowledges nothing",
    "IBV_WC_WR_FLUSH_ERR": "the queue pair has failed before",
}


class Piece(NamedTuple):
    """Neighbouring bytes, here and at the other side, with the keys of their memory."""

    here: int
    local_key: int
    there: int
    remote_key: int
    size: int


@functools.cache
def load() -> ModuleType:
    """Import pyverbs, with all that is used of it.

    :raises ImportError: there is none, or none for this Python.
    """
    with contextlib.suppress(ImportError):
        return _modules(importlib.import_module("pyverbs"))
    spec = PathFinder.find_spec("pyverbs", _DISTRIBUTION)
    if spec is None or spec.loader is None:
        raise ImportError("it finds no pyverbs: install python3-pyverbs")
    package = importlib.util.module_from_spec(spec)
    sys.modules["pyverbs"] = package
    try:
        spec.loader.exec_module(package)
        return _modules(package)
    except ImportError as error:
        del sys.modules["pyverbs"]
        version = ".".join(map(str, sys.version_info[:2]))
        raise ImportError(
            f"the pyverbs of this host is not for its Python, which is {version} ({error})"
        ) from None


def _modules(package: ModuleType) -> ModuleType:
    for name in _MODULES:
        importlib.import_module(f"pyverbs.{name}")
    # Before anything else: where a process forks, the device goes on with the parent's memory.
    fork: Any = package.fork
    if not fork.is_fork_initialized():
        fork.fork_init()
    return package


def usable(size: int) -> Answer:
    """Say whether this process can do RDMA.

    :param size: of the RAM that it has to lock.
    """
    devices = roce.devices()
    if not devices:
        return No("its host has no RDMA device with RoCE v2 and a port that is up")
    try:
        verbs: Any = load()
    except ImportError as error:
        return No(str(error))
    for device in devices:
        try:
            with _opening:
                verbs.device.Context(name=device).close()
        except verbs.pyverbs_error.PyverbsError as error:
            return No(f"it cannot open the RDMA device {device}: {error}")
    seen = process.look(os.getpid(), os.getpid())
    limit, needed = seen.memlock if seen is not None else None, size + _QUEUES
    if limit is not None and limit < needed:
        return No(
            f"its locked-memory limit is {limit >> 20} MiB, and {-(-needed >> 20)} MiB are needed:"
            " raise it with 'ulimit -l', or LimitMEMLOCK= in a systemd unit, before it is started"
        )
    return Yes()


def _event_descriptors() -> set[int]:
    """Return this process's descriptors that devices' events come from."""
    found = set()
    for name in os.listdir(_DESCRIPTORS):
        # That of the listing itself is closed by now.
        with contextlib.suppress(OSError):
            if os.readlink(os.path.join(_DESCRIPTORS, name)) == _EVENTS:
                found.add(int(name))
    return found


class Link:
    """A queue pair, and the memory that it reads and writes; for one thread at a time.

    :ivar endpoint: what the other side has to know of it.
    """

    def __init__(self, address: str) -> None:
        """:param address: the IP address of this side.
        :raises GuestError: no device serves it, or none that can be used.
        """
        port = roce.of(address)
        if port is None:
            raise GuestError(f"no RDMA device serves {address} by RoCE v2")
        try:
            self._verbs: Any = load()
        except ImportError as error:
            raise GuestError(f"no RDMA: {error}") from None
        self._port = port
        self._open: list[Any] = []  # in the order in which it was made
        self._pair: Any = None
        self._armed = False  # the next completion makes an event
        try:
            with _opening, self._told(f"the RDMA device {port.device} cannot be used"):
                self._set_up()
        except GuestError:
            self.close()
            raise

    def _set_up(self) -> None:
        verbs, enums = self._verbs, self._verbs.enums
        context = self._keep(verbs.device.Context(name=self._port.device))
        self._domain = self._keep(verbs.pd.PD(context))
        others = _event_descriptors()
        self._events = self._keep(verbs.cq.CompChannel(context))
        # pyverbs keeps the descriptor to itself, and has the interpreter's lock while it waits.
        found = _event_descriptors() - others
        if len(found) != 1:
            raise GuestError(
                f"the RDMA device {self._port.device} cannot be used: {_DESCRIPTORS} does not show"
                " the completion channel's descriptor"
            )
        (self._descriptor,) = found
        self._queue = self._keep(verbs.cq.CQ(context, DEPTH + 2 * _SIGNALS, None, self._events, 0))
        room = verbs.qp.QPCap(DEPTH + _SIGNALS, _SIGNALS, 1, 1, 0)
        start = verbs.qp.QPInitAttr(enums.IBV_QPT_RC, scq=self._queue, rcq=self._queue, cap=room)
        self._attributes = verbs.qp.QPAttr()
        self._attributes.port_num = self._port.number
        self._attributes.qp_access_flags = enums.IBV_ACCESS_REMOTE_WRITE
        # Up to INIT.
        self._pair = self._keep(verbs.qp.QP(self._domain, start, self._attributes))
        # A signal has a byte in it, since pyverbs sends nothing that is empty.
        memory = self._keep(verbs.mr.MR(self._domain, 1, enums.IBV_ACCESS_LOCAL_WRITE))
        self._byte = verbs.wr.SGE(memory.buf, 1, memory.lkey)
        for _ in range(_SIGNALS):
            self._expect()
        self.endpoint = Endpoint(
            qpn=self._pair.qp_num,
            psn=secrets.randbits(24),
            gid=self._port.gid,
            mtu=context.query_port(self._port.number).active_mtu,
        )

    def connect(self, peer: Endpoint) -> None:
        """Make it ready to receive from the other one, and to send to it.

        :raises GuestError: the device refuses.
        """
        verbs, attributes = self._verbs, self._attributes
        route = verbs.addr.GlobalRoute(
            dgid=verbs.addr.GID(ipaddress.IPv6Address(peer.gid).exploded),
            sgid_index=self._port.index,
            hop_limit=_HOPS,
        )
        attributes.ah_attr = verbs.addr.AHAttr(
            gr=route, is_global=1, port_num=self._port.number, dlid=0
        )
        attributes.path_mtu = min(self.endpoint.mtu, peer.mtu)
        attributes.dest_qp_num, attributes.rq_psn = peer.qpn, peer.psn
        attributes.sq_psn = self.endpoint.psn
        attributes.max_rd_atomic = attributes.max_dest_rd_atomic = 1
        attributes.timeout, attributes.retry_cnt = _TIMEOUT, _RETRIES
        attributes.min_rnr_timer, attributes.rnr_retry = _RNR_TIMER, _RNR_RETRIES
        with self._told("the queue pair cannot be connected"):
            self._pair.to_rts(attributes)

    # -- memory

    def lend(self, address: int, size: int) -> int:
        """Lock memory for the other side to write to, and return the key for it.

        :raises GuestError: it cannot be.
        """
        enums = self._verbs.enums
        return int(
            self._register(
                address, size, enums.IBV_ACCESS_LOCAL_WRITE | enums.IBV_ACCESS_REMOTE_WRITE
            ).rkey
        )

    def use(self, address: int, size: int) -> int:
        """Lock memory to write from, and return the key for it.

        :raises GuestError: it cannot be.
        """
        return int(self._register(address, size, 0).lkey)

    def _register(self, address: int, size: int, access: int) -> Any:
        with self._told(f"{size >> 10} KiB of RAM cannot be registered"):
            return self._keep(self._verbs.mr.MR(self._domain, size, access, address))

    # -- requests

    def write(self, pieces: Sequence[Piece], mark: int) -> None:
        """Write to the other side; no more than :data:`DEPTH` pieces are to be under way.

        :param mark: what :meth:`wait` returns when all of them have been written.
        :raises Lost: the queue pair is broken.
        """
        wr, enums = self._verbs.wr, self._verbs.enums
        last = len(pieces) - 1
        with self._broken():
            for number, piece in enumerate(pieces):
                request = wr.SendWR(
                    wr_id=mark,
                    opcode=enums.IBV_WR_RDMA_WRITE,
                    num_sge=1,
                    sg=[wr.SGE(piece.here, piece.size, piece.local_key)],
                    send_flags=enums.IBV_SEND_SIGNALED if number == last else 0,
                )
                request.set_wr_rdma(piece.remote_key, piece.there)
                self._pair.post_send(request)

    def signal(self, mark: int) -> None:
        """Tell the other side that all that was written before is there.

        Only with this, and not by the completion of a write alone, is it certain that the
        other side's CPU finds it in its memory (InfiniBand Architecture Specification, o9-20).
        """
        wr, enums = self._verbs.wr, self._verbs.enums
        with self._broken():
            flags = enums.IBV_SEND_SIGNALED
            self._pair.post_send(wr.SendWR(mark, enums.IBV_WR_SEND, 1, 0, [self._byte], flags))

    def wait(
        self, connection: socket.socket, seconds: float | None = None
    ) -> tuple[list[int], int]:
        """Wait for the device; returns the marks of what is done, and how many signals came.

        There are none of either only where the connection has ended, or the time is over.

        :param connection: ends the wait when either side shuts it down.
        :raises Lost: something failed, and with it everything after it.
        """
        end = None if seconds is None else time.monotonic() + seconds
        poller = select.poll()
        poller.register(self._descriptor, select.POLLIN)
        poller.register(connection, select.POLLRDHUP)
        while not any(found := self._poll()):
            if not self._armed:
                # What is done before this makes no event, and is looked for once more.
                with self._broken():
                    self._queue.req_notify()
                self._armed = True
                continue
            left = None if end is None else max(0.0, end - time.monotonic()) * 1000
            ready = [descriptor for descriptor, _ in poller.poll(left)]
            if self._descriptor in ready:
                with self._broken():
                    self._events.get_cq_event(self._queue)
                self._queue.ack_events(1)
                self._armed = False
            else:
                return self._poll()
        return found

    def _poll(self) -> tuple[list[int], int]:
        done, came = [], 0
        with self._broken():
            _, found = self._queue.poll(DEPTH)
        for one in found:
            if one.status != self._verbs.enums.IBV_WC_SUCCESS:
                raise Lost(f"RDMA failed: {self._status(one.status)}")
            if one.opcode & self._verbs.enums.IBV_WC_RECV:
                came += 1
                self._expect()
            else:
                done.append(int(one.wr_id))
        return done, came

    def _status(self, status: int) -> str:
        enums = self._verbs.enums
        names = {
            getattr(enums, name): name
            for name in vars(enums)
            if name.startswith("IBV_WC_") and name.endswith("_ERR")
        }
        name = names.get(status, f"status {status}")
        return _FAILURES.get(name, name)

    def _expect(self) -> None:
        with self._broken():
            self._pair.post_recv(self._verbs.wr.RecvWR(0, 1, [self._byte]))

    # -- the end

    def close(self) -> None:
        """Give everything back: nobody reads or writes the memory from here on."""
        if self._pair is not None:
            self._open.append(self._pair)
        while self._open:
            with contextlib.suppress(self._verbs.pyverbs_error.PyverbsError):
                self._open.pop().close()

    def _keep(self, made: Any) -> Any:
        self._open.append(made)
        return made

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._verbs.pyverbs_error.PyverbsError as error:
            raise GuestError(f"{what}: {error}") from None

    @contextlib.contextmanager
    def _broken(self) -> Iterator[None]:
        try:
            yield
        except self._verbs.pyverbs_error.PyverbsError as error:
            raise Lost(f"RDMA failed: {error}") from None
