"""A qmigd daemon in a process of its own, with its own state, and its monitor."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from tests.rig.netns import Namespace
from tests.rig.news import DEADLINE, wait_until
from tests.rig.process import Process, temporary_directory
from tests.rig.qmp import Lost, QmpClient

__all__ = ["Daemon", "DaemonDied", "free_ports", "to_toml"]

#: Where the ports of a process begin: there are so many in each.
_REGIONS = range(10000, 32000, 1000)

_left: list[int] = []
_claims: list[socket.socket] = []

_PORT = 16516  # in a namespace all are free
_DIRECT_PORTS = 8


class DaemonDied(Exception):
    """The daemon ended, or did not start; the text has the end of its log."""


def free_ports(count: int = 1) -> range:
    """Return that many consecutive TCP ports of 127.0.0.1 on which nobody listens.

    They are below those that the kernel hands out by itself.  No other process that uses the rig
    gets them meanwhile; this one gets them again after hundreds of others.
    """
    region = _region()
    for _ in region:
        if len(_left) < count:
            _left[:] = region
        ports = range(_left[0], _left[0] + count)
        del _left[:count]
        if all(map(_is_free, ports)):
            return ports
    raise OSError(f"There are no {count} free ports.")


@cache
def _region() -> range:
    """Claim ports for this process: each has a name that only one socket can have at a time."""
    for start in random.sample(_REGIONS, len(_REGIONS)):
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0qmigd-ports-{start}")
        except OSError:
            claim.close()
        else:
            _claims.append(claim)
            return range(start, start + _REGIONS.step)
    raise OSError(f"{len(_REGIONS)} processes that use the rig have all ports.")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def to_toml(config: Mapping[str, Any]) -> str:
    """Return nested mappings as TOML; a value is a string, a number, a bool or a list of them."""
    return "\n".join(_tables(config, ()))


def _tables(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterable[str]:
    if path:
        yield f"[{'.'.join(map(json.dumps, path))}]"
    for key, value in table.items():
        if not isinstance(value, Mapping):
            # JSON's strings, numbers, booleans and flat lists are TOML's as well.
            yield f"{json.dumps(key)} = {json.dumps(value)}"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _tables(value, (*path, key))


class Daemon:
    """``twistd -n qmigd`` with a configuration; a context manager that closes it.

    What the configuration leaves out of ``[daemon]`` is filled in: ``listen`` and
    ``direct-ports`` with free ports, ``monitor`` and ``state-dir`` in a directory of
    its own, ``zero-copy`` switched off.

    :ivar config: the whole configuration; a change holds from the next start on.
    :ivar uri: what it listens on, for a peer; ``fd:`` if it listens on nothing.
    :ivar monitor_path: the unix socket of its monitor.
    :ivar directory: its own, removed by :meth:`close`.
    """

    def __init__(
        self,
        name: str = "qmigd",
        *,
        guests: Mapping[str, Mapping[str, Any]] | None = None,
        policy: Mapping[str, Any] | None = None,
        tls: Mapping[str, Any] | None = None,
        namespace: Namespace | None = None,
        python: str = sys.executable,
        prefix: Sequence[str] = (),
        in_band: bool = False,
        preloaded: bool = False,
        **daemon: Any,
    ) -> None:
        """Prepare a daemon; :meth:`start` starts it.

        :param guests: the tables ``[guest.NAME]``.
        :param policy: the table ``[policy]``.
        :param tls: the table ``[tls]`` (see :meth:`tests.rig.certificates.Files.table`).
        :param namespace: where its network is, if not here; it listens on the address there,
            if that has one.
        :param prefix: what its command line begins with, to run it somewhere special.
        :param python: the interpreter of the environment that has qmigd.
        :param in_band: it listens for the handshake's in-band form.
        :param preloaded: it need not load its own Python, if it runs here (see ``preloaded``).
        :param daemon: the table ``[daemon]``; ``_`` in a name stands for ``-``.
        """
        self.name = name
        self.directory = temporary_directory()
        self.monitor_path = os.path.join(self.directory, "monitor")
        table = {key.replace("_", "-"): value for key, value in daemon.items()}
        form = "in-band:" if in_band else ""
        if namespace is not None:
            listen = [f"{form}tcp:{namespace.address}:{_PORT}"] if namespace.address else []
            table.setdefault("listen", listen)
            table.setdefault("direct-ports", "49152-49215")
            table.setdefault("insecure", True)
        else:
            ports = free_ports(_DIRECT_PORTS + 1)
            table.setdefault("listen", [f"{form}tcp:127.0.0.1:{ports[0]}"])
            table.setdefault("direct-ports", f"{ports[1]}-{ports[-1]}")
        table.setdefault("monitor", f"unix:{self.monitor_path}")
        table.setdefault("state-dir", os.path.join(self.directory, "state"))
        # What a measurement comes to is another thing on each host.
        table.setdefault("zero-copy", "off")
        self.config: dict[str, Any] = {"daemon": table}
        if tls:
            self.config["tls"] = dict(tls)
        if policy:
            self.config["policy"] = dict(policy)
        if guests:
            self.config["guest"] = {name: dict(guest) for name, guest in guests.items()}
        self.uri = (*table["listen"], "fd:")[0]
        around = namespace.prefix if namespace else ()
        self._preloaded = preloaded and python == sys.executable and not (*around, *prefix)
        self._argv = [*around, *prefix, os.path.join(os.path.dirname(python), "twistd")]
        self._process: Process | None = None
        self._monitor: QmpClient | None = None

    def start(self) -> Daemon:
        """Start it, and return once its monitor answers.

        It is tried again with each line that the daemon logs: it has to log one
        once its monitor listens, as daemons do.

        :raises DaemonDied: it ended instead.
        """
        self.launch()

        def look() -> bool:
            if not self.process.running:
                raise DaemonDied(self._obituary())
            with contextlib.suppress(OSError):
                self._monitor = QmpClient.connect(self.monitor_path)
            return self._monitor is not None

        wait_until(look, lambda: f"the monitor of {self.name}; its log:\n{self.log}")
        return self

    def launch(self) -> Process:
        """Start it without waiting for its monitor, and return the process."""
        path = os.path.join(self.directory, "qmigd.toml")
        with open(path, "w") as file:
            file.write(to_toml(self.config))
        begin = Process.fork if self._preloaded else Process.start
        self._process = begin(
            [*self._argv, "--nodaemon", "--pidfile=", "qmigd", "--config", path],
            log=os.path.join(self.directory, "log"),
            directory=self.directory,
            environment={"PYTHONUNBUFFERED": "1"},
        )
        return self._process

    @property
    def process(self) -> Process:
        """Its process, once it was started."""
        if self._process is None:
            raise DaemonDied(f"{self.name} is not running.")
        return self._process

    @property
    def monitor(self) -> QmpClient:
        """The connection to its monitor, with its events; a new one after each start."""
        if self._monitor is None:
            raise DaemonDied(f"{self.name} is not running.")
        return self._monitor

    def execute(self, command: str, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
        """Run a management command (see :meth:`QmpClient.execute`).

        :raises DaemonDied: the daemon ended.
        """
        try:
            return self.monitor.execute(command, arguments, **more)
        except Lost as error:
            raise DaemonDied(f"{error}\n{self._obituary()}") from None

    @property
    def log(self) -> str:
        """All that it has logged, over all its starts."""
        with contextlib.suppress(FileNotFoundError), open(f"{self.directory}/log") as file:
            return file.read()
        return ""

    def kill(self) -> None:
        """Kill it with SIGKILL, as a crash would."""
        self._end(signal.SIGKILL)

    def stop(self, deadline: float = DEADLINE) -> int | None:
        """Stop it with SIGTERM, as an administrator would; returns its exit code."""
        return self._end(signal.SIGTERM, deadline)

    def restart(self) -> Daemon:
        """Start it again after :meth:`kill` or :meth:`stop`, with the same state."""
        if self.process.running:
            self.stop()
        return self.start()

    def _end(self, number: signal.Signals, deadline: float = DEADLINE) -> int | None:
        self.process.signal(number)
        code = self.process.wait(deadline)
        self.process.close()
        self._hang_up()
        return code

    def _hang_up(self) -> None:
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def _obituary(self) -> str:
        code = None if self._process is None else self._process.wait()
        return f"{self.name} is gone (exit {code}); its log ends:\n{self.log[-4000:]}"

    def close(self) -> None:
        """Kill it and remove everything; harmless when that has happened."""
        if self._process is not None:
            self._process.close()
        self._hang_up()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
