"""qmigd's tests; ``make test`` runs them."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# How fast a machine is decides no test.  What is tried is the same each time where
# a failure has to be looked into later.
settings.register_profile(
    "qmigd",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
)
settings.load_profile("qmigd")
