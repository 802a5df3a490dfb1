"""One move of one guest, on either side.

``proposing``, ``source``; ``listening``, ``answering``, ``destination``
    what each side does, from the first byte of the handshake to the outcome;
``control``
    the control connection: a handshake machine on a Twisted transport;
``legacy``, ``legacy_incoming``
    either of them without a qmigd at the other side: QEMU's plain stream;
``settings``
    what is set on a guest's QEMU for a plan, read back and compared;
``ownership``
    whose guest it is at each moment, and what follows when something breaks;
``preflight``
    whether the two guests fit together at all;
``status``
    what ``query-migrate`` shows.
"""
