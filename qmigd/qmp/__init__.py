"""QMP, QEMU's monitor protocol: its codec, a client of it, and a server that speaks it."""
