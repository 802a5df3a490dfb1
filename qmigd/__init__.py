"""qmigd: live migration of QEMU guests, with everything negotiated."""

__version__ = "0.1.0"
