"""What the fuzzer has found so far is tried again (``tests/fuzz``, ``make fuzz``)."""

from __future__ import annotations

from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.fuzz.seeds import seeds
from tests.fuzz.target import KINDS, check

_CORPUS = Path(__file__).parent / "fuzz" / "corpus"


class CorpusTests(SynchronousTestCase):
    def test_seeds(self) -> None:
        """What the fuzzer begins with is good, so that it comes far."""
        kinds = set()
        for seed in seeds():
            self.assertEqual("", check(seed))
            kinds.add(seed[0])
        self.assertEqual(set(range(len(KINDS))), kinds)

    def test_corpus(self) -> None:
        """All that it has found is read, or refused with a StreamError, the same in any pieces."""
        outcomes = set()
        paths = sorted(_CORPUS.iterdir())
        for path in paths:
            outcomes.add(bool(check(path.read_bytes())))
        self.assertEqual({True, False}, outcomes)
        self.assertLess(sum(path.stat().st_size for path in paths), 1 << 20)
