#!/usr/bin/env python3
"""A management app that moves a guest over connections that it makes itself.

    fd_migrate.py GUEST SOURCE DESTINATION [--tcp] [--postcopy] [--tls-hostname NAME]
                  [--require NAME]... [--exclude NAME]... [--tunable NAME=VALUE]...

SOURCE and DESTINATION are the management sockets of two qmigd.  Neither needs a network:
whenever the source asks for a channel, this program makes a connection and gives one end
to each.  Here both run on this host, so that a socketpair will do; with --tcp it is a TCP
connection of this program's.  Between two hosts there would be such a program on each, and
a connection between the two in the middle.

It needs nothing but Python, and is meant to be read and taken apart.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections import deque
from typing import Any


class Refused(Exception):
    """A daemon has refused a command; the text has its words."""


class Daemon:
    """A connection to a daemon's management socket."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._events: deque[dict[str, Any]] = deque()
        self._read()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, *, descriptor: int | None = None, **arguments: Any) -> Any:
        """Carry a command out; a descriptor goes along with it."""
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = json.dumps({"execute": command, "arguments": given}).encode()
        if descriptor is not None:
            # With the first bytes; the rest follows in case they were not taken all at once.
            sent = socket.send_fds(self._socket, [message], [descriptor])
            message = message[sent:]
        self._socket.sendall(message)
        while True:
            answer = self._read()
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise Refused(f"{command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def event(self) -> dict[str, Any]:
        """Return the next event, waiting for it."""
        while not self._events:
            self._events.append(self._read())
        return self._events.popleft()

    def hand_over(self, end: socket.socket, command: str, **arguments: Any) -> None:
        """Give the daemon one end of a connection, and keep no copy of it.

        A copy that is left open would keep the other side from noticing the end.
        """
        try:
            self.execute("getfd", descriptor=end.fileno(), fdname="channel")
        finally:
            end.close()
        self.execute(command, **arguments)

    def _read(self) -> Any:
        line = self._lines.readline()
        if not line:
            raise Refused("the daemon has closed the connection")
        return json.loads(line)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a TCP connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        return near, server.accept()[0]


def migrate(options: argparse.Namespace) -> dict[str, Any]:
    """Move the guest, and return the last of its MIGRATION events at the source."""
    source, destination = Daemon(options.source), Daemon(options.destination)
    more = {"tls_hostname": options.tls_hostname} if options.tls_hostname else {}
    begun = source.execute(
        "migrate",
        guest=options.guest,
        uri="fd:",
        require=options.require,
        exclude=options.exclude,
        tunables=dict(options.tunable),
        **more,
    )
    postcopy = options.postcopy
    while True:
        event = source.event()
        name, data = event["event"], event.get("data", {})
        if data.get("id") != begun["id"] or data.get("role") == "destination":
            continue
        if name == "CHANNEL_PLAN":
            most = "" if data["settled"] else "at the most "
            print(f"it is going to want {most}{len(data['channels'])} payload channels")
        elif name == "CHANNEL_REQUEST":
            here, there = tcp_pair() if options.tcp else socket.socketpair()
            destination.hand_over(there, "incoming", uri="fd:channel")
            source.hand_over(
                here,
                "add-channel",
                id=data["id"],
                channel=data["channel"],
                index=data["index"],
                fdname="channel",
            )
            print(f"connected {data['channel']} {data['index']}")
        elif name == "MIGRATION" and data["status"] in ("completed", "failed", "cancelled"):
            return dict(data)
        elif name == "MIGRATION" and data["status"] == "active" and postcopy:
            postcopy = False
            source.execute("migrate-start-postcopy", guest=options.guest)


def main() -> int:
    """Return the exit code."""

    def assignment(text: str) -> tuple[str, str]:
        name, _, value = text.partition("=")
        return name, value

    parser = argparse.ArgumentParser(description="Moves a guest over descriptors only.")
    parser.add_argument("guest")
    parser.add_argument("source", help="the management socket of the source's qmigd")
    parser.add_argument("destination", help="that of the destination's")
    parser.add_argument("--tcp", action="store_true", help="connect the two by TCP")
    parser.add_argument("--postcopy", action="store_true", help="switch over to postcopy")
    parser.add_argument("--tls-hostname", help="what the destination's certificate is for")
    parser.add_argument("--require", action="append", default=[], metavar="NAME")
    parser.add_argument("--exclude", action="append", default=[], metavar="NAME")
    parser.add_argument("--tunable", action="append", default=[], type=assignment)
    options = parser.parse_args()
    try:
        end = migrate(options)
    except (OSError, Refused) as error:
        print(f"fd_migrate: {error}", file=sys.stderr)
        return 1
    print(f"{options.guest}: {end['status']}")
    if "error" in end:
        print(f"fd_migrate: {end['error']['desc']}", file=sys.stderr)
    return 0 if end["status"] == "completed" else 1


if __name__ == "__main__":
    sys.exit(main())
