"""A private OpenSSH server on loopback, and what its client's command line begins with.

Nothing of the user's is touched: keys, configuration and list of known hosts are in a
directory of its own.  The server is this host's, or one out of Debian's package that is only
unpacked (see ``debian``): installing that would have the host listen for logins from then
on.  It lets in the user that it runs as and nobody else.  As root it wants a user ``sshd``
and a directory, which are there in a mount namespace that only it is in.
"""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from unittest import SkipTest

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from tests.rig.certificates import write
from tests.rig.debian import CACHE, Unavailable, loader, tree

__all__ = ["HOST", "Ssh", "find", "prepare", "require"]

#: What the client calls the server's host.
HOST = "far"

_SUITE = "bookworm"
_PACKAGES = ("openssh-client", "openssh-server")

#: The cipher that qmigd's TLS has too.
_CIPHER = "aes128-gcm@openssh.com"

_SERVER = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {directory}/host
PidFile none
AuthorizedKeysFile {directory}/authorized
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowStreamLocalForwarding yes
LogLevel FATAL
Ciphers {cipher}
Compression no
"""

_CLIENT = """\
Host *
HostName 127.0.0.1
Port {port}
User {user}
IdentityFile {directory}/user
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {directory}/known
GlobalKnownHostsFile none
StrictHostKeyChecking yes
HostKeyAlias relay
BatchMode yes
ExitOnForwardFailure yes
LogLevel ERROR
Ciphers {cipher}
Compression no
"""

_SHADOW = """\
root:*:20000:0:99999:7:::
sshd:*:20000:0:99999:7:::
"""

#: What root's server is started by, with the directory and its command line behind it.
_AS_ROOT = """\
mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd &&
mount --bind "$1/passwd" /etc/passwd && mount --bind "$1/shadow" /etc/shadow &&
shift && exec "$@"
"""


@dataclass(frozen=True)
class Ssh:
    """A server that can be started, and its client.

    :ivar server: the command line of the server, which stays in the foreground and logs to
        its standard error output.
    :ivar client: what the client's command line begins with; :data:`HOST` is the server's.
    :ivar port: where the server will listen, on 127.0.0.1.
    """

    server: tuple[str, ...]
    client: tuple[str, ...]
    port: int


def require() -> None:
    """Skip the test that asks if there is no OpenSSH; under ``CI`` that is a failure.

    :raises SkipTest: with the reason.
    """
    try:
        find()
    except Unavailable as error:
        if os.environ.get("CI"):
            raise
        raise SkipTest(f"There is no OpenSSH: {error}") from None


@functools.cache
def find() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what the command lines of the client and of the server begin with.

    :raises Unavailable: there is no OpenSSH, and none can be fetched.
    """
    here = [shutil.which(name, path=f"{os.defpath}:/usr/sbin:/sbin") for name in ("ssh", "sshd")]
    if here[0] and here[1]:
        return (here[0],), (here[1],)
    root = tree(CACHE / "ssh" / _SUITE, "OpenSSH", _PACKAGES, [_SUITE])
    # By their own loader; the server does not start itself anew for each connection then (-r).
    start = loader(root)
    return (*start, str(root / "usr/bin/ssh")), (*start, str(root / "usr/sbin/sshd"), "-r")


def prepare(directory: Path) -> Ssh:
    """Make keys and configuration.

    :param directory: where they go; nothing else is there.
    :raises Unavailable: there is no OpenSSH, and none can be fetched.
    """
    client, server = find()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    user = pwd.getpwuid(os.geteuid()).pw_name
    values = {"directory": directory, "port": port, "cipher": _CIPHER, "user": user}
    authorized, host = _make_key(directory / "user"), _make_key(directory / "host")
    write(directory / "authorized", authorized)
    write(directory / "known", b"relay " + host)
    write(directory / "server", _SERVER.format(**values).encode())
    write(directory / "client", _CLIENT.format(**values).encode())
    argv = (*server, "-D", "-e", "-f", f"{directory}/server")
    if os.geteuid() == 0:
        users = [line for line in _lines("/etc/passwd") if not line.startswith("sshd:")]
        users.append("sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin")
        write(directory / "passwd", "\n".join([*users, ""]).encode())
        write(directory / "shadow", _SHADOW.encode())
        # sshd reads the one as a user without rights.
        (directory / "passwd").chmod(0o644)
        argv = ("unshare", "--mount", "sh", "-c", _AS_ROOT, "sh", str(directory), *argv)
    return Ssh(argv, (*client, "-F", f"{directory}/client"), port)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _make_key(path: Path) -> bytes:
    """Make a key in a file; returns the public half as a line."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    write(path, private)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return public + b"\n"


def _main() -> None:
    """Fetch it if it is missing; say so if it cannot be had."""
    try:
        find()
    except Unavailable as error:
        print(f"There is no OpenSSH: {error}", flush=True)


if __name__ == "__main__":
    _main()
