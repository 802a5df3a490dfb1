"""Every error that qmigd raises on purpose.

One root, :class:`QmigdError`.  Below it the errors that this side found
(:class:`LocalError`) and the one that the peer reported (:class:`RemoteError`)
are apart, so that nobody answers a peer's ERROR with another ERROR.

The text of an error is a sentence for a person: it says what is wrong and,
where that is known, what to do about it.  ``code`` is the same thing for a
program: a short kebab-case word, stable between releases, carried in ERROR
messages, in ``query-migrate`` and in ``--json`` output.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "CommandNotFound",
    "ConfigError",
    "DeadlineError",
    "DeviceNotFound",
    "FeatureError",
    "FileError",
    "GuestBusy",
    "GuestError",
    "GuestGone",
    "GuestNotFound",
    "LocalError",
    "MigrationError",
    "NoChannel",
    "PeerGone",
    "PreflightError",
    "ProtocolError",
    "QmigdError",
    "RemoteError",
    "StreamError",
    "TlsError",
]


class QmigdError(Exception):
    """The root.

    :ivar code: what a program reads, in kebab-case.
    :ivar text: what a person reads, a sentence.
    """

    code = "internal"

    def __init__(self, text: str, *, code: str | None = None) -> None:
        super().__init__(text)
        self.text = text
        if code is not None:
            self.code = code


class LocalError(QmigdError):
    """Found by this side."""


class RemoteError(QmigdError):
    """Reported by the peer in an ERROR message: its code and its text."""

    code = "peer"


class ProtocolError(LocalError):
    """The peer broke the protocol; ``code`` is the ERROR's code (docs/protocol)."""

    code = "protocol"


class TlsError(LocalError):
    """TLS with the peer failed, or its certificate is not the right one."""

    code = "tls"


class PeerGone(LocalError):
    """The peer cannot be reached, or its connection was lost."""

    code = "peer-gone"


class DeadlineError(LocalError):
    """Something that was waited for did not come in time."""

    code = "deadline"


class NoChannel(LocalError):
    """The management app did not hand over a connection that it was asked for."""

    code = "no-channel"


class ConfigError(LocalError):
    """The configuration file is wrong; the text names the key or the line."""

    code = "config"


class ArgumentError(LocalError):
    """A management command was given a wrong argument; the text names it."""

    code = "argument"


class CommandNotFound(LocalError):
    """There is no such management command."""

    code = "command-not-found"


class FileError(LocalError):
    """The file of a saved guest cannot be written or read, or is not a good one."""

    code = "file"


class DeviceNotFound(LocalError):
    """A memory guest was asked about a device that it does not have."""

    code = "device-not-found"


class GuestError(LocalError):
    """A guest's QEMU refused something or failed; the text has its words."""

    code = "guest"


class GuestNotFound(GuestError):
    """No guest of that name is registered, or none is waiting."""

    code = "guest-not-found"


class GuestBusy(GuestError):
    """The guest, or its QMP socket, is in somebody else's hands."""

    code = "guest-busy"


class GuestGone(GuestError):
    """The guest's QEMU cannot be reached, or ended."""

    code = "guest-gone"


class FeatureError(LocalError):
    """A required feature cannot be had, or the two ends disagree on one."""

    code = "feature"


class PreflightError(LocalError):
    """The two guests do not fit together; nothing has been moved."""

    code = "preflight"


class MigrationError(LocalError):
    """The migration failed; the text has the reason."""

    code = "migration"


class StreamError(LocalError):
    """A migration stream, or a file with one, is cut, damaged, or none at all.

    :ivar offset: where, in bytes from the beginning.
    :ivar expected: what should be there.
    :ivar found: what is.
    """

    code = "stream"

    def __init__(self, offset: int, expected: str, found: str) -> None:
        super().__init__(f"At offset {offset:#x}: expected {expected}, found {found}.")
        self.offset = offset
        self.expected = expected
        self.found = found
