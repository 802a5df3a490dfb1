"""The destination's side of a move: the connections, and who takes what comes over them.

Connections come in QEMU's order.  The first ones show what they are by the magic that each
begins with: the stream itself, or a multifd channel.  When those are all there, the next is
the one for pages that are waited for (postcopy-preempt), which begins with no magic.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from twisted.logger import Logger

from qmigd.errors import ArgumentError, GuestError, QmigdError
from qmigd.guests.memory.channels import Channel, Lost, by_rdma, listen
from qmigd.guests.memory.landing import Landing
from qmigd.guests.memory.pairing import MAGIC as PAIRING
from qmigd.guests.memory.progress import Progress
from qmigd.guests.memory.receiving import Receiver, Torn
from qmigd.stream import multifd
from qmigd.stream.format import MAGIC

if TYPE_CHECKING:
    from qmigd.guests.memory.machine import Machine

__all__ = ["Incoming"]

#: Seconds that a connection has to show what it is.
_SHOW = 30.0

log = Logger()


class Incoming:
    """One migration."""

    def __init__(self, machine: Machine, source: str | socket.socket, *, stay: bool) -> None:
        """:param stay: the process does not end where the load fails."""
        self.machine = machine
        self.progress = Progress(outgoing=False, on_status=self._on_status)
        self._source = source
        self._stay = stay
        self._listener: socket.socket | None = None
        self._waker = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False
        self._channels: list[Channel] = []
        self._lock = threading.Lock()
        self._receiver = Receiver(machine, self.progress)
        self._threads: list[threading.Thread] = []

    def begin(self) -> None:
        """Listen, and take what comes.

        :raises ArgumentError: nobody can listen there.
        """
        if isinstance(self._source, str):
            try:
                self._listener = listen(self._source)
            except OSError as error:
                raise ArgumentError(
                    f"Failed to listen on {self._source}: {error.strerror or error}"
                ) from None
            self._spawn(self._accept)
        else:
            self._take(Channel(self._source))
        self.progress.become("setup")

    @property
    def alive(self) -> bool:
        return self.progress.status != "none" and any(one.is_alive() for one in self._threads)

    @property
    def latencies(self) -> list[float]:
        """Seconds that the guest has waited for each page that it asked for."""
        return self._receiver.latencies

    def show(self) -> dict[str, Any]:
        return self.progress.show()

    def close(self) -> None:
        """End it at once, with the guest, whose threads may wait for pages."""
        self._closed = True
        self._wake()
        with self._lock:
            for channel in self._channels:
                channel.shut()
        self._receiver.close()
        self._receiver.give_up()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(1.0)
        if not self.alive:
            os.close(self._waker)
            self._waker = -1

    def _wake(self) -> None:
        if self._waker >= 0:
            os.eventfd_write(self._waker, 1)

    def _on_status(self, status: str) -> None:
        self.machine.event("MIGRATION", {"status": status})

    def _spawn(self, target: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name="memory-in", daemon=True)
        self._threads.append(thread)
        thread.start()

    # -- connections

    def _accept(self) -> None:
        """Take connections; a thread of its own."""
        assert self._listener is not None
        settings = self.machine.settings
        missing = {"main"}
        if settings.on("multifd"):
            missing |= {f"multifd {index}" for index in range(settings["multifd-channels"])}
        elif by_rdma(self._source):
            missing.add("rdma")
        preempt = settings.on("postcopy-preempt")
        try:
            while (missing or preempt) and not self.progress.over:
                channel = self._next()
                if channel is None:
                    return
                if missing:
                    magic = self._magic(channel)
                    kind = self._identify(channel, magic)
                    if kind not in missing:
                        raise Lost(f"a connection for {kind} too many")
                    missing.discard(kind)
                    if kind == "main":
                        self._take(channel, magic)
                    elif kind == "rdma":
                        self._spawn(self._land, self._receiver.take_rdma(channel))
                else:
                    preempt = False
                    self._spawn(self._receiver.take_preempt, channel)
        except Lost as error:
            self._failed(f"a connection was not one of this migration: {error}")
        except Exception as error:
            log.failure("connections of {name}", name=self.machine.start.name)
            self._failed(f"the guest's own fault: {error!r}")
        finally:
            self._listener.close()

    def _next(self) -> Channel | None:
        assert self._listener is not None
        if not self._wait(self._listener, None):
            return None
        sock, _ = self._listener.accept()
        channel = Channel(sock)
        with self._lock:
            self._channels.append(channel)
        return channel

    def _wait(self, what: socket.socket, seconds: float | None) -> bool:
        """Whether something has come, before it is over."""
        ready, _, _ = select.select([what.fileno(), self._waker], [], [], seconds)
        return what.fileno() in ready and not self._closed

    def _magic(self, channel: Channel) -> bytes:
        """Take the first four bytes of a connection."""
        end, magic = time.monotonic() + _SHOW, memoryview(bytearray(len(MAGIC)))
        at = 0
        while at < len(magic):
            if not self._wait(channel.sock, max(0.0, end - time.monotonic())):
                raise Lost(f"it sent {at} bytes within {_SHOW:g} s")
            count = channel.receive_some(magic[at:])
            if not count:
                raise Lost(f"it ended after {at} bytes")
            at += count
        return bytes(magic)

    def _identify(self, channel: Channel, magic: bytes) -> str:
        """Return which channel of the migration it is; one of multifd is looked after then."""
        if magic == MAGIC:
            return "main"
        if magic == PAIRING:
            return "rdma"
        if int.from_bytes(magic, "big") != multifd.MAGIC:
            raise Lost(f"it begins with {magic!r}")
        rest = channel.take(multifd.INITIAL_SIZE - len(magic))
        if not rest:
            raise Lost("it ended in its initial packet")
        initial = multifd.read_initial(magic + rest)
        if initial.uuid != self.machine.start.uuid:
            raise Lost("a channel of another guest")
        self._receiver.take_multifd(channel, initial.channel)
        return f"multifd {initial.channel}"

    def _take(self, channel: Channel, begun: bytes = b"") -> None:
        """Take the stream; ``begun`` is what was taken of it already."""
        with self._lock:
            if channel not in self._channels:
                self._channels.append(channel)
        self._spawn(self._load, channel, begun)

    def _land(self, landing: Landing) -> None:
        """Have RAM written to by RDMA; a thread of its own."""
        try:
            landing.serve()
        except (Lost, GuestError) as error:
            self._failed(error.text if isinstance(error, GuestError) else str(error))

    # -- the stream

    def _load(self, channel: Channel, begun: bytes) -> None:
        """Load the stream; a thread of its own."""
        try:
            self._receiver.load(channel, begun)
        except Torn as error:
            self.progress.error = str(error)
            self.progress.become("postcopy-paused")
            return
        except QmigdError as error:
            self._failed(error.text)
        except (Lost, OSError, ValueError) as error:
            self._failed(str(error))
        except Exception as error:
            log.failure("incoming migration of {name}", name=self.machine.start.name)
            self._failed(f"the guest's own fault: {error!r}")
        finally:
            if self.progress.over:
                self._close_channels()

    def _failed(self, reason: str) -> None:
        if self.progress.over or self._closed:
            return
        self.progress.error = f"load of migration failed: {reason}"
        self.progress.become("failed")
        self._close_channels()
        if not self._stay:
            self.machine.failed = self.progress.error
            self.machine.on_end()

    def _close_channels(self) -> None:
        self._wake()
        self._receiver.close()
        with self._lock:
            for channel in self._channels:
                channel.close()
            self._channels.clear()
