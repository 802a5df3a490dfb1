"""``__org.example_converge``: a guest that dirties its RAM too fast is slowed down.

An example of a feature that qmigd finds as a plugin of Twisted's, and that sets
something on one side's QEMU only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.plugin import IPlugin
from zope.interface import implementer

from qmigd.interfaces import Answer, Feature, GuestFacts, No, Role, Settings, Yes


@implementer(IPlugin)
class Converge(Feature):
    """QEMU's ``auto-converge``, which concerns the source alone."""

    name = "__org.example_converge"
    summary = "slows the guest down where its RAM changes faster than it can be sent"

    def probe_guest(self, guest: GuestFacts, role: Role) -> Answer:
        if role == "source" and "auto-converge" not in guest.capabilities:
            return No("this QEMU does not know auto-converge")
        return Yes()

    def settings(self, agreement: Mapping[str, Any], role: Role) -> Settings:
        return Settings({"auto-converge": True}) if role == "source" else Settings()


converge = Converge()
