"""The bytes of the handshake: what they are, and reading them safely.

Pure: bytes in, values out, and back.  ``greeting`` and ``role`` are how
connections begin, ``messages`` what follows, ``reading`` takes any of them piece
by piece, ``limits`` has every limit.
"""
