"""How connections are made: QEMU's URIs, and what qmigd asks of a socket."""
