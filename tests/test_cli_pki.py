"""``qmigctl pki``: what it makes, where it puts it, and that qmigd, OpenSSL and QEMU take it."""

from __future__ import annotations

import io
import json
import os
import shutil
import ssl
import stat
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.channels.authority import checked_names, new_authority, new_host
from qmigd.channels.credentials import Credentials
from qmigd.channels.identity import check_host
from qmigd.cli.main import main
from qmigd.cli.options import Exit
from qmigd.cli.pki import default_directory
from qmigd.daemon.config_file import parse
from qmigd.errors import ArgumentError, ConfigError
from tests.rig import qemus
from tests.rig.case import RigCase
from tests.rig.certificates import Files
from tests.rig.daemons import free_ports
from tests.rig.process import temporary_directory
from tests.rig.proofs import compare_ram, counted_without_a_gap, only_one_runs
from tests.rig.qmp import QmpError

_NAMES = ("hosta.example", "192.0.2.7")


def qmigctl(*words: str) -> tuple[int, str, str]:
    """Run qmigctl in this process; returns its exit code and what it printed."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            code = end.code
    said = []
    for stream in (out, err):
        stream.seek(0)
        said.append(stream.read())
    assert isinstance(code, int)
    return code, said[0], said[1]


def make(directory: Path, *names: str) -> Path:
    """Make a CA, unless there is one, and a host's certificate; returns the host's directory."""
    if not directory.exists():
        qmigctl("pki", "init", "--dir", str(directory))
    code, out, err = qmigctl("pki", "host", "--dir", str(directory), "--json", *names)
    assert code == Exit.OK, err
    return Path(json.loads(out)["directory"])


def files(host: Path) -> Files:
    return Files(host / "server-cert.pem", host / "server-key.pem", host / "ca-cert.pem")


class PkiCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(self.mktemp()).absolute()

    def pki(self, *words: str) -> tuple[int, str, str]:
        return qmigctl("pki", *words, "--dir", str(self.directory))

    def refused(self, *words: str) -> str:
        code, out, err = self.pki(*words)
        self.assertEqual((Exit.REFUSED, ""), (code, out))
        self.assertRegex(err, r"\Aqmigctl: [^\n]*[.]\n\Z")
        return err

    def modes(self) -> dict[str, int]:
        return {
            str(path.relative_to(self.directory)): stat.S_IMODE(path.lstat().st_mode)
            for path in self.directory.rglob("*")
            if not path.is_symlink()
        }


class MadeTests(PkiCase):
    """What is made, and that it is good."""

    def test_files(self) -> None:
        """Keys and directories are for their owner alone, whatever the umask; nothing is left."""
        old = os.umask(0)
        try:
            make(self.directory, *_NAMES)
            self.pki("host", *_NAMES, "--force")
        finally:
            os.umask(old)
        host = f"hosts/{_NAMES[0]}"
        self.assertEqual(0o700, stat.S_IMODE(self.directory.stat().st_mode))
        self.assertEqual(
            {
                "ca-cert.pem": 0o644,
                "ca-key.pem": 0o600,
                "hosts": 0o700,
                host: 0o700,
                f"{host}/ca-cert.pem": 0o644,
                f"{host}/server-cert.pem": 0o644,
                f"{host}/server-key.pem": 0o600,
            },
            self.modes(),
        )
        for part in ("cert", "key"):
            link = self.directory / host / f"client-{part}.pem"
            self.assertEqual(f"server-{part}.pem", os.readlink(link))

    def test_qmigd_takes_it(self) -> None:
        """The daemon loads them, and finds the names that were given."""
        host = make(self.directory, "HostA.example.", "192.0.2.7", "2001:DB8:0::7", "hosta.example")
        credentials = files(host).load()
        self.assertEqual(("hosta.example", "192.0.2.7", "2001:db8::7"), credentials.names)
        self.assertEqual([], credentials.warnings(datetime.now(UTC)))
        for name in credentials.names:
            check_host(credentials.chain[0], name)
        self.assertEqual("CN=hosta.example", credentials.chain[0].subject.rfc4514_string())

    def test_verifiers_take_it(self) -> None:
        """OpenSSL at its strictest and cryptography's own verifier take it, in both roles."""
        host = make(self.directory, *_NAMES)
        for purpose in ("sslserver", "sslclient"):
            done = subprocess.run(
                ["openssl", "verify", "-x509_strict", "-purpose", purpose]
                + ["-verify_hostname", _NAMES[0], "-CAfile", str(host / "ca-cert.pem")]
                + [str(host / "server-cert.pem")],
                capture_output=True,
                text=True,
                check=False,
            )
            self.assertEqual(0, done.returncode, done.stderr)
        authority, certificate = (
            x509.load_pem_x509_certificate((host / name).read_bytes())
            for name in ("ca-cert.pem", "server-cert.pem")
        )
        builder = PolicyBuilder().store(Store([authority]))
        chain = builder.build_server_verifier(x509.DNSName(_NAMES[0])).verify(certificate, [])
        self.assertEqual([certificate, authority], chain)
        builder.build_client_verifier().verify(certificate, [])
        # Python's own ssl, another user of OpenSSL
        context = ssl.create_default_context(cafile=str(host / "ca-cert.pem"))
        context.load_cert_chain(host / "server-cert.pem", host / "server-key.pem")

    def test_no_further_authority(self) -> None:
        """The CA says of itself that it signs hosts, and no further CAs."""
        authority = new_authority(datetime.now(UTC), 1)
        constraints = authority.certificate.extensions.get_extension_for_class(
            x509.BasicConstraints
        )
        self.assertEqual((True, 0, True), (constraints.value.ca, constraints.value.path_length,
                                           constraints.critical))  # fmt: skip

    def test_how_long(self) -> None:
        """A CA is good for ten years and a host for two, or as said; no host outlives its CA."""
        host = make(self.directory, *_NAMES)
        now = datetime.now(UTC)

        def days() -> list[int]:
            return [
                round((one.not_valid_after_utc - now) / timedelta(1))
                for one in files(host).load().chain
            ]

        self.assertEqual([730, 3650], days())
        self.pki("host", *_NAMES, "--force", "--days", "10")
        self.assertEqual([10, 3650], days())
        self.pki("init", "--force", "--days", "20")
        self.pki("host", *_NAMES, "--force")
        self.assertEqual([20, 20], days())

    def test_clocks(self) -> None:
        """Certificates are good on a host whose clock is an hour behind."""
        host = make(self.directory, *_NAMES)
        for one in files(host).load().chain:
            early = datetime.now(UTC) - one.not_valid_before_utc
            self.assertGreater(early, timedelta(minutes=59))

    def test_each_its_own_key(self) -> None:
        """No two hosts have the same key, and a renewed certificate has a new one."""
        keys = {(make(self.directory, name) / "server-key.pem").read_bytes() for name in ("a", "b")}
        keys.add((self.directory / "ca-key.pem").read_bytes())
        self.pki("host", "a", "--force")
        keys.add((self.directory / "hosts/a/server-key.pem").read_bytes())
        self.assertEqual(4, len(keys))

    def test_several_authorities(self) -> None:
        """Further CAs after one's own go to the hosts as well, so that both are trusted."""
        other = self.directory.with_name("other")
        make(other, "b")
        make(self.directory, "a")
        with (self.directory / "ca-cert.pem").open("ab") as file:
            file.write((other / "ca-cert.pem").read_bytes())
        host = make(self.directory, "c")
        text = (host / "ca-cert.pem").read_text()
        self.assertEqual(2, text.count("BEGIN CERTIFICATE"))
        files(host).load()


class SaidTests(PkiCase):
    """What is printed can be used as it is."""

    def test_configuration(self) -> None:
        """The lines for the configuration are good ones; the same are in the JSON."""
        self.pki("init")
        _, out, _ = self.pki("host", *_NAMES)
        lines = [line.strip() for line in out.splitlines()]
        text = "\n".join(lines[lines.index("[tls]") :][:4])
        tls = parse(text, "q.toml", {}, 0).tls
        assert tls is not None
        _, out, _ = self.pki("host", *_NAMES, "--force", "--json")
        answer = json.loads(out)
        self.assertEqual(
            {"certificate": str(tls.certificate), "key": str(tls.key), "ca": str(tls.authority)},
            answer["tls"],
        )
        self.assertEqual(list(_NAMES), answer["names"])
        credentials = files(Path(answer["directory"])).load()
        self.assertEqual(
            (credentials.fingerprint, credentials.expires.isoformat()),
            (answer["fingerprint"], answer["expires"]),
        )

    def test_copying(self) -> None:
        """The command that copies a host's directory brings all that is needed, modes too."""
        self.directory = self.directory / "it's here"
        self.pki("init")
        _, out, _ = self.pki("host", *_NAMES)
        there = Path(self.mktemp()).absolute()
        script = out[out.index("  tar ") : out.index("and in its")].replace(
            "/etc/qmigd/tls", str(there)
        )
        self.assertIn("| ssh root@hosta.example", script)
        # ssh runs a command in a shell, of another host
        script = script.replace("ssh root@hosta.example", "sh -c")
        for _ in range(2):  # also when there is an older one
            done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
            self.assertEqual((0, ""), (done.returncode, done.stderr))
        files(there).load()
        Credentials.load(there / "client-cert.pem", there / "client-key.pem", there / "ca-cert.pem")
        self.assertEqual(0o700, stat.S_IMODE(there.stat().st_mode))

    def test_authority(self) -> None:
        """The CA's files are named in text and in JSON."""
        _, out, _ = self.pki("init")
        self.assertIn(str(self.directory / "ca-key.pem"), out)
        _, out, _ = self.pki("init", "--force", "--json")
        answer = json.loads(out)
        self.assertEqual(str(self.directory / "ca-cert.pem"), answer["certificate"])
        self.assertEqual(str(self.directory / "ca-key.pem"), answer["key"])

    def test_no_key_is_shown(self) -> None:
        """Nothing of a key is printed."""
        shown = "".join("".join(self.pki(*words)[1:]) for words in (["init"], ["host", "a"]))
        for path in self.directory.rglob("*-key.pem"):
            for line in path.read_text().splitlines()[1:-1]:
                self.assertNotIn(line, shown)

    def test_default_directory(self) -> None:
        """Root's is in /etc, another user's among the user's own configuration."""
        home = {"HOME": "/home/u"}
        self.assertEqual(Path("/etc/qmigd/pki"), default_directory(home, 0))
        self.assertEqual(Path("/home/u/.config/qmigd/pki"), default_directory(home, 7))
        self.assertEqual(Path("/c/qmigd/pki"), default_directory({"XDG_CONFIG_HOME": "/c"}, 7))


class RefusedTests(PkiCase):
    def test_nothing_is_overwritten(self) -> None:
        """What is there is left alone, and '--force' named."""
        make(self.directory, *_NAMES)
        before = {path: path.read_bytes() for path in self.directory.rglob("*.pem")}
        self.assertRegex(self.refused("init"), r"ca-cert.pem already, .*'--force' replaces it\.")
        self.assertRegex(self.refused("host", *_NAMES), r"already\. '--force' replaces it, with")
        (self.directory / "ca-cert.pem").unlink()
        self.assertIn("ca-key.pem already", self.refused("init"))
        for path, data in before.items():
            if path.exists():
                self.assertEqual(data, path.read_bytes())

    def test_names(self) -> None:
        """What is no name of a host is refused, and nothing made."""
        self.pki("init")
        for name, sentence in (
            ("", "neither a DNS name nor an IP address"),
            ("a b", "neither"),
            ("a/b", "neither"),
            ("..", "neither"),
            ("-a", "neither"),
            ("x" * 64, "neither"),
            ("192.0.2", "neither"),
            ("192.0.2.256", "neither"),
            ("bücher.example", "'xn--...'"),
            ("*.example", "has a wildcard"),
            ("0.0.0.0", "not an address that one host"),
            ("::", "not an address that one host"),
            ("fe80::1%eth0", "not an address that one host"),
        ):
            self.assertIn(sentence, self.refused("host", "--", name) if name[:1] == "-" else
                          self.refused("host", name))  # fmt: skip
        self.assertFalse((self.directory / "hosts").exists())

    def test_no_authority(self) -> None:
        """Without a CA there are no hosts; what is wrong with one is said."""
        self.assertIn(f"There is no CA in {self.directory}: 'qmigctl", self.refused("host", "a"))
        self.pki("init")
        key = self.directory / "ca-key.pem"
        good = key.read_bytes()
        key.chmod(0o644)
        self.assertIn(f"say 'chmod 600 {key}'", self.refused("host", "a"))
        key.unlink()
        self.assertIn("There is no file", self.refused("host", "a"))
        other = self.directory.with_name("other")
        make(other, "b")
        shutil.copy(other / "ca-key.pem", key)
        self.assertIn("is not the one of the CA's certificate", self.refused("host", "a"))
        key.write_bytes(good)
        self.assertEqual(Exit.OK, self.pki("host", "a")[0])

    def test_days(self) -> None:
        """A certificate has to be good for a day at least, and to end some day."""
        for days in ("0", "-1", "99999999", "9" * 30):
            self.assertIn(f"cannot be good for {days} days", self.refused("init", f"--days={days}"))
        self.assertFalse(self.directory.exists())

    def test_expired_authority(self) -> None:
        """A CA that has expired signs nothing any more."""
        now = datetime.now(UTC)
        authority = new_authority(now, 1)
        error = self.assertRaises(ConfigError, new_host, authority, ["a"], now + timedelta(2), 1)
        self.assertIn("'qmigctl pki init'", error.text)

    def test_cannot_be_written(self) -> None:
        """A directory that cannot be made is named with the reason."""
        (blocked := Path(self.mktemp())).write_text("")
        code, _, err = qmigctl("pki", "init", "--dir", str(blocked / "x"))
        self.assertEqual(Exit.REFUSED, code)
        self.assertRegex(err, f"{blocked.name}/x cannot be written: Not a directory; '--dir' names")

    def test_usage(self) -> None:
        """A wrong action is said to be one, with the nearest; JSON stays JSON."""
        self.assertIn("no command 'inti'; did you mean 'init'", qmigctl("pki", "inti")[2])
        self.assertIn("required: ACTION", qmigctl("pki")[2])
        self.assertIn("required: NAME", qmigctl("pki", "host")[2])
        code, out, _ = self.pki("host", "*.a", "--json")
        self.assertEqual((Exit.REFUSED, "argument"), (code, json.loads(out)["error"]["class"]))

    @given(st.text(max_size=30))
    def test_any_name(self, name: str) -> None:
        """Whatever is given as a name, it is refused or makes a certificate for that name."""
        try:
            (checked,) = checked_names([name])
        except ArgumentError:
            return
        self.assertTrue(checked.isprintable() and "/" not in checked and checked not in (".", ".."))


class QemuTests(RigCase):
    """QEMU takes such a directory as it is, on both ends, each of which checks the other."""

    def credentials(self, guest: Any, directory: Path, endpoint: str) -> None:
        guest.qmp(
            "object-add",
            {
                "qom-type": "tls-creds-x509",
                "id": "tls0",
                "dir": str(directory),
                "endpoint": endpoint,
                "verify-peer": True,
            },
        )

    def check_move(self, label: str) -> None:
        """Move a guest over QEMU's own TLS, with RAM checked."""
        directory = Path(temporary_directory())
        self.addCleanup(shutil.rmtree, directory)
        hosta, hostb = (make(directory / "pki", name, "127.0.0.1") for name in ("hosta", "hostb"))
        qemu = qemus.require(label)
        source = self.guest(qemu, "source").start()
        destination = self.guest(qemu, "destination", incoming=True, paused=True).start()
        self.credentials(source, hosta, "client")
        self.credentials(destination, hostb, "server")
        uri = f"tcp:127.0.0.1:{free_ports()[0]}"
        for guest in (source, destination):
            guest.set_capabilities("events", "return-path")
            guest.qmp("migrate-set-parameters", {"tls-creds": "tls0"})
        destination.qmp("migrate-incoming", uri=uri)
        source.qmp("migrate-set-parameters", {"tls-hostname": "hostb"})
        source.qmp("migrate", uri=uri)
        for guest in (source, destination):
            self.assertEqual("completed", guest.wait_migration("completed", "failed"))
        compare_ram(source, destination)
        destination.qmp("cont")
        only_one_runs(destination, source)
        counted_without_a_gap(source, destination)

    def test_7_2(self) -> None:
        """QEMU 7.2 moves a guest with them."""
        self.check_move("7.2")

    def test_10_0(self) -> None:
        """QEMU 10.0 moves a guest with them."""
        self.check_move("10.0")

    def test_what_qemu_refuses(self) -> None:
        """QEMU does look: a directory whose certificate another CA has signed is refused."""
        directory = Path(temporary_directory())
        self.addCleanup(shutil.rmtree, directory)
        host = make(directory / "pki", "hosta")
        make(directory / "other", "hosta")
        shutil.copy(directory / "other/ca-cert.pem", host / "ca-cert.pem")
        guest = self.guest(qemus.require("7.2"), paused=True).start()
        error = self.assertRaises(QmpError, self.credentials, guest, host, "server")
        self.assertIn("certificate hasn't got a known issuer", str(error))
