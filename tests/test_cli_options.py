"""qmigctl's command line: what is understood, what is said of the rest, and the help."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from qmigd.api import COMMANDS
from qmigd.cli.commands import RUN
from qmigd.cli.options import EXIT_CODES, LOCAL, SUBCOMMANDS, Exit, UsageError, make_parser


class UsageTests(SynchronousTestCase):
    def refused(self, words: str) -> str:
        parser, _ = make_parser()
        return str(self.assertRaises(UsageError, parser.parse_args, words.split()))

    def test_sentences(self) -> None:
        """What is wrong is said in a sentence, with where to read on."""
        for words, sentence in (
            ("", "The following arguments are required: COMMAND. See 'qmigctl help'."),
            ("migrat", "There is no command 'migrat'; did you mean 'migrate'? See 'qmigctl help'."),
            ("zzz", "There is no command 'zzz'. See 'qmigctl help'."),
            (
                "migrate g",
                "The following arguments are required: URI. See 'qmigctl help migrate'.",
            ),
            ("set g x", "Argument NAME=VALUE: 'x' is not NAME=VALUE. See 'qmigctl help set'."),
            (
                "pki inti",
                "There is no command 'inti'; did you mean 'init'? See 'qmigctl help pki'.",
            ),
            (
                "migrate g u --tunable =1",
                "Argument --tunable: '=1' is not NAME=VALUE. See 'qmigctl help migrate'.",
            ),
            ("guests --jsn", "Unrecognized arguments: --jsn. See 'qmigctl help'."),
        ):
            self.assertEqual(sentence, self.refused(words))

    def test_argv(self) -> None:
        """Whatever stands behind --argv is the program's, options too."""
        parser, _ = make_parser()
        program = ["ssh", "-o", "X=y", "hostb", "qmigctl", "connect", "/run/p", "--json"]
        for words in (
            ["migrate", "g", "exec:", "--exclude", "multifd"],
            ["features", "g", "exec:"],
        ):
            options = parser.parse_args([*words, "--argv", *program])
            self.assertEqual((options.uri, options.argv), ("exec:", program))
            self.assertEqual(parser.parse_args(words).argv, [])

    def test_no_abbreviations(self) -> None:
        """An option has to be written out, so that a new one never changes what a script says."""
        self.assertIn("--det", self.refused("migrate g u --det"))


class HelpTests(SynchronousTestCase):
    def test_overview(self) -> None:
        """The help names each command, and each exit code with its meaning."""
        parser, _ = make_parser()
        text = parser.format_help()
        for name in (*SUBCOMMANDS, *LOCAL):
            self.assertRegex(text, rf"(?m)^    {name}\b")
        self.assertEqual(set(Exit), set(EXIT_CODES))
        for number, meaning in EXIT_CODES.items():
            self.assertIn(f"{int(number):<3} {meaning}", text)

    def test_commands(self) -> None:
        """The help of a command is its declaration's, in the words of qmigctl."""
        _, parsers = make_parser()
        self.assertEqual({*SUBCOMMANDS, *LOCAL}, set(parsers))
        for name, (command, _) in SUBCOMMANDS.items():
            text = parsers[name].format_help()
            first = COMMANDS[command].help.split("\n")[0].removeprefix("Return ")
            self.assertIn(first.split("`")[0][:40], text)
            self.assertNotIn("`", text)
            self.assertNotIn("query-", text)

    def test_everything_can_be_said(self) -> None:
        """Each command of the daemon has a subcommand, but for some that only a program gives.

        Those are about the socket itself, or go with descriptors.
        """
        given = {command for command, _ in SUBCOMMANDS.values()}
        about = {"query-version", "query-commands", "query-qmp-schema"}
        descriptors = {name for name, command in COMMANDS.items() if command.descriptors}
        self.assertEqual(set(COMMANDS) - about - descriptors, given)
        self.assertEqual(set(SUBCOMMANDS), set(RUN))
