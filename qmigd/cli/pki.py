"""``qmigctl pki``: makes certificates.  It talks to no daemon.

::

    DIR/ca-cert.pem             the CA's certificate, for every host
    DIR/ca-key.pem              the CA's key, for nobody
    DIR/hosts/NAME/             all that one host needs, to be copied there as a whole
        ca-cert.pem
        server-cert.pem         its certificate
        server-key.pem          its key
        client-cert.pem         the same two under the names by which QEMU
        client-key.pem          knows them on a source: symbolic links

The names are those of QEMU's ``tls-creds-x509``, whose ``dir`` such a directory can be.

A host's directory is made under another name and then renamed, so that it is there as a
whole or not at all.  Keys are created with mode 600, and directories with 700.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..channels.authority import (
    Issued,
    checked_names,
    load_authority,
    new_authority,
    new_host,
)
from ..channels.pem import fingerprint
from ..errors import ArgumentError, ConfigError
from .options import Exit
from .output import write

__all__ = ["default_directory", "run"]

#: Where a host's files are meant to end up; the documentation and conf/qmigd.toml say so too.
_THERE = "/etc/qmigd/tls"


def default_directory(environ: Mapping[str, str], uid: int) -> Path:
    """Return ``/etc/qmigd/pki`` for root, and a place of one's own for anybody else."""
    if uid != 0:
        for variable, below in (("XDG_CONFIG_HOME", "qmigd/pki"), ("HOME", ".config/qmigd/pki")):
            if os.path.isabs(base := environ.get(variable, "")):
                return Path(base, below)
    return Path("/etc/qmigd/pki")


def run(options: argparse.Namespace) -> Exit:
    """Carry out what the command line says.

    :raises QmigdError: it cannot be done; the text says why.
    """
    directory = Path(
        os.path.abspath(options.dir)
        if options.dir is not None
        else default_directory(os.environ, os.getuid())
    )
    now = datetime.now(UTC)
    act = {"init": _init, "host": _host}[options.action]
    try:
        answer, text = act(directory, now, options)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or directory} cannot be written: {error.strerror}; '--dir' names "
            f"another directory."
        ) from None
    write(sys.stdout, json.dumps(answer, indent=2) if options.json else text)
    return Exit.OK


def _init(
    directory: Path, now: datetime, options: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    paths = directory / "ca-cert.pem", directory / "ca-key.pem"
    for path in paths:
        if os.path.lexists(path) and not options.force:
            raise ArgumentError(
                f"There is {path} already, and the certificates that this CA has signed would be "
                f"good for nothing without it. '--dir' makes another CA beside it; '--force' "
                f"replaces it."
            )
    made = new_authority(now, options.days)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _replace(paths[1], made.key_pem, 0o600)
    _replace(paths[0], made.certificate_pem, 0o644)
    answer = {"certificate": str(paths[0]), "key": str(paths[1]), **_about(made)}
    return answer, (
        f"Made a CA, valid until {answer['expires'][:10]}:\n"
        f"  {paths[0]}   its certificate, for every host\n"
        f"  {paths[1]}    its key: whoever has it can pass for any host. It should be\n"
        f"  {' ' * len(str(paths[1]))}    on no hypervisor, and have a copy in a safe place.\n"
        f"Then 'qmigctl pki host NAME ADDRESS' makes a certificate for each host."
    )


def _host(
    directory: Path, now: datetime, options: argparse.Namespace
) -> tuple[dict[str, Any], str]:
    names = checked_names(options.name)
    authority = directory / "ca-cert.pem"
    if not os.path.lexists(authority):
        raise ConfigError(
            f"There is no CA in {directory}: 'qmigctl pki init' makes one, and '--dir' says where "
            f"one is."
        )
    target = directory / "hosts" / names[0]
    if os.path.lexists(target) and not options.force:
        raise ArgumentError(
            f"There is {target} already. '--force' replaces it, with a new key; the old "
            f"certificate stays good until it ends."
        )
    made = new_host(load_authority(authority, directory / "ca-key.pem"), names, now, options.days)
    target.parent.mkdir(mode=0o700, exist_ok=True)
    files = {
        "ca-cert.pem": (authority.read_bytes(), 0o644),
        "server-cert.pem": (made.certificate_pem, 0o644),
        "server-key.pem": (made.key_pem, 0o600),
    }
    fresh = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))  # with mode 700
    try:
        for name, (data, mode) in files.items():
            _create(fresh / name, data, mode)
        for part in ("cert", "key"):
            (fresh / f"client-{part}.pem").symlink_to(f"server-{part}.pem")
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # what it became, or what it replaced
    there = {
        "certificate": f"{_THERE}/server-cert.pem",
        "key": f"{_THERE}/server-key.pem",
        "ca": f"{_THERE}/ca-cert.pem",
    }
    answer = {"directory": str(target), "names": list(names), **_about(made), "tls": there}
    lines = "\n".join(f'  {key} = "{path}"' for key, path in there.items())
    return answer, (
        f"Made a certificate for {', '.join(names)}, valid until {answer['expires'][:10]}:\n"
        f"  {target}\n"
        f"That host, and no other, needs all that is in there:\n"
        f"  tar -C {shlex.quote(str(target))} -c . | ssh root@{names[0]} \\\n"
        f"    'mkdir -p {_THERE} && tar -C {_THERE} -x --no-same-owner'\n"
        f"and in its configuration:\n"
        f"  [tls]\n{lines}\n"
        f"A daemon that has these lines already reads the new files on SIGHUP."
    )


def _about(made: Issued) -> dict[str, Any]:
    return {
        "expires": made.certificate.not_valid_after_utc.isoformat(),
        "fingerprint": fingerprint(made.certificate),
    }


def _create(path: Path, data: bytes, mode: int) -> None:
    """Make a new file; it never has a wider mode than ``mode``."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)  # whatever the umask is
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Put a file in the place of another one, or of none, at once."""
    fresh = path.with_name(f".{path.name}.new")
    with suppress(FileNotFoundError):
        fresh.unlink()
    _create(fresh, data, mode)
    os.replace(fresh, path)


def _swap(fresh: Path, target: Path) -> None:
    """Put a directory in the place of another one, which then has its name, or of none."""
    old = fresh.with_name(f"{fresh.name}.old")
    if os.path.lexists(target):
        target.rename(old)
    fresh.rename(target)
    if os.path.lexists(old):
        old.rename(fresh)
