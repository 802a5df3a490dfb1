"""Makes ``twistd qmigd`` known to Twisted.

There is no ``__init__.py`` in this folder or the one above, and there must be
none: they are Twisted's (see setup.py).
"""

from __future__ import annotations

from twisted.application.service import ServiceMaker

qmigd = ServiceMaker(
    "qmigd",
    "qmigd.daemon.service",
    "Moves QEMU guests between hosts, with everything negotiated.",
    "qmigd",
)
