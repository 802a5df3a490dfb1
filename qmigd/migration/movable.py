"""Whether there is a guest that its process can give away, to another host or into a file."""

from __future__ import annotations

from ..backend import Examined
from ..errors import GuestError

__all__ = ["check_movable"]

#: Run states in which a guest has nothing that could be moved.
_NOT_MOVABLE = {
    "inmigrate": "it waits for a migration itself",
    "postmigrate": "it was moved away already, or saved; what is here is the stopped "
    "rest ('cont' on its QMP socket lets that run, if the guest is nowhere else)",
    "internal-error": "its process stopped it because of an internal error",
    "shutdown": "it has shut down",
}


def check_movable(examined: Examined, what: str = "moved") -> None:
    """See that there is a guest, and nothing that keeps it here.

    :param what: is to be done with it, for the text of an error.
    :raises GuestError: there is not.
    """
    facts = examined.facts
    if examined.status in _NOT_MOVABLE:
        why = _NOT_MOVABLE[examined.status]
        raise GuestError(f"guest {facts.name} cannot be {what}: {why}")
    if facts.blockers:
        raise GuestError(
            f"guest {facts.name} cannot be {what}, says its process: {'; '.join(facts.blockers)}",
            code="guest-blocked",
        )
