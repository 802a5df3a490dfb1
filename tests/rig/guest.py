"""A QEMU that runs the rig's guest, with everything that a test wants to know of it.

It has **two QMP monitors**, since a QMP socket serves one client at a time: one
at :attr:`Guest.qmp_path` for qmigd, the other for the test.  The test's monitor
and the serial port are connections that QEMU makes to the rig as it starts, so
that nothing has to be waited for by trying, and so that a QEMU that qmigd itself
has launched reports here just the same.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import socket
import struct
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.rig.bootsector import Program, Window, check, image
from tests.rig.netns import Namespace
from tests.rig.news import DEADLINE, tell, wait_until
from tests.rig.process import Process, temporary_directory
from tests.rig.qemus import Qemu
from tests.rig.qmp import Lost, QmpClient, QmpError

__all__ = ["MACHINE", "Guest", "GuestDied", "Line"]

#: The machine type that every QEMU of :mod:`tests.rig.qemus` has.
MACHINE = "pc-i440fx-7.2"

#: The guest of the tests, if they do not name another: both ends have to agree.
_UUID = uuid.UUID("5d3c9a52-7d0e-4a57-9a11-6b1f9f0d7a01")


class GuestDied(Exception):
    """QEMU ended; the text has the end of what it printed."""


@dataclass(frozen=True)
class Line:
    """A line from the serial port.

    :ivar tick: its number.
    :ivar seen: when it was read, ``time.monotonic()``.
    """

    tick: int
    seen: float


class Guest:
    """One QEMU with the rig's guest; a context manager that closes it.

    :ivar name: what messages call it.
    :ivar qmp_path: the unix socket of the monitor for qmigd.
    :ivar directory: its own, removed by :meth:`close`.
    """

    def __init__(
        self,
        qemu: Qemu,
        name: str = "guest",
        *,
        incoming: bool | str = False,
        machine: str = MACHINE,
        memory: int = 64,
        program: Program | None = None,
        paused: bool = False,
        identity: uuid.UUID = _UUID,
        loaded: tuple[int, bytes] | None = None,
        extra: Sequence[str] = (),
        namespace: Namespace | None = None,
    ) -> None:
        """Prepare a guest; :meth:`start` starts it.

        :param incoming: wait for a migration: ``True`` for ``defer``, or a URI.
        :param memory: MiB.
        :param paused: do not run by itself, neither from the start nor after an
            incoming migration (``-S``).
        :param loaded: an address, and bytes that are in its RAM there from the start.
        :param extra: further arguments for QEMU.
        :param namespace: where QEMU's network is, if not here.
        """
        self.name = name
        self.qemu = qemu
        self.program = program or Program()
        self.memory = memory << 20
        if self.program.end > self.memory - (1 << 20):
            raise ValueError("The window reaches into the last MiB, which is the firmware's.")
        self.lines: list[Line] = []
        self.directory = temporary_directory()
        self.qmp_path = os.path.join(self.directory, "qmp")
        self._incoming = "defer" if incoming is True else incoming
        self._machine = machine
        self._paused = paused
        self._identity = identity
        self._extra = tuple(extra)
        self._prefix = namespace.prefix if namespace else ()
        self._process: Process | None = None
        self._monitor: QmpClient | None = None
        self._failure: Exception | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._image = os.path.join(self.directory, "boot")
        with open(self._image, "wb") as file:
            file.write(image(self.program))
        if loaded:
            at, content = loaded
            path = os.path.join(self.directory, "loaded")
            with open(path, "wb") as file:
                file.write(content)
            self._extra += ("-device", f"loader,file={path},addr={at:#x},force-raw=on")
        self._listeners = {kind: self._listen(kind) for kind in ("rig", "serial")}
        self._stop, self._stopped = socket.socketpair()
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, name=f"guest {name}", daemon=True)
        self._thread.start()

    # -- its command line ---------------------------------------------------------

    @property
    def launch(self) -> list[str]:
        """The command line for ``launch`` in qmigd's configuration.

        qmigd adds its QMP socket and ``-incoming``.
        """
        argv = [*self.qemu.argv, "-name", self.name, "-uuid", str(self._identity)]
        argv += ["-M", self._machine, "-accel", "tcg", "-m", str(self.memory >> 20)]
        argv += ["-nodefaults", "-no-user-config", "-display", "none"]
        argv += ["-drive", f"if=floppy,format=raw,readonly=on,file={self._image}"]
        for kind in self._listeners:
            argv += ["-chardev", f"socket,id={kind},path={self._path(kind)}"]
        argv += ["-serial", "chardev:serial", "-mon", "chardev=rig,mode=control"]
        if self._paused:
            argv += ["-S"]
        return [*argv, *self._extra]

    @property
    def argv(self) -> list[str]:
        """The whole command line."""
        argv = [*self._prefix, *self.launch]
        argv += ["-chardev", f"socket,id=qmigd,path={self.qmp_path},server=on,wait=off"]
        argv += ["-mon", "chardev=qmigd,mode=control"]
        if self._incoming:
            argv += ["-incoming", self._incoming]
        return argv

    # -- its life -----------------------------------------------------------------

    def start(self) -> Guest:
        """Start QEMU; a guest that runs by itself has booted and begun to count.

        :raises GuestDied: QEMU ended at once.
        """
        with self._lock:
            self._process = Process.start(self.argv, log=self._path("log"))
        self.wait_for_monitor()
        if not self._incoming and not self._paused:
            self.wait_ticks(1)
        return self

    def wait_for_monitor(self, deadline: float = DEADLINE) -> None:
        """Wait until QEMU, started here or launched by a daemon, has reported.

        :raises GuestDied: it ended first.
        """

        def look() -> bool:
            if self._failure is not None:
                raise self._failure
            if self._process is not None and not self._process.running:
                raise GuestDied(self._obituary())
            return self._monitor is not None

        wait_until(look, f"QEMU of {self.name} to report", deadline=deadline)

    @property
    def alive(self) -> bool:
        """Whether there is a QEMU process."""
        return self._process is not None and self._process.running

    @property
    def process(self) -> Process:
        """The QEMU process, once it has reported."""
        if self._process is None:
            raise GuestDied(f"{self.name} is not running.")
        return self._process

    @property
    def log(self) -> str:
        """What QEMU has printed, if it was started here."""
        with contextlib.suppress(FileNotFoundError), open(self._path("log")) as file:
            return file.read()
        return ""

    def kill(self) -> None:
        """Kill QEMU as a crash would."""
        self.process.kill()

    def close(self) -> None:
        """Kill QEMU and remove everything; harmless when that has happened."""
        if self._closed:
            return
        self._closed = True
        self._stop.close()
        self._thread.join()
        self._stopped.close()
        if self._process is not None:
            self._process.close()
        if self._monitor is not None:
            self._monitor.close()
        for one in (*self._listeners.values(), *self._connections):
            one.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what it does -------------------------------------------------------------

    def qmp(self, command: str, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
        """Run a QMP command on the test's own monitor (see :meth:`QmpClient.execute`)."""
        if self._monitor is None:
            raise GuestDied(f"{self.name} is not running.")
        try:
            return self._monitor.execute(command, arguments, **more)
        except Lost as error:
            raise GuestDied(f"{error}\n{self._obituary()}") from None

    @property
    def monitor(self) -> QmpClient:
        """The test's own monitor, once QEMU has reported."""
        if self._monitor is None:
            raise GuestDied(f"{self.name} is not running.")
        return self._monitor

    def status(self) -> str:
        """Return its run state in QEMU's words; ``"gone"`` if there is no QEMU."""
        try:
            return str(self.qmp("query-status")["status"])
        except GuestDied:
            return "gone"

    def running(self) -> bool:
        """Whether QEMU says that the guest runs; false if there is no QEMU."""
        return self.status() == "running"

    def wait_running(self, deadline: float = DEADLINE) -> None:
        """Wait until the guest runs."""
        wait_until(self.running, lambda: f"{self.name} to run ({self.status()})", deadline=deadline)

    def migration(self) -> str:
        """Return the status of its migration, either way; ``"none"`` if there is none."""
        return str(self.qmp("query-migrate").get("status", "none"))

    def wait_migration(self, *statuses: str, deadline: float = DEADLINE) -> str:
        """Wait until its migration has one of these statuses, and return that.

        It is asked after each event and each tick of any guest; the capability
        ``events`` makes QEMU report each change.
        """

        def look() -> str:
            status = self.migration()
            return status if status in statuses else ""

        return wait_until(
            look,
            lambda: f"{self.name}'s migration to be {statuses}: {self.qmp('query-migrate')}",
            deadline=deadline,
        )

    def set_capabilities(self, *names: str, on: bool = True) -> None:
        """Set migration capabilities on the QEMU."""
        self.qmp(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": on} for name in names],
        )

    # -- its count ----------------------------------------------------------------

    @property
    def counter(self) -> int:
        """The last tick that it reported here; -1 before the first."""
        lines = self.lines
        return lines[-1].tick if lines else -1

    def wait_ticks(self, count: int, deadline: float = DEADLINE) -> int:
        """Wait until it has reported ``count`` further ticks here; returns the last one.

        :raises GuestDied: QEMU ended.
        """
        wanted = len(self.lines) + count

        def look() -> bool:
            if not self.alive and len(self.lines) < wanted:
                raise GuestDied(self._obituary())
            return len(self.lines) >= wanted

        wait_until(
            look,
            lambda: f"{count} ticks of {self.name} ({self.status()}, tick {self.counter})",
            deadline=deadline,
        )
        return self.counter

    # -- its RAM ------------------------------------------------------------------

    def ram(self, start: int = 0, end: int | None = None) -> bytes:
        """Return its RAM; it should not run meanwhile (see :meth:`stopped`)."""
        with tempfile.NamedTemporaryFile(dir=self.directory) as file:
            size = (self.memory if end is None else end) - start
            os.chmod(file.name, 0o666)  # for a QEMU of another user
            self.qmp("pmemsave", val=start, size=size, filename=file.name)
            return file.read()

    def window(self) -> bytes:
        """Return the RAM that the program writes."""
        return self.ram(self.program.start, self.program.end)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the guest during the block, and let it go on if it ran."""
        ran = self.running()
        if ran:
            self.qmp("stop")
        try:
            yield
        finally:
            if ran:
                self.qmp("cont")

    def check_ram(self) -> Window:
        """Stop it for a moment and check its RAM.

        :raises Inconsistent: see :func:`tests.rig.bootsector.check`.
        """
        with self.stopped():
            return check(self.window(), self.program)

    # -- inside -------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _listen(self, kind: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self._path(kind))
        listener.listen()
        return listener

    def _obituary(self) -> str:
        code = None if self._process is None else self._process.wait()
        return f"QEMU of {self.name} is gone (exit {code}).\n{self.log[-2000:]}".strip()

    def _serve(self) -> None:
        """Take QEMU's connections, and read the serial port; runs in a thread."""
        selector = selectors.DefaultSelector()
        selector.register(self._stopped, selectors.EVENT_READ)
        for listener in self._listeners.values():
            selector.register(listener, selectors.EVENT_READ)
        rest = b""
        while True:
            for key, _ in selector.select():
                if key.fileobj is self._stopped:
                    selector.close()
                    return
                if key.fileobj in self._listeners.values():
                    connection = self._accept(key.fileobj)
                    if connection is not None:
                        rest = b""
                        selector.register(connection, selectors.EVENT_READ)
                elif isinstance(key.fileobj, socket.socket):
                    data = b""
                    with contextlib.suppress(OSError):
                        data = key.fileobj.recv(65536)
                    if not data:
                        selector.unregister(key.fileobj)
                    rest = self._read(rest + data)

    def _accept(self, listener: object) -> socket.socket | None:
        """Take one connection, and return it if it is the serial port."""
        if listener is self._listeners["serial"]:
            connection, _ = self._listeners["serial"].accept()
            self._connections.append(connection)
            return connection
        connection, _ = self._listeners["rig"].accept()
        peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        pid = struct.unpack("iII", peer)[0]
        # QEMU answers only once it has made all its connections, this thread's too.
        threading.Thread(target=self._greet, args=(connection, pid), daemon=True).start()
        return None

    def _greet(self, connection: socket.socket, pid: int) -> None:
        try:
            with self._lock:
                if self._process is None or self._process.pid != pid:
                    if self._process is not None:
                        self._process.close()
                    self._process = Process.adopt(pid)
            if self._monitor is not None:  # that of a QEMU before this one
                self._monitor.close()
            self._monitor = QmpClient(connection, f"QEMU of {self.name}")
        except (Lost, QmpError, AssertionError, OSError) as error:
            self._failure = GuestDied(f"{error}\n{self._obituary()}")
        tell()

    def _read(self, data: bytes) -> bytes:
        """Take the whole lines out of what the serial port has sent; return the rest."""
        *lines, rest = data.split(b"\n")
        now = time.monotonic()
        for line in lines:
            # After a migration the first line here may be the second half of one.
            if len(line) == 8:
                self.lines.append(Line(int(line, 16), now))
        if lines:
            tell()
        return rest
