"""``qmigctl connect``, as a process between two sockets or pipes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.rig.process import temporary_directory

_QMIGCTL = os.path.join(os.path.dirname(sys.executable), "qmigctl")
_MANY = bytes(range(256)) * (16 << 10)


class ConnectTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.path = Path(temporary_directory(), "peer")
        self.addCleanup(self.path.parent.rmdir)
        self.listener = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.path.unlink)
        self.addCleanup(self.listener.close)
        self.listener.bind(str(self.path))
        self.listener.listen()

    def start(self, stdin: int, stdout: int) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start it; returns the process and the daemon's end."""
        argv = [_QMIGCTL, "connect", f"unix:{self.path}"]
        process = subprocess.Popen(argv, stdin=stdin, stdout=stdout)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        daemon, _ = self.listener.accept()
        self.addCleanup(daemon.close)
        return process, daemon

    def on_socket(self) -> tuple[subprocess.Popen[bytes], socket.socket, socket.socket]:
        """Start it on a socket, as ``exec:`` does."""
        near, theirs = socket.socketpair()
        self.addCleanup(near.close)
        with theirs:
            process, daemon = self.start(theirs.fileno(), theirs.fileno())
        return process, near, daemon

    def on_pipes(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start it on two pipes, as sshd may do."""
        process, daemon = self.start(subprocess.PIPE, subprocess.PIPE)
        assert process.stdin is not None and process.stdout is not None
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stdin.close)
        return process, daemon

    def test_both_ways(self) -> None:
        """All of it arrives at both ends, the end of each half, too; then it is over."""
        process, near, daemon = self.on_socket()
        sending = threading.Thread(target=lambda: _send(near))
        sending.start()
        self.assertEqual(_read(daemon), _MANY)
        sending.join()
        # One half has ended; the other goes on.
        answering = threading.Thread(target=lambda: _send(daemon))
        answering.start()
        self.assertEqual(_read(near), _MANY)
        answering.join()
        self.assertEqual(process.wait(), 0)

    def test_pipes(self) -> None:
        """The same where input and output are pipes."""
        process, daemon = self.on_pipes()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"there")
        process.stdin.close()
        self.assertEqual(_read(daemon), b"there")
        daemon.sendall(b"back")
        daemon.shutdown(socket.SHUT_WR)
        self.assertEqual(process.stdout.read(), b"back")
        self.assertEqual(process.wait(), 0)

    def test_daemon_gone(self) -> None:
        """When the daemon has closed the connection it ends, whatever is still to come in."""
        process, daemon = self.on_pipes()
        assert process.stdout is not None
        daemon.sendall(b"last words")
        daemon.close()
        self.assertEqual(process.stdout.read(), b"last words")
        self.assertEqual(process.wait(), 0)

    def test_peer_gone(self) -> None:
        """When the other side is gone it ends, and what that has said last arrives."""
        process, near, daemon = self.on_socket()
        near.sendall(b"last words")
        near.close()
        self.assertEqual(_read(daemon), b"last words")
        self.assertEqual(process.wait(), 0)

    def test_nobody_reads(self) -> None:
        """When nobody reads its output any more it ends with its input."""
        process, _ = self.on_pipes()
        assert process.stdin is not None and process.stdout is not None
        process.stdout.close()
        process.stdin.close()
        self.assertEqual(process.wait(), 0)

    def test_refused(self) -> None:
        """Where there is nobody to connect to, one sentence says why, with an exit code."""
        self.listener.close()
        for words, code, said in (
            ([str(self.path)], 3, f"Nobody listens on {self.path}"),
            ([f"{self.path}.not"], 3, f"There is no socket {self.path}.not"),
            (["tcp:hostb:16516"], 2, "'tcp:hostb:16516' is no unix socket"),
            (["unix:"], 2, "'unix:' is no unix socket"),
        ):
            done = subprocess.run(
                [_QMIGCTL, "connect", *words], capture_output=True, text=True, check=False
            )
            self.assertEqual((done.returncode, done.stdout), (code, ""))
            self.assertIn(said, done.stderr)
            self.assertTrue(done.stderr.startswith("qmigctl: "), done.stderr)


def _send(sock: socket.socket) -> None:
    sock.sendall(_MANY)
    sock.shutdown(socket.SHUT_WR)


def _read(sock: socket.socket) -> bytes:
    with sock.makefile("rb") as file:
        return file.read()
