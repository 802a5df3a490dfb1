"""Migrations whose other side has no qmigd: the plan there, and whether it is wanted.

QEMU's plain stream is all that such a side understands.  There is no handshake, so no
feature, no TLS, no look at whether the two guests fit together before RAM is moved, and
nobody to release a guest to: the two QEMUs decide between themselves, as they always did.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from ..errors import DeadlineError
from ..interfaces import HANDOVER, HOST, PATHS, Role
from ..negotiation.obstacles import Obstacle
from ..negotiation.plan import Plan
from ..negotiation.policy import Policy

__all__ = ["NO_GREETING", "check_policy", "no_qmigd", "plain_plan"]

#: The code of the errors where nobody has greeted.
NO_GREETING = "no-greeting"


def no_qmigd(side: Role) -> Obstacle:
    """Why a feature is not used: nobody is there to negotiate it with."""
    return Obstacle("there is no qmigd, and so no negotiation", HOST, side)


def plain_plan(features: Iterable[str], side: Role) -> Plan:
    """Return the plan of a migration with a QEMU alone.

    :param features: what this side knows and does without.
    :param side: where there is no qmigd.
    """
    return Plan(
        HANDOVER,
        path_reason=f"QEMU's plain stream: there is no qmigd at the {side}",
        left_out=dict.fromkeys(features, no_qmigd(side)),
    )


def check_policy(policy: Policy, guest: str, uri: str, seconds: float) -> None:
    """See that a guest may go to a place where nobody has greeted.

    :param uri: that place.
    :param seconds: how long a greeting was waited for.
    :raises DeadlineError: something is required that takes a qmigd, or the policy does not
        allow it; then the text has the command that would.
    """
    silence = f"{uri} takes connections, but has not greeted within {seconds:g} seconds"
    for name in policy.require:
        if name != HANDOVER:
            what = "the path" if name in PATHS else "a feature"
            raise DeadlineError(
                f"{silence}: there is no qmigd, and {name} is required, {what} that takes one",
                code=NO_GREETING,
            )
    if HANDOVER in policy.exclude:
        raise DeadlineError(
            f"{silence}: there is no qmigd, and the path {HANDOVER}, which would be the only one, "
            f"is excluded",
            code=NO_GREETING,
        )
    if policy.legacy != "allow":
        command = shlex.join(["qmigctl", "migrate", guest, uri, "--legacy", "allow"])
        raise DeadlineError(
            f"{silence}: there is no qmigd. If it is a QEMU that waits with -incoming, and that "
            f"is meant, start it again, since QEMU waits for one connection only, and say "
            f"'{command}': it then gets QEMU's plain stream, in clear and with no feature",
            code=NO_GREETING,
        )
