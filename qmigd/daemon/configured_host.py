"""What this host can do, as far as its configuration lets it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..channels import kernel_tls
from ..interfaces import KERNEL, POLICY, Answer, Host, No, Yes
from ..transports.mptcp import is_available
from .config import Config, TlsConfig
from .host import gather

__all__ = ["configured"]


def configured(config: Config, run_dir: Path) -> Host:
    """Find out what this host can do.

    :raises OSError: the run directory cannot be written to.
    """
    facts = replace(gather(), mptcp=_mptcp(config), kernel_tls=_NO_TLS)
    if config.tls_policy == "off":
        if config.tls is not None:
            facts = replace(facts, tls=No("it is switched off", POLICY))
        return facts
    if config.tls is None:
        return facts
    return replace(
        facts,
        tls=Yes(),
        kernel_tls=_NO_MPTCP_TLS if facts.mptcp else _kernel_tls(),
        tls_directory=str(_for_qemu(config.tls, run_dir / "tls")),
    )


_NO_TLS = No("there is no TLS here that the kernel could take over")

#: With Multipath TCP, any connection may turn out to be one.
_NO_MPTCP_TLS = No("Linux does not do the TLS of Multipath TCP ('mptcp' in [daemon])", POLICY)


def _mptcp(config: Config) -> Answer:
    if not config.daemon.mptcp:
        return No("it is switched off ('mptcp' in [daemon])", POLICY)
    reason = is_available()
    return No(reason, KERNEL) if reason else Yes()


def _kernel_tls() -> Answer:
    found = kernel_tls.probe()
    if not found:
        return No(found.reason, KERNEL)
    # Any of them may come out of a handshake, and it shows only then.
    if missing := [name for name in kernel_tls.CIPHERS if name not in found.ciphers]:
        return No(f"its kernel TLS lacks {', '.join(missing)}", KERNEL)
    return Yes()


def _for_qemu(tls: TlsConfig, directory: Path) -> Path:
    """Make a directory that shows the certificates under the names that QEMU wants."""
    directory.mkdir(mode=0o700)
    for name, file in (
        ("ca-cert.pem", tls.authority),
        ("server-cert.pem", tls.certificate),
        ("server-key.pem", tls.key),
        ("client-cert.pem", tls.certificate),
        ("client-key.pem", tls.key),
    ):
        (directory / name).symlink_to(file)
    return directory
