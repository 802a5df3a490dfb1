"""The pump: two sockets, and the bytes between them, outside the reactor's thread.

::

    the guest's QEMU  --- outward: encode --->  the peer
       (unix socket)  <--- inward: decode ----  (the wire)

Each direction (:class:`Flow`) has a thread that does nothing but move bytes, in one of
several ways (:mod:`qmigd.channels.movers`); it blocks where there is nothing to read and
where nobody takes what it writes, so that a relay holds no more than one buffer for a
direction.  Its last act is to tell the reactor's thread how it ended.  All that follows
from an end is decided there, in :class:`Pump`:

- the end of a stream is passed on: the other socket is shut for writing, and the
  opposite direction goes on until it ends too;
- a socket that the *guest* lost ends the pump: both are closed;
- a socket that the *peer* lost ends it as well, unless the owner has said ``hold``:
  then the guest's socket stays open, and at most a buffer more is read from it, until
  the owner says :meth:`Pump.abort`.  While ``hold`` lasts, the end of the peer's stream is
  not passed on either, but told to the owner: a daemon that was killed looks like that.

A thread is ended from outside by shutting both sockets, which wakes it wherever it
blocks; descriptors are closed only once no thread can be using them.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Final

from twisted.logger import Logger
from twisted.python.failure import Failure

from qmigd.channels.movers import BUFFER_SIZE, End, copy, mover_for
from qmigd.channels.tls import PeerSocket
from qmigd.interfaces import COPY, ICodec
from qmigd.transports.sockets import set_send_buffer

__all__ = ["BUFFER_SIZE", "SEND_BUFFER", "End", "Flow", "Pump"]

log = Logger()

#: Bytes asked for in front of a slow QEMU (SO_SNDBUF of the unix socket that is written
#: to).  With the kernel's 208 KiB the two sides wake each other for every bit; more than
#: this gains nothing, and what is on its way is what postcopy can lose.  The number comes
#: from tests/bench/relay.py.
SEND_BUFFER: Final = 2 << 20


class Flow:
    """One direction, and its thread.

    :ivar moved: bytes of the guest's stream so far, before encoding and after decoding.
    """

    def __init__(
        self,
        name: str,
        source: PeerSocket,
        sink: PeerSocket,
        report: Callable[[Flow, End], None],
        *,
        mover: str = COPY,
        encoder: ICodec | None = None,
        decoder: ICodec | None = None,
    ) -> None:
        """
        :param report: called in the flow's own thread, as the last thing it does.
        :param mover: how bytes are moved; with a codec they are copied.
        """
        self.moved = 0
        self._source = source
        self._sink = sink
        self._report = report
        self._mover = mover
        self._encoder = encoder
        self._decoder = decoder
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """
        :raises RuntimeError: the system has no thread left.
        """
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread, which has reported already."""
        self._thread.join()

    def _run(self) -> None:
        try:
            end = self._move()
        except ValueError as error:
            end = End("codec", str(error))
        except Exception as error:
            # From a codec as well: the only code in there that is not ours.
            end = End("codec", f"the codec failed: {error!r}", Failure())
        self._report(self, end)

    def _move(self) -> End:
        source, sink = self._source, self._sink
        if self._encoder is None and self._decoder is None:
            return mover_for(self._mover, source, sink)(source, sink, self._count)
        return copy(source, sink, self._count, encoder=self._encoder, decoder=self._decoder)

    def _count(self, size: int) -> None:
        self.moved += size


class Pump:
    """A guest's socket and the peer's, joined.  For the reactor's thread only.

    :ivar hold: keep the guest's socket open when the peer is lost (see above).
    :ivar lost: why the peer counts as lost, or ``None``.
    :ivar ended: why it has ended, once no thread and no descriptor is left of it.
    """

    def __init__(
        self,
        name: str,
        guest: socket.socket,
        wire: PeerSocket,
        *,
        call: Callable[..., object],
        on_lost: Callable[[str], None],
        on_held: Callable[[], None],
        on_end: Callable[[str], None],
        codec: Callable[[], ICodec] | None = None,
        outward: str = COPY,
        inward: str = COPY,
        hold: bool = False,
    ) -> None:
        """
        :param name: of the channel; its threads are called after it.
        :param guest: connected to QEMU; belongs to the pump from now on.
        :param wire: connected to the peer; belongs to the pump from now on.
        :param call: has a function called in the reactor's thread, from any other:
            ``reactor.callFromThread``.
        :param on_lost: gets the reason when the peer is lost, once, before anything
            is closed: it can still say ``hold``.
        :param on_held: told when the end of the peer's stream was not passed on, once.
        :param on_end: gets the reason when it has ended, once.
        :param codec: makes what encodes and decodes, one object for each direction.
        :param outward: the mover from QEMU to the peer, out of
            :data:`~qmigd.interfaces.MOVERS`; where there is a codec, bytes are copied.
        :param inward: the mover from the peer to QEMU.
        """
        self._hold = hold
        self._withheld = False
        self.lost: str | None = None
        self.ended: str | None = None
        self._guest = guest
        self._wire = wire
        self._call = call
        self._on_lost = on_lost
        self._on_held = on_held
        self._on_end = on_end
        self._closing: str | None = None
        self._outward = Flow(
            f"{name} out",
            guest,
            wire,
            self._report,
            mover=outward,
            encoder=codec() if codec else None,
        )
        self._inward = Flow(
            f"{name} in",
            wire,
            guest,
            self._report,
            mover=inward,
            decoder=codec() if codec else None,
        )
        self._running: set[Flow] = set()

    @property
    def sent(self) -> int:
        """Bytes of the guest's stream that went to the peer."""
        return self._outward.moved

    @property
    def received(self) -> int:
        """Bytes of the guest's stream that came from the peer."""
        return self._inward.moved

    def start(self) -> None:
        """Begin.  Whatever goes wrong comes as an end."""
        for end in (self._guest, self._wire):
            end.setblocking(True)
        set_send_buffer(self._guest, SEND_BUFFER)
        for flow in (self._outward, self._inward):
            try:
                flow.start()
            except RuntimeError as error:
                self._close(f"no thread could be started: {error}")
                break
            self._running.add(flow)
        if not self._running:
            self._finish()

    @property
    def hold(self) -> bool:
        """Keep the guest's socket open when the peer is lost (see above)."""
        return self._hold

    @hold.setter
    def hold(self, hold: bool) -> None:
        self._hold = hold
        if hold or self.ended is not None:
            return
        # What the guest was not told, it is told now.
        if self.lost is not None:
            self.abort(self.lost)
        elif self._withheld:
            self._withheld = False
            _shut(self._guest, socket.SHUT_WR)

    def abort(self, reason: str) -> None:
        """Close both sockets now; harmless when it has ended."""
        if self.ended is None:
            self._close(reason)
            if not self._running:
                self._finish()

    # what follows from an end

    def _report(self, flow: Flow, end: End) -> None:
        self._call(self._flow_ended, flow, end)

    def _flow_ended(self, flow: Flow, end: End) -> None:
        # It has reported, which is the last thing it does: this does not wait.
        flow.join()
        self._running.discard(flow)
        if self._closing is None:
            self._follow(flow is self._outward, end)
        if not self._running and (self._closing or not self._held):
            self._finish()

    @property
    def _held(self) -> bool:
        return self.hold and self.lost is not None

    def _follow(self, outward: bool, end: End) -> None:
        if end.what == "eof":
            if outward and self.lost is not None:
                self._close("the guest's process closed its end, after the peer was lost")
            elif outward:
                _shut(self._wire, socket.SHUT_WR)
            elif not self.hold:
                _shut(self._guest, socket.SHUT_WR)
            elif self.lost is None:
                self._withheld = True
                self._on_held()
        elif end.what == "codec":
            if end.mistake is not None:
                log.failure("a codec failed", failure=end.mistake)
            what = "the guest sent could not be encoded"
            if not outward:
                what = "the peer sent could not be decoded"
            self._lose(f"what {what}: {end.text}")
        elif (end.what == "source") == outward:
            self._close(f"the guest's process closed its end: {end.text}")
        else:
            self._lose(f"the peer closed its end: {end.text}")

    def _lose(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
            self._on_lost(reason)
        if self._closing is not None:
            return
        if self.hold:
            # Whoever still reads from the peer or writes to it is woken.
            _shut(self._wire, socket.SHUT_RDWR)
        else:
            self._close(reason)

    def _close(self, reason: str) -> None:
        if self._closing is None:
            self._closing = reason
        _shut(self._guest, socket.SHUT_RDWR)
        _shut(self._wire, socket.SHUT_RDWR)

    def _finish(self) -> None:
        self._guest.close()
        self._wire.close()
        self.ended = self._closing or "both ends have said all"
        self._on_end(self.ended)


def _shut(sock: PeerSocket, how: int) -> None:
    # Its other end may have gone already.
    with contextlib.suppress(OSError):
        sock.shutdown(how)
