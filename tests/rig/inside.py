"""Runs tests inside the lane's guest, one after another, as it is told to (see ``lane``).

It is started with the path of the port that leads out to the rig, where everything is
a line of JSON.  It begins with ``{"kernel": ...}``; then a question is the name of a test, and
the answer its outcome, or it is the name of a function with its arguments, and the answer
what that returns.  The end of the questions, or a test that does not end, is
the end of this process, and of the guest.

What is printed meanwhile goes into the answer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import IO, Any

__all__ = ["DEADLINE", "answer"]

#: Seconds after which a test is taken for hung: what every thread of it is doing is
#: printed on the guest's console, and the guest ends.
DEADLINE = 600.0


def _run(name: str) -> dict[str, Any]:
    """Run the test of that name, and return what there is to say of it."""
    from twisted.trial.reporter import TestResult
    from twisted.trial.runner import TestLoader

    result = TestResult()
    TestLoader().loadByName(name).run(result)
    for kind, found in (("error", result.errors), ("failure", result.failures)):
        if found:
            texts = [
                problem if isinstance(problem, str) else problem.getTraceback()
                for _, problem in found
            ]
            return {"kind": kind, "text": "\n".join(texts)}
    if result.skips:
        return {"kind": "skip", "text": str(result.skips[0][1])}
    if result.successes == 1:
        return {"kind": "success", "text": ""}
    return {"kind": "error", "text": f"{name} is no single test: {result!r}"}


def _call(name: str, arguments: list[Any]) -> dict[str, Any]:
    """Call the function of that name, and return what it returns, or its traceback."""
    module, _, function = name.rpartition(".")
    try:
        value = getattr(importlib.import_module(module), function)(*arguments)
    except Exception:
        return {"kind": "error", "text": traceback.format_exc()}
    return {"kind": "success", "text": "", "value": value}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Do what is asked for, and return what there is to say of it."""
    return _call(**question["call"]) if "call" in question else _run(question["test"])


@contextlib.contextmanager
def _printing_to(file: IO[bytes]) -> Iterator[None]:
    """Have all that is printed meanwhile in ``file``."""
    before = [(number, os.dup(number)) for number in (1, 2)]
    for number, _ in before:
        os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in before:
            os.dup2(copy, number)
            os.close(copy)


def _main(path: str) -> None:
    console = os.fdopen(os.dup(2), "w")
    os.chdir(tempfile.mkdtemp())  # as trial does
    with open(path, "r+b", buffering=0) as port, open(port.fileno(), closefd=False) as questions:

        def tell(what: dict[str, Any]) -> None:
            port.write(json.dumps(what).encode() + b"\n")

        tell({"kernel": os.uname().release})
        for line in questions:
            faulthandler.dump_traceback_later(DEADLINE, exit=True, file=console)
            with tempfile.TemporaryFile() as printed:
                with _printing_to(printed):
                    said = answer(json.loads(line))
                faulthandler.cancel_dump_traceback_later()
                printed.seek(0)
                tell({**said, "printed": printed.read().decode(errors="replace")})
    # A thread that a test has left behind is not waited for.
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1])
