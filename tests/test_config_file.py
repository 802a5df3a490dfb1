"""The configuration file: what is accepted, what it means, and what is said of the rest."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.daemon.config import (
    Config,
    GuestConfig,
    TlsConfig,
    default_state_dir,
    guest_config,
    unknown_names,
)
from qmigd.daemon.config_file import load, parse
from qmigd.daemon.toml_lines import find_lines
from qmigd.errors import ArgumentError, ConfigError
from qmigd.guests.memory.options import MemoryOptions
from qmigd.negotiation.allow import Allow
from qmigd.negotiation.policy import Policy
from qmigd.transports.uri import TcpAddress, UnixAddress, VsockAddress

ENVIRON = {"PATH": os.environ.get("PATH", "/bin:/usr/bin"), "HOME": "/home/u"}
EXAMPLE = Path(__file__).parents[1] / "conf" / "qmigd.toml"


def read(text: str) -> Config:
    return parse(text, "q.toml", ENVIRON, 0)


class GoodFileTests(SynchronousTestCase):
    def test_empty(self) -> None:
        """An empty file is a good one; everything has its default."""
        config = read("")
        daemon = config.daemon
        self.assertEqual((TcpAddress("127.0.0.1", 16516),), daemon.listen)
        self.assertEqual("/run/qmigd/qmigd.sock", daemon.monitor)
        self.assertEqual(Path("/var/lib/qmigd"), daemon.state_dir)
        self.assertEqual(range(49152, 49216), daemon.direct_ports)
        self.assertEqual("measure", daemon.zero_copy)
        self.assertFalse(daemon.mptcp)
        self.assertFalse(daemon.insecure)
        self.assertEqual(
            (10.0, 10.0, 10.0),
            (daemon.handshake_deadline, daemon.peer_deadline, daemon.guest_deadline),
        )
        self.assertEqual(Policy(), config.policy)
        self.assertEqual((None, "off"), (config.tls, config.tls_policy))
        self.assertEqual("keep", config.source_after)
        self.assertEqual({}, config.guests)

    def test_everything(self) -> None:
        """Each key is read into its place."""
        config = read(
            """
            [daemon]
            listen = ["tcp:0.0.0.0:99", "unix:/run/x", "vsock::99"]
            listen-group = "daemon"
            mptcp = true
            monitor = "unix:/run/m"
            state-dir = "/srv/q"
            direct-ports = "1000-1001"
            zero-copy = "splice"
            insecure = true
            handshake-deadline = 1.5
            peer-deadline = 2
            guest-deadline = 3
            [tls]
            certificate = "/c"
            key = "/k"
            ca = "/a"
            allow = ["hosta.example"]
            [policy]
            tls = "require"
            prefer = ["relay", "multifd"]
            require = ["postcopy-ram"]
            exclude = ["direct"]
            source-after = "quit"
            legacy = "refuse"
            [guest.one]
            qmp = "unix:/run/one"
            [guest."two three"]
            launch = ["sh", "-c", "true"]
            [guest.three]
            memory = { size = "64M", incoming = true }
            """
        )
        daemon = config.daemon
        self.assertEqual(
            (
                TcpAddress("0.0.0.0", 99, mptcp=True),
                UnixAddress("/run/x", "daemon"),
                VsockAddress(None, 99),
            ),
            daemon.listen,
        )
        self.assertTrue(daemon.mptcp)
        self.assertEqual("/run/m", daemon.monitor)
        self.assertEqual(Path("/srv/q"), daemon.state_dir)
        self.assertEqual(range(1000, 1002), daemon.direct_ports)
        self.assertEqual("splice", daemon.zero_copy)
        self.assertTrue(daemon.insecure)
        self.assertEqual(
            (1.5, 2.0, 3.0),
            (daemon.handshake_deadline, daemon.peer_deadline, daemon.guest_deadline),
        )
        self.assertEqual(
            Policy(("relay", "multifd"), ("postcopy-ram",), ("direct",)), config.policy
        )
        self.assertEqual(
            TlsConfig(Path("/c"), Path("/k"), Path("/a"), Allow.of(["hosta.example"])), config.tls
        )
        self.assertEqual("require", config.tls_policy)
        self.assertEqual("quit", config.source_after)
        self.assertEqual(
            {
                "one": GuestConfig("one", qmp="/run/one"),
                "two three": GuestConfig("two three", launch=("sh", "-c", "true")),
                "three": GuestConfig("three", memory=MemoryOptions(64 << 20, incoming=True)),
            },
            config.guests,
        )

    def test_ports(self) -> None:
        """One port, and none at all, can be said as well."""
        for text, ports in (("", range(0)), ("7", range(7, 8)), (" 7 - 9 ", range(7, 10))):
            self.assertEqual(ports, read(f'[daemon]\ndirect-ports = "{text}"').daemon.direct_ports)

    def test_ordinary_user(self) -> None:
        """An ordinary user's defaults lie in directories of that user's own."""
        environ = {"XDG_RUNTIME_DIR": "/run/user/7", "HOME": "/home/u"}
        daemon = parse("", "q.toml", environ, 7).daemon
        self.assertEqual("/run/user/7/qmigd/qmigd.sock", daemon.monitor)
        self.assertEqual(Path("/home/u/.local/state/qmigd"), daemon.state_dir)
        self.assertEqual(Path("/s/qmigd"), default_state_dir({"XDG_STATE_HOME": "/s"}, 7))
        self.assertEqual(Path("/var/lib/qmigd"), default_state_dir({}, 7))

    def test_example(self) -> None:
        """The example starts as it is, with the defaults."""
        self.assertEqual(read(""), load(str(EXAMPLE), ENVIRON, 0))

    def test_example_shows_the_defaults(self) -> None:
        """What the example shows as a default is the default; every key is in it."""
        lines = EXAMPLE.read_text("utf-8").splitlines()
        shown = [line.removeprefix("#") for line in lines if line[:2] > "# " or line[:1] != "#"]
        daemon = "\n".join(shown).partition("[policy]")[0]
        self.assertEqual(read("").daemon, read(daemon).daemon)
        keys = {line.partition("=")[0].strip() for line in shown if "=" in line}
        self.assertEqual(
            {
                "listen", "listen-group", "mptcp", "monitor", "state-dir", "direct-ports",
                "zero-copy", "insecure",
                "handshake-deadline", "peer-deadline", "guest-deadline",
                "certificate", "key", "ca", "allow",
                "tls", "prefer", "require", "exclude", "source-after", "legacy", "qmp", "launch",
                "memory", "legacy-listen",
            },
            keys,
        )  # fmt: skip


class LegacyTests(SynchronousTestCase):
    """What is said of peers without a qmigd."""

    def refused(self, text: str) -> str:
        return str(self.assertRaises(ConfigError, read, text).text)

    def test_read(self) -> None:
        """A guest's port for plain streams, and what is done where nobody greets."""
        config = read(
            '[policy]\nlegacy = "allow"\n'
            '[guest.a]\nqmp = "unix:/a"\nlegacy-listen = "tcp:[::1]:4444"\n'
            '[guest.b]\nqmp = "unix:/b"\nlegacy-listen = "unix:/run/b"'
        )
        self.assertEqual("allow", config.policy.legacy)
        self.assertEqual(TcpAddress("::1", 4444), config.guests["a"].legacy_listen)
        self.assertEqual(UnixAddress("/run/b"), config.guests["b"].legacy_listen)
        self.assertIn('must be "refuse" or "allow"', self.refused("[policy]\nlegacy = true"))

    def test_insecure(self) -> None:
        """Such a port beyond loopback is a network without TLS, and has to be called so."""
        guest = '[guest.a]\nqmp = "unix:/a"\nlegacy-listen = "tcp:0.0.0.0:4444"'
        self.assertRegex(
            self.refused(guest),
            r'line 3: \[guest.a\] legacy-listen "tcp:0.0.0.0:4444": other hosts can reach that, .*'
            r"'insecure = true' in \[daemon\]\.$",
        )
        self.assertIn("other hosts can reach that", self.refused(TLS + guest))
        read(f"[daemon]\ninsecure = true\n{guest}")

    def test_tls(self) -> None:
        """Where TLS is required, or names are, there is no plain stream in either direction."""
        guest = '[guest.a]\nqmp = "unix:/a"\nlegacy-listen = "unix:/run/a"'
        read(f"{TLS}{guest}")
        required = f'{TLS}[policy]\ntls = "require"\n'
        self.assertIn("TLS is required", self.refused(f"{required}{guest}"))
        self.assertIn('has legacy = "allow", but TLS', self.refused(f'{required}legacy = "allow"'))
        named = f'{TLS}allow = ["hosta.example"]\n{guest}'
        self.assertIn("[tls] allow names the peers", self.refused(named))

    def test_taken(self) -> None:
        """An address is one guest's alone."""
        guest = '[guest.{0}]\nqmp = "unix:/{0}"\nlegacy-listen = "tcp:127.0.0.1:{1}"\n'
        for text, reason in (
            (guest.format("a", 16516), "[daemon] listen has it too"),
            (guest.format("a", 49152), "[daemon] direct-ports has 49152 in it"),
            (guest.format("a", 44) + guest.format("b", 44), "[guest.a] has it too"),
            (
                '[guest.a]\nqmp = "unix:/a"\nlegacy-listen = "in-band:tcp:127.0.0.1:44"',
                "there is no handshake in a plain stream",
            ),
        ):
            self.assertIn(reason, self.refused(text))

    def test_in_band(self) -> None:
        """An address is listened on in one form of the handshake, and else is like any other."""
        listen = '[daemon]\nlisten = ["{}"]'
        for text, reason in (
            (listen.format('tcp:127.0.0.1:44", "in-band:tcp:127.0.0.1:44'), "twice"),
            (listen.format("in-band:tcp:127.0.0.1:49152"), "direct-ports has 49152 in it"),
            (listen.format("in-band:tcp:0.0.0.0:44"), "which other hosts can reach"),
        ):
            self.assertIn(reason, self.refused(text))


TLS = '[tls]\ncertificate = "/c"\nkey = "/k"\nca = "/a"\n'


class TlsTests(SynchronousTestCase):
    def refused(self, text: str) -> str:
        return str(self.assertRaises(ConfigError, read, text).text)

    def test_policy(self) -> None:
        """With certificates TLS is preferred, unless the policy says otherwise, in either way."""
        for policy, meaning in (
            ("", "prefer"),
            ('tls = "off"', "off"),
            ('tls = "prefer"', "prefer"),
            ('tls = "require"', "require"),
            ('require = ["tls"]', "require"),
            ('exclude = ["tls"]', "off"),
            ('tls = "require"\nrequire = ["tls"]', "require"),
        ):
            self.assertEqual(meaning, read(f"{TLS}[policy]\n{policy}").tls_policy)

    def test_policy_says_two_things(self) -> None:
        """A policy that contradicts itself is refused."""
        self.assertEqual(
            "q.toml, line 6: [policy] has tls = \"require\", and 'tls' in exclude; say it once.",
            self.refused(f'{TLS}[policy]\ntls = "require"\nexclude = ["tls"]'),
        )
        self.assertIn("in require", self.refused(f'{TLS}[policy]\ntls="off"\nrequire=["tls"]'))

    def test_no_certificates(self) -> None:
        """Without certificates TLS can be off, and nothing else."""
        for policy in ('tls = "prefer"', 'tls = "require"', 'require = ["tls"]'):
            self.assertRegex(
                self.refused(f"[policy]\n{policy}"),
                r"^q.toml, line 2: \[policy\] asks for TLS \(.*\), but there are no certificates: "
                r"name them in \[tls\]; 'qmigctl pki' makes some\.$",
            )
        self.assertIsNone(read('[tls]\n[policy]\ntls = "off"').tls)
        self.assertIn('must be "off", "prefer" or "require"', self.refused("[policy]\ntls = true"))

    def test_all_or_none(self) -> None:
        """Certificate, key and CA go together."""
        self.assertEqual(
            "q.toml has 2 problems:\n"
            "  line 1: [tls] needs ca: certificate, key and ca go together; 'qmigctl pki' makes "
            "all three.\n"
            "  line 1: [tls] needs key: certificate, key and ca go together; 'qmigctl pki' makes "
            "all three.",
            self.refused('[tls]\ncertificate = "/c"'),
        )
        self.assertIn("3 problems", self.refused("[tls]\nallow = []"))
        self.assertIn(
            'line 2: [tls] key must be a whole path, "/...", not "k"',
            self.refused('[tls]\nkey = "k"'),
        )

    def test_allow(self) -> None:
        """Whose guests are taken: everybody's, a list, or a table with lists of guests."""
        for text, allow in (
            ("", Allow()),
            ("allow = []", Allow.of([])),
            ('allow = ["a", "192.0.2.0/24"]', Allow.of(["a", "192.0.2.0/24"])),
            ('allow = { a = ["x*"] }', Allow.of({"a": ["x*"]})),
            ('[tls.allow]\n"*.b" = []', Allow.of({"*.b": []})),
        ):
            tls = read(TLS + text).tls
            assert tls is not None
            self.assertEqual(allow, tls.allow)

    def test_bad_allow(self) -> None:
        """A pattern that makes no sense is named with its line."""
        for text, sentence in (
            ("allow = true", "must be a list of names of peers, or a table from them to lists"),
            ("allow = [1]", "must be a list of strings; a whole number is in it"),
            ('allow = ["a", "a"]', "names 'a' twice"),
            ('allow = ["a b"]', "cannot be used: 'a b' is no name"),
            ('allow = ["192.0.2.7/24"]', "cannot be used: '192.0.2.7/24' is not a network"),
            ('allow = { a = "x" }', '"a" must be a list of strings, not a string'),
        ):
            self.assertIn(f"q.toml, line 5: [tls] allow {sentence}", self.refused(TLS + text))

    def test_beyond_loopback(self) -> None:
        """With certificates a daemon may listen beyond loopback, unless TLS is off."""
        listen = '[daemon]\nlisten = ["tcp:192.0.2.1"]\n'
        read(listen + TLS)
        self.assertIn("no TLS", self.refused(f'{listen}{TLS}[policy]\ntls = "off"'))
        read(f'{listen}insecure = true\n{TLS}[policy]\ntls = "off"')


class BadFileTests(SynchronousTestCase):
    def refused(self, text: str) -> str:
        return str(self.assertRaises(ConfigError, read, text).text)

    def test_not_there(self) -> None:
        """A missing file is named."""
        error = self.assertRaises(ConfigError, load, "/nowhere/q.toml", ENVIRON, 0)
        self.assertIn("There is no configuration file /nowhere/q.toml", error.text)

    def test_unreadable(self) -> None:
        """A file that cannot be read, or is no text, is named with the reason."""
        error = self.assertRaises(ConfigError, load, "/", ENVIRON, 0)
        self.assertEqual("/ cannot be read: Is a directory.", error.text)
        path = self.mktemp()
        Path(path).write_bytes(b"[daemon]\n\xff")
        error = self.assertRaises(ConfigError, load, path, ENVIRON, 0)
        self.assertEqual(f"{path} is not UTF-8 from byte 9 on.", error.text)

    def test_syntax(self) -> None:
        """What is not TOML is named by its line."""
        self.assertRegex(self.refused("[daemon]\nlisten = [\n=\n"), r"^q\.toml, line 3: .*TOML")

    def test_unknown_key(self) -> None:
        """An unknown key is named with its line and the nearest one."""
        self.assertEqual(
            "q.toml, line 2: [daemon] has no key 'listn'; did you mean 'listen'?",
            self.refused('[daemon]\nlistn = ["tcp:::1"]'),
        )

    def test_unknown_table(self) -> None:
        """So is an unknown table, and a guest's key."""
        self.assertEqual(
            "q.toml, line 1: there is nothing called 'demon'; did you mean 'daemon'?",
            self.refused("[demon]"),
        )
        self.assertEqual(
            "q.toml, line 3: [guest.g] has no key 'pid'; there are qmp, launch, memory, "
            "legacy-listen.",
            self.refused('[guest.g]\nqmp = "unix:/a"\npid = 4'),
        )

    def test_tables(self) -> None:
        """A value where a table belongs is named."""
        self.assertIn(
            "'daemon' must be a table [daemon], not a whole number", self.refused("daemon = 3")
        )
        self.assertIn(
            "'guest' must be a table [guest.NAME], not a list", self.refused("guest = []")
        )
        self.assertIn(
            "line 2: 'guest.qmp' must be a table [guest.qmp], not a string",
            self.refused('[guest]\nqmp = "unix:/a"'),
        )

    def test_types(self) -> None:
        """A wrong type is named with what it is and what it should be."""
        for line, sentence in (
            ("insecure = 1", "insecure must be true or false, not a whole number"),
            ('insecure = "yes"', "insecure must be true or false, not a string"),
            ("peer-deadline = true", "peer-deadline must be a number of seconds, not true or"),
            ("listen = 'tcp:127.0.0.1:1'", "listen must be a list of strings, not a string"),
            ("listen = [1]", "listen must be a list of strings; a whole number is in it"),
            ("monitor = 1979-05-27", "monitor must be a string, not a date or time"),
            ("direct-ports = 49152", 'direct-ports must be a string such as "49152-49215"'),
        ):  # fmt: skip
            self.assertIn(f"q.toml, line 2: [daemon] {sentence}", self.refused(f"[daemon]\n{line}"))

    def test_values(self) -> None:
        """A value of the right type that is of no use is refused as well."""
        for line, sentence in (
            ("handshake-deadline = 0", "must be more than 0"),
            ("handshake-deadline = -1", "must be more than 0"),
            ("handshake-deadline = nan", "must be more than 0"),
            ("handshake-deadline = inf", "must be more than 0"),
            ("handshake-deadline = 86401", "at most 86400"),
            ('listen = ["fd:"]', "'incoming'"),
            ('listen = ["tcp:[::1"]', "cannot be used"),
            ('listen = ["rdma:h:1"]', "cannot be used"),
            ('listen = ["tcp:localhost", "tcp:localhost:16516"]', "twice"),
            ('listen = ["exec:ssh hostb"]', "nobody can listen on it"),
            ('listen = ["vsock:host"]', "is not vsock:CID:PORT"),
            ('listen = ["vsock:1:49152"]', "has 49152 in it, where the daemon listens"),
            ('listen-group = "daemon"', "for unix sockets, and there is none in listen"),
            ('listen = ["unix:/a"]\nlisten-group = "no such"', "does not exist on this host"),
            ("mptcp = 1", "must be true or false"),
            ('monitor = "/run/q"', 'must be a unix socket with its whole path, "unix:/'),
            ('monitor = "tcp:localhost:1"', 'must be a unix socket with its whole path, "unix:/'),
            ('monitor = "unix:q.sock"', 'must be a unix socket with its whole path, "unix:/'),
            (f'monitor = "unix:/{"x" * 107}"', "too long"),
            ('state-dir = "lib"', "must be a whole path"),
            ('state-dir = ""', "must not be empty"),
            ('zero-copy = "copy"', 'one of "measure", "off", "splice", "zerocopy"'),
            ("zero-copy = true", 'one of "measure", "off", "splice", "zerocopy"'),
            ('direct-ports = "9-8"', "from a lower port to a higher one"),
            ('direct-ports = "0-8"', "from a lower port to a higher one"),
            ('direct-ports = "1-65536"', "from a lower port to a higher one"),
            ('direct-ports = "1-2-3"', "must be two ports"),
            ('direct-ports = "a-b"', "must be two ports"),
            (f'direct-ports = "1-{"9" * 5000}"', "must be two ports"),
            ('direct-ports = "16000-17000"', "has 16516 in it, where the daemon listens"),
        ):
            with self.subTest(line):
                self.assertIn(sentence, self.refused(f"[daemon]\n{line}"))

    def test_beyond_loopback(self) -> None:
        """Listening beyond loopback is refused, because there is no TLS, unless one insists."""
        for address in ("0.0.0.0", "[::]", "192.0.2.1", "host.example", ""):
            with self.subTest(address):
                text = f'[daemon]\nlisten = ["tcp:{address}:16516"]'
                self.assertRegex(
                    self.refused(text), r"line 2: .* no TLS: .*\[tls\].*'insecure = true'\.$"
                )
                read(f"{text}\ninsecure = true")
        for address in ("127.0.0.1", "127.8.8.8", "[::1]", "localhost"):
            read(f'[daemon]\nlisten = ["tcp:{address}:16516"]')

    def test_policy(self) -> None:
        """A policy that contradicts itself is refused."""
        self.assertEqual(
            "q.toml, line 3: [policy] has 'tls' in require and in exclude.",
            self.refused('[policy]\nrequire = ["tls"]\nexclude = ["tls"]'),
        )
        self.assertIn(
            "in prefer and in exclude", self.refused('[policy]\nprefer=["a"]\nexclude=["a"]')
        )
        self.assertIn("names 'a' twice", self.refused('[policy]\nprefer = ["a", "a"]'))
        self.assertIn('must be "keep" or "quit"', self.refused('[policy]\nsource-after = "kill"'))

    def test_guests(self) -> None:
        """A guest needs one of qmp and launch, a program that is there, a socket of its own."""
        self.assertIn("line 1: [guest.g] needs exactly one of qmp", self.refused("[guest.g]"))
        self.assertIn(
            "line 1: [guest.g] needs exactly one of qmp",
            self.refused('[guest.g]\nqmp = "unix:/a"\nlaunch = ["sh"]'),
        )
        self.assertEqual(
            "q.toml, line 2: [guest.g] launch: there is no program 'qemu-nowhere'.",
            self.refused('[guest.g]\nlaunch = ["qemu-nowhere"]'),
        )
        self.assertIn("must have a program in it", self.refused("[guest.g]\nlaunch = []"))
        self.assertIn(
            "must not have -incoming in it",
            self.refused('[guest.g]\nlaunch = ["sh", "-incoming", "defer"]'),
        )
        self.assertIn(
            "line 4: [guest.h] has the QMP socket of [guest.g]",
            self.refused('[guest.g]\nqmp = "unix:/a"\n[guest.h]\nqmp = "unix:/a"'),
        )
        self.assertIn("unix:/...", self.refused('[guest.g]\nqmp = "tcp:localhost:4444"'))
        self.assertIn("the name 'a/b' is of no use", self.refused('[guest."a/b"]\nqmp="unix:/a"'))

    def test_everything_at_once(self) -> None:
        """All problems are said together, in the order of their lines."""
        self.assertEqual(
            "q.toml has 3 problems:\n"
            "  line 2: [daemon] insecure must be true or false, not a whole number.\n"
            "  line 3: [daemon] has no key 'listn'; did you mean 'listen'?\n"
            "  line 4: [guest.g] needs exactly one of qmp, the socket of a QEMU that runs, "
            "launch, the command that starts one to receive a guest, and memory, a guest without a "
            "QEMU.",
            self.refused("[daemon]\ninsecure = 1\nlistn = []\n[guest.g]\n"),
        )

    @given(st.text(st.characters(codec="utf-8")))
    def test_any_text(self, text: str) -> None:
        """Whatever stands in the file, it is accepted or refused with a ConfigError."""
        for whole in (text, f"[daemon]\n{text}", f"[guest.g]\nqmp = '''{text}'''"):
            try:
                read(whole)
            except ConfigError as error:
                self.assertTrue(error.text.startswith("q.toml"))


class AdditionTests(SynchronousTestCase):
    def test_guest_add(self) -> None:
        """What guest-add gets is checked as a guest in the file is."""
        self.assertEqual(GuestConfig("g", qmp="/a"), guest_config("g", "unix:/a"))
        for name, qmp in (
            ("", "unix:/a"),
            ("g", "/a"),
            ("a/b", "unix:/a"),
            ("g", "unix:\ud800"),
            ("\ud800", "unix:/a"),
            (".", "unix:/a"),
            ("g" * 256, "unix:/a"),
        ):
            error = self.assertRaises(ArgumentError, guest_config, name, qmp)
            self.assertTrue(error.text.startswith("guest-add: "))

    def test_unknown_names(self) -> None:
        """Names in the policy are checked against the features there are, and the paths."""
        policy = Policy(prefer=("direct", "multifd"), exclude=("ktls",))
        self.assertEqual(["ktls"], unknown_names(policy, ["multifd"]))
        self.assertEqual([], unknown_names(policy, ["multifd", "ktls"]))


class LineTests(SynchronousTestCase):
    def test_lines(self) -> None:
        """Keys are found in tables, dotted, quoted, and not in strings of several lines."""
        lines = find_lines(
            'a = 1\nb.c = """\nd = 2\n"""\n[e."f g".h]  # text\n  "i.j" = 3\n'
            '[[k]]\nl = [\n  "m=",\n]\n'
        )
        self.assertEqual(
            {
                ("a",): 1,
                ("b", "c"): 2,
                ("e", "f g", "h"): 5,
                ("e", "f g", "h", "i.j"): 6,
                ("k",): 7,
                ("k", "l"): 8,
            },
            lines,
        )
