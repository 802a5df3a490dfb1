"""Moves over ``fd:``: every connection is handed over by a management app.

The daemons and QEMUs of :class:`IsolatedTests` have no network at all: what moves the guest
can only be what the app, docs/examples/fd_migrate.py, has given them.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qmigd.transports.sockets import tcp_pair
from tests.rig.certificates import Authority
from tests.rig.daemons import Daemon
from tests.rig.guest import MACHINE
from tests.rig.netns import Namespace
from tests.rig.news import wait_until
from tests.rig.pair import NAME, SLOW, Pair, PairCase
from tests.rig.qmp import QmpClient, QmpError

_APP = Path(__file__).parents[1] / "docs/examples/fd_migrate.py"

#: Seconds that a daemon waits for the app, where that is waited for.
_SOON: Mapping[str, Any] = {"handshake_deadline": 1.5}

#: A machine type whose QEMU opens the preempt channel no sooner than with postcopy;
#: with the rig's own it does so as it begins.
_LATE = "pc-i440fx-10.0"


def run_app(pair: Pair, *options: str) -> list[str]:
    """Have the sample app move a guest, and return the lines that it has printed."""
    words = [sys.executable, os.fspath(_APP), NAME]
    words += [pair.here.monitor_path, pair.there.monitor_path, *options]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{done.stdout}{done.stderr}")
    (entry,) = pair.here.execute("query-migrate", guest=NAME)
    pair.id = entry["id"]
    pair.completed()
    return done.stdout.splitlines()


#: Makes both ends of a TCP connection over an address, and hands them over.
_PAIR = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    ends = socket.create_connection(server.getsockname()), server.accept()[0]
socket.send_fds(socket.socket(fileno=0), [b"x"], [end.fileno() for end in ends])
"""


def network_pair(namespace: Namespace) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection over a network."""
    near, far = socket.socketpair()
    with near, far:
        words = [*namespace.prefix, sys.executable, "-c", _PAIR, namespace.address]
        subprocess.run(words, stdin=far.fileno(), check=True)
        ends = [socket.socket(fileno=number) for number in socket.recv_fds(near, 1, 2)[1]]
    return ends[0], ends[1]


class IsolatedTests(PairCase):
    """The sample app, and two hosts that cannot reach anything."""

    def test_multifd(self) -> None:
        """Several channels are socketpairs, and the app is told how many before the first."""
        pair = self.pair("10.0", link=self.isolated()).start()
        said = run_app(pair, "--require", "multifd")
        pair.prove_moved()
        plan = pair.entry(pair.here)["plan"]
        self.assertEqual("relay", plan["path"])
        self.assertIn("not direct: all connections are handed over", plan["path-reason"])
        channels = [f"{one['name']} {one['index']}" for one in plan["channels"]]
        self.assertGreater(len(channels), 2)
        # Main, multifd's and preempt's, which this QEMU does not have along with multifd.
        self.assertEqual(
            f"it is going to want at the most {len(channels) + 1} payload", said[0][:-9]
        )
        self.assertEqual("connected control 0", said[1])
        self.assertEqual(f"it is going to want {len(channels)} payload channels", said[2])
        self.assertEqual({f"connected {one}" for one in channels}, {*said[3:-1]})

    def test_preempt(self) -> None:
        """The preempt channel is asked for when the guest is to go over, here by way of TCP."""
        self.check_preempt("10.0", "--exclude", "multifd")

    def test_multifd_with_preempt(self) -> None:
        """A QEMU that can have both at once gets all the channels."""
        self.check_preempt("11", "--require", "multifd")

    def check_preempt(self, label: str, *options: str) -> None:
        """Have the app switch a guest to postcopy, with preempt."""
        pair = self.pair(label, link=self.isolated(), machine=_LATE).start()
        slow = ["--postcopy", "--tunable", f"max-bandwidth={SLOW}"]
        said = run_app(pair, "--tcp", "--require", "postcopy-preempt", *slow, *options)
        pair.prove_moved()
        self.assertEqual("connected preempt 0", said[-2])
        plan = pair.entry(pair.here)["plan"]
        self.assertEqual(len(plan["channels"]), len(said) - 4)
        self.assertEqual(said[0].replace("at the most ", ""), said[2])
        self.assertEqual("--require" in options, "multifd" in plan["features"])


class App:
    """A management app that does what a test says, and nothing by itself."""

    def __init__(self, pair: Pair, form: str = "") -> None:
        """:param form: of the handshake, ``in-band:`` or nothing."""
        self._pair = pair
        self._form = form
        self._seen = 0

    def asked(self, channel: str, index: int = 0, *, side: Daemon | None = None) -> dict[str, Any]:
        """Wait until a side, the source if not said, asks for a channel."""

        def ours(data: dict[str, Any]) -> bool:
            return (data["id"], data["channel"], data["index"]) == (self._pair.id, channel, index)

        monitor = (side or self._pair.here).monitor
        since = self._seen if side is None else 0
        event = monitor.wait_event("CHANNEL_REQUEST", where=ours, since=since)
        if side is None:
            self._seen = len(monitor.events)
        return event.data

    def planned(self, side: Daemon, *, settled: bool = True) -> list[str]:
        """Wait until a side says which channels there are to be, or may be."""
        wanted = (self._pair.id, settled)
        event = side.monitor.wait_event(
            "CHANNEL_PLAN", where=lambda d: (d["id"], d["settled"]) == wanted
        )
        return [f"{one['name']} {one['index']}" for one in event.data["channels"]]

    def hand_over(self, daemon: Daemon, end: socket.socket, command: str, **arguments: Any) -> None:
        """Give a daemon one end of a connection."""
        with end:
            daemon.execute("getfd", fdname="end", sock=end)
        daemon.execute(command, arguments)

    def add(self, daemon: Daemon, channel: str, index: int, end: socket.socket) -> None:
        """Give a daemon one end for a channel."""
        whose = {"id": self._pair.id, "channel": channel, "index": index}
        self.hand_over(daemon, end, "add-channel", **whose, fdname="end")

    def take_in(self, end: socket.socket) -> None:
        """Give the destination one end, for whatever it turns out to be."""
        self.hand_over(self._pair.there, end, "incoming", uri=f"{self._form}fd:end")

    def connect(self, channel: str, index: int = 0, *, tcp: bool = False) -> None:
        """Wait for a request of the source's, and answer it."""
        self.asked(channel, index)
        here, there = tcp_pair() if tcp else socket.socketpair()
        self.take_in(there)
        self.add(self._pair.here, channel, index, here)


def ended(end: socket.socket) -> bool:
    """Whether the other end of a connection gets closed, whatever comes on it before."""
    with end, contextlib.suppress(ConnectionResetError):
        end.settimeout(10)
        while end.recv(4096):
            pass
    return True


class FdCase(PairCase):
    def fd_pair(self, *labels: str, **options: Any) -> tuple[Pair, App]:
        """Start a pair that has nobody but an app to connect it."""
        pair = self.pair(*labels, **options).start()
        return pair, App(pair)


class MoveTests(FdCase):
    """The forms that a move can take."""

    def test_handover(self) -> None:
        """A socket from the app ends up in the QEMUs."""
        pair, app = self.fd_pair("7.2", "10.0")
        pair.begin("handover", uri="fd:")
        app.connect("control")
        app.connect("main", tcp=True)
        entry = pair.completed()
        pair.prove_moved()
        self.assertEqual("handover", entry["plan"]["path"])
        self.assertEqual("fd:", entry["peer"])
        self.assertEqual(["main 0"], app.planned(pair.here))

    def test_baseline(self) -> None:
        """With no feature selected there is one connection, and that is said."""
        pair, app = self.fd_pair()
        pair.begin("baseline", uri="fd:")
        app.connect("control")
        pair.completed()
        pair.prove_moved()
        self.assertEqual([], app.planned(pair.here))
        self.assertEqual(["main 0"], app.planned(pair.here, settled=False))
        asked = [e.data for e in pair.here.monitor.events if e.name == "CHANNEL_REQUEST"]
        self.assertEqual(["control"], [data["channel"] for data in asked])

    def test_taken_in(self) -> None:
        """A source that connects by itself does not notice who hands it on."""
        pair, app = self.fd_pair()
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(10)
            pair.begin("handover", uri=f"tcp:127.0.0.1:{server.getsockname()[1]}")
            for _ in range(2):
                app.take_in(server.accept()[0])
        pair.completed()
        pair.prove_moved()
        self.assertEqual("fd:", pair.entry(pair.there)["peer"])

    def test_asked_on_both_sides(self) -> None:
        """The destination says what it waits for, and takes it by the same command.

        At the source a planned channel can be there before it is asked for, and what the
        migration has no use for is closed when it is over.
        """
        pair, app = self.fd_pair("10.0", machine=_LATE)
        pair.begin("relay", "preempt", uri="fd:")
        app.connect("control")
        self.assertEqual(["main 0", "preempt 0"], app.planned(pair.there))
        asked = [app.asked(name, side=pair.there) for name in ("main", "preempt")]
        self.assertEqual([("destination", NAME)] * 2, [(d["role"], d["guest"]) for d in asked])
        self.assertNotIn("timeout", asked[0])
        self.assertEqual(10.0, app.asked("main")["timeout"])
        here, there = socket.socketpair()
        app.add(pair.there, "main", 0, there)
        unused, app_end = socket.socketpair()
        app.add(pair.here, "preempt", 0, unused)
        app.add(pair.here, "main", 0, here)
        pair.completed()
        pair.prove_moved()
        self.assertTrue(ended(app_end))

    def test_in_band(self) -> None:
        """In the handshake's other form, which the destination knows of its own channels."""
        pair, _ = self.fd_pair("7.2")
        app = App(pair, "in-band:")
        pair.begin("relay", "multifd", uri="in-band:fd:", tunables={"multifd-channels": 1})
        app.connect("control")
        self.assertEqual(["main 0", "multifd 0"], app.planned(pair.there))
        for name in ("main", "multifd"):
            app.asked(name)
            here, there = socket.socketpair()
            if name == "main":
                app.take_in(there)
            else:
                app.add(pair.there, name, 0, there)
            app.add(pair.here, name, 0, here)
        pair.completed()
        pair.prove_moved()

    def test_features(self) -> None:
        """What a move would use can be asked over one management connection and another."""
        pair, app = self.fd_pair("11", machine=_LATE)
        with ThreadPoolExecutor(1) as pool:
            client = QmpClient.connect(pair.here.monitor_path)
            asking = pool.submit(client.execute, "query-features", guest=NAME, uri="fd:")
            pair.id = pair.here.monitor.wait_event("CHANNEL_REQUEST").data["id"]
            app.connect("control")
            answer = asking.result()
            client.close()
        reasons = {one["name"]: one.get("reason", "") for one in answer["features"]}
        self.assertEqual("relay", answer["path"])
        self.assertIn("over tcp only", reasons["zero-copy-send"])
        pair.prove_stayed()

    def test_wrong_descriptor(self) -> None:
        """What is no connection is refused and closed, and the request stands."""
        pair, app = self.fd_pair()
        pair.begin("handover", uri="fd:")
        app.asked("control")
        listening = socket.create_server(("127.0.0.1", 0))
        with self.assertRaisesRegex(QmpError, "this is a listening socket"):
            app.add(pair.here, "control", 0, listening)
        with self.assertRaisesRegex(QmpError, "No file descriptor is called 'end'"):
            pair.here.execute("add-channel", id=pair.id, channel="control", fdname="end")
        for channel, said in (("control", "no channel control 1|wants channels"), ("main", ".")):
            near, far = socket.socketpair()
            with self.assertRaisesRegex(QmpError, said):
                app.add(pair.here, channel, 1, near)
            self.assertTrue(ended(far))
        here, there = socket.socketpair()
        app.take_in(there)
        app.add(pair.here, "control", 0, here)
        app.connect("main")
        pair.completed()
        pair.prove_moved()


class TlsTests(FdCase):
    def test_tls(self) -> None:
        """TLS is as ever, with the name that is given; the kernel's is not for these sockets."""
        pair = self.secure_pair()
        run_app(pair, "--tls-hostname", "host.example")
        pair.prove_moved()
        entry = pair.entry(pair.here)
        self.assertIn("tls", entry["plan"]["features"])
        self.assertIn("host.example", entry["peer-names"])
        (ktls,) = [one for one in entry["plan"]["left-out"] if one["name"] == "ktls"]
        self.assertIn("TLS", ktls["reason"])

    def test_another_host(self) -> None:
        """A peer with another name gets nothing."""
        pair = self.secure_pair()
        with self.assertRaisesRegex(AssertionError, "other.example"):
            run_app(pair, "--tls-hostname", "other.example")
        pair.prove_stayed()

    def test_beyond_this_host(self) -> None:
        """Who comes from another host, by what the kernel knows, has to use TLS."""
        pair, app = self.fd_pair()
        here, there = network_pair(self.link().left)
        pair.begin("handover", uri="fd:")
        app.asked("control")
        app.take_in(there)
        app.add(pair.here, "control", 0, here)
        self.assertIn("tls", pair.failed(pair.here))
        pair.prove_stayed()

    def secure_pair(self) -> Pair:
        authority = Authority(self.mktemp())
        pair = self.pair("10.0")
        for daemon in (pair.here, pair.there):
            daemon.config["tls"] = authority.host("host.example", "127.0.0.1").table()
        return pair.start()


class FaultTests(FdCase):
    """Apps that do not do their part, and users who change their mind."""

    def test_nobody_answers(self) -> None:
        """A request that nobody answers ends the migration, whichever it is."""
        pair = self.pair(here=_SOON, there=_SOON).start_registering()
        app = App(pair)
        for answered, unanswered in (([], "control"), (["control"], "main")):
            pair.begin("handover", uri="fd:")
            for channel in answered:
                app.connect(channel)
            said = pair.failed(pair.here)
            self.assertIn(f"nobody has answered CHANNEL_REQUEST for channel {unanswered} 0", said)
            self.assertEqual("no-channel", pair.entry(pair.here)["error"]["class"])
            pair.prove_stayed()
        self.try_again(pair, "handover")

    def test_nobody_answers_for_preempt(self) -> None:
        """Nor does the guest go over without a channel that QEMU would miss there."""
        for machine in (MACHINE, _LATE):
            pair, app = self.fd_pair("10.0", machine=machine, here=_SOON)
            pair.begin("relay", "preempt", bandwidth=SLOW, uri="fd:")
            app.connect("control")
            app.connect("main")
            pair.postcopy()
            self.assertIn("CHANNEL_REQUEST for channel preempt 0", pair.failed(pair.here))
            pair.prove_stayed()

    def test_cancel(self) -> None:
        """A migration that waits for the app can be cancelled, at once."""
        pair, app = self.fd_pair()
        pair.here.config["daemon"]["handshake-deadline"] = 60.0
        pair.here.restart()
        for answered, waiting in (([], "control"), (["control"], "main")):
            pair.begin("handover", uri="fd:")
            for channel in answered:
                app.connect(channel)
            app.asked(waiting)
            pair.cancel()
            self.assertEqual("cancelled", pair.ended(pair.here)["status"])
            pair.prove_stayed()

    def test_unclaimed(self) -> None:
        """What is handed over and not used is closed, by both daemons."""
        pair, app = self.fd_pair(there=_SOON)
        here, far = socket.socketpair()
        with here:
            client = QmpClient.connect(pair.here.monitor_path)
            client.execute("getfd", fdname="end", sock=here)
            client.close()
        self.assertTrue(ended(far))
        for command in ("closefd", "getfd"):
            near, far = socket.socketpair()
            with near:
                pair.here.execute("getfd", fdname="end", sock=near)
            with socket.socket() as other:
                pair.here.execute(command, fdname="end", sock=other if command == "getfd" else None)
            self.assertTrue(ended(far), command)
        near, far = socket.socketpair()
        with near, self.assertRaisesRegex(QmpError, "needs the argument 'fdname'"):
            pair.here.execute("getfd", sock=near)
        self.assertTrue(ended(far))
        # Nobody says anything on it: it is let go like any other connection.
        near, far = socket.socketpair()
        app.take_in(near)
        self.assertTrue(ended(far))

    def test_daemon_killed(self) -> None:
        """A source that comes back asks for a connection, to ask what became of the guest."""
        pair, app = self.fd_pair("10.0", here=_SOON)
        pair.begin("handover", "postcopy", uri="fd:", bandwidth=SLOW)
        app.connect("control")
        app.connect("main")
        pair.postcopy()
        pair.wait(pair.here, "postcopy-active")
        pair.here.kill()
        pair.here.start()
        app = App(pair)
        app.connect("control")
        wait_until(lambda: "the guest is the destination's" in pair.here.log, lambda: pair.here.log)
        pair.ended(pair.there)
        pair.prove_moved()
