"""The file descriptors that a QMP client hands over with its messages (SCM_RIGHTS).

As with QEMU, ``getfd`` gives a descriptor that has come a name, under which another
command of the same client takes it.  One ``getfd`` takes one descriptor, in the order in
which they came; a client may send several such commands without waiting.  Whatever nobody
has taken when the client goes is closed.
"""

from __future__ import annotations

import os
from collections import deque

from qmigd.errors import ArgumentError, ProtocolError

__all__ = ["MAX_NAMED", "MAX_UNNAMED", "Descriptors"]

#: Descriptors of one client that may wait for their ``getfd``.
MAX_UNNAMED = 16
#: Descriptors of one client that may have a name.
MAX_NAMED = 256


class Descriptors:
    """Those of one client."""

    def __init__(self) -> None:
        self._unnamed: deque[int] = deque()
        self._named: dict[str, int] = {}

    def receive(self, descriptor: int) -> None:
        """Keep one that has come.

        :raises ProtocolError: too many have come without a ``getfd``; it was closed.
        """
        if len(self._unnamed) >= MAX_UNNAMED:
            os.close(descriptor)
            raise ProtocolError(
                f"More than {MAX_UNNAMED} file descriptors have come without a getfd.",
                code="too-many",
            )
        # The kernel gives it to programs that the daemon starts as well.
        os.set_inheritable(descriptor, False)
        self._unnamed.append(descriptor)

    def name(self, name: str) -> None:
        """Give the oldest one that has no name this name; what had that before is closed.

        :raises ArgumentError: it cannot be called so (and was closed), or none has come.
        """
        if not self._unnamed:
            raise ArgumentError(
                "No file descriptor has come with getfd: it is sent with SCM_RIGHTS, in the same "
                "message."
            )
        descriptor = self._unnamed.popleft()
        try:
            if not name or name[0].isdigit():  # QEMU's rule
                raise ArgumentError("'fdname' must not be empty or begin with a digit.")
            if name not in self._named and len(self._named) >= MAX_NAMED:
                raise ArgumentError(
                    f"{MAX_NAMED} file descriptors have names already; close some with closefd."
                )
        except ArgumentError:
            os.close(descriptor)
            raise
        old = self._named.pop(name, None)
        if old is not None:
            os.close(old)
        self._named[name] = descriptor

    def take(self, name: str) -> int:
        """Return the one of that name, which is the caller's from here on.

        :raises ArgumentError: there is none.
        """
        try:
            return self._named.pop(name)
        except KeyError:
            raise ArgumentError(
                f"No file descriptor is called '{name}' on this connection: send it with getfd "
                f"first."
            ) from None

    def drop(self) -> None:
        """Close the oldest one that has no name, if there is one."""
        if self._unnamed:
            os.close(self._unnamed.popleft())

    def close(self) -> None:
        """Close them all: the client has gone."""
        for descriptor in (*self._unnamed, *self._named.values()):
            os.close(descriptor)
        self._unnamed.clear()
        self._named.clear()
