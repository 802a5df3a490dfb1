"""QEMU's migration stream, read and written; nothing here does any I/O."""
