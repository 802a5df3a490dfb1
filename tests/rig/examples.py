"""The examples of bytes on a page of the documentation."""

from __future__ import annotations

import re

__all__ = ["hex_examples"]


def hex_examples(page: str) -> list[bytes]:
    """Return the bytes of each block ``text`` of a page.

    A line has bytes, two spaces, and words; words in quotes are what the bytes end with.

    :raises AssertionError: they are not.
    """
    found = []
    for block in re.findall(r"^```text\n(.*?)^```", page, re.M | re.S):
        data = b""
        for line in block.splitlines():
            digits, _, words = line.partition("  ")
            piece = bytes.fromhex(digits)
            data += piece
            quoted = re.fullmatch(r'"(.*)"', words.strip())
            assert quoted is None or piece.endswith(quoted[1].encode()), line
        found.append(data)
    return found
