"""Tests that need a kernel with everything: run in the lane (``tests/rig/lane.py``)."""
