"""Runs the fuzzer for some time: ``python -m tests.fuzz [SECONDS]``.

It begins with the seeds and the corpus, and works in ``build/fuzz``, where what it finds stays:
``crash-*`` is an input for which something does not hold.  With ``--merge`` what it has found so
far is made as small as it goes, into ``build/fuzz/merged``, which takes the corpus's place.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["qmigd.stream"]):
    from tests.fuzz.seeds import seeds
    from tests.fuzz.target import check

_HERE = Path(__file__).parent
_WORK = _HERE.parents[1] / "build" / "fuzz"

#: Bytes of an input: more than any seed has.
_LONGEST = 12000

#: Bytes of one in the corpus, which is to remain small; what is longer the seeds stand for.
_KEPT = 1500


def _main() -> None:
    found = _WORK / "found"
    found.mkdir(parents=True, exist_ok=True)
    if any(option.startswith("-merge_control_file") for option in sys.argv):
        options = sys.argv[1:]  # the fuzzer has run this itself, to look at the files in turns
        atheris.Setup([sys.argv[0], *options], check)
        atheris.Fuzz()
    merging = sys.argv[1:] == ["--merge"]
    longest = _KEPT if merging else _LONGEST
    options = [f"-max_len={longest}", f"-artifact_prefix={_WORK}/", "-rss_limit_mb=1024"]
    program = f"{sys.executable} -m tests.fuzz"
    if merging:
        merged = _WORK / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        merged.mkdir()
        options += ["-set_cover_merge=1", str(merged), str(_HERE / "corpus"), str(found)]
    else:
        for seed in seeds():
            (found / hashlib.sha1(seed).hexdigest()).write_bytes(seed)
        seconds = sys.argv[1] if len(sys.argv) > 1 else "600"
        options += [f"-max_total_time={seconds}", "-timeout=120", "-print_final_stats=1"]
        options += [str(found), str(_HERE / "corpus")]
    atheris.Setup([program, *options], check)
    atheris.Fuzz()


if __name__ == "__main__":
    _main()
