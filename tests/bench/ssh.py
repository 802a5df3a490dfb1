"""An ssh tunnel in the relays' places: a private sshd on loopback, and a client for each channel.

Nothing of the user's is touched: keys, configuration and list of known hosts are in the
run's own directory.  The server is this host's, or one out of Debian's package that is only
unpacked (see ``tests.rig.debian``): installing that would have the host listen for
logins from then on.  It runs as an ordinary user, who is the only one it lets in; where
the benchmark is run by root that is ``daemon`` (systemd's NSS module has ``nobody`` locked).
"""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import socket
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from tests.bench.course import Contestant, Place, Relays, wait_for_listener
from tests.rig.certificates import write
from tests.rig.debian import CACHE, loader, tree

__all__ = ["SSH", "find", "ssh"]

SSH = "ssh"

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


def ssh() -> Contestant:
    """Return it as a contestant.

    :raises Unavailable: there is no OpenSSH, and none can be fetched.
    """
    return Contestant(SSH, functools.partial(_start, *find()))


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


def _start(client: tuple[str, ...], server: tuple[str, ...], place: Place) -> Relays:
    directory = place.directory
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    user, options = _user()
    values = {"directory": directory, "port": port, "cipher": _CIPHER, "user": user.pw_name}
    authorized, host = _make_key(directory / "user"), _make_key(directory / "host")
    write(directory / "authorized", authorized)
    write(directory / "known", b"relay " + host)
    write(directory / "server", _SERVER.format(**values).encode())
    write(directory / "client", _CLIENT.format(**values).encode())
    sink_path = str(directory / "sink")
    sink = place.sink(sink_path)
    for file in (directory, *directory.iterdir()):
        if options:
            os.chown(file, user.pw_uid, user.pw_gid)
    far = place.popen([*server, "-D", "-e", "-f", f"{directory}/server"], **options)
    wait_for_listener(far, socket.AF_INET, ("127.0.0.1", port))
    near, paths = [], []
    for number in range(place.channels):
        paths.append(str(directory / f"source{number}"))
        forward = f"{paths[-1]}:{sink_path}"
        near.append(
            place.popen(
                [*client, "-F", f"{directory}/client", "-N", "-L", forward, "relay"], **options
            )
        )
    for process, path in zip(near, paths, strict=True):
        wait_for_listener(process, socket.AF_UNIX, path)
    return Relays(paths, (*near, far), sink)


def _user() -> tuple[pwd.struct_passwd, dict[str, Any]]:
    """Who the two run as, and what starts a process as that user."""
    if os.geteuid() != 0:
        return pwd.getpwuid(os.geteuid()), {}
    user = pwd.getpwnam("daemon")
    return user, {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _make_key(path: Path) -> bytes:
    """Make a key in a file; returns the public half as a line."""
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    write(path, private)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return public + b"\n"
