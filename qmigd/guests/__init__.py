"""What can be migrated: a QEMU reached over QMP, and what there is to know about it."""
