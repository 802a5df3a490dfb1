"""What the features ask a QEMU's migration capabilities: known at all, and not excluded.

The answers go together with ``and``, since a ``No`` is false: the first obstacle is the one
that is told.
"""

from __future__ import annotations

from ..interfaces import Answer, GuestFacts, No, Yes

__all__ = ["known", "none_on"]


def known(guest: GuestFacts, name: str, who: str = "it") -> Answer:
    """Answer whether the guest's QEMU knows a capability.

    :param who: what the reason calls the QEMU.
    """
    return Yes() if name in guest.capabilities else No(f"{who} does not know the capability")


def none_on(guest: GuestFacts, *others: str) -> Answer:
    """Answer whether all those capabilities that exclude a feature are off, or not known."""
    for other in others:
        if guest.capabilities.get(other):
            return No(f"{other} has been switched on in it, which excludes this")
    return Yes()
