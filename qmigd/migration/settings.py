"""What is set on a guest's QEMU for a plan, and the proof that it is set.

Both QEMUs have to agree on more than a stream can tell them: one capability on one
side only can hang both, or corrupt RAM in silence.  So everything is set on both
sides out of the same plan, read back from both, and compared before any stream
flows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import FeatureError, ProtocolError
from ..interfaces import DIRECT, GuestFacts, Host, IFeature, PeerIdentity, Role, Settings
from ..negotiation.plan import Plan
from ..negotiation.terms import expect

__all__ = ["compare", "settings_for", "settings_from_wire", "settings_to_wire"]

#: On in every migration: without a return path a source may call a migration
#: completed that failed at the destination; without events nobody hears of it.
ALWAYS = {"return-path": True, "events": True}

#: Off where the other side's QEMU cannot be asked: each of them fails, hangs or corrupts a
#: migration in which it is set on one side only.
ALONE = ("switchover-ack", "x-colo", "x-ignore-shared", "mapped-ram")


def settings_for(
    plan: Plan,
    features: Mapping[str, IFeature],
    guest: GuestFacts,
    role: Role,
    host: Host | None = None,
    peer: PeerIdentity | None = None,
    *,
    alone: bool = False,
) -> Settings:
    """Return everything that has to be set on this side's QEMU.

    A feature that bears the name of a capability and is not in the plan is switched
    off: somebody may have left it on.

    :param host: this one; without it, what depends on host and peer is left out.
    :param peer: whom it is with, if in TLS.
    :param alone: there is no qmigd at the other side.
    """
    capabilities = {name: on for name, on in ALWAYS.items() if name in guest.capabilities}
    capabilities.update(
        (name, False)
        for name in (*features, *(ALONE if alone else ()))
        if name in guest.capabilities and name not in plan.features
    )
    settings = Settings(capabilities)
    for name in plan.features:
        settings |= features[name].settings(plan.agreements[name], role)
        if plan.path == DIRECT and host is not None and peer is not None:
            settings |= features[name].settings_direct(plan.agreements[name], host, role, peer)
    return settings


def compare(wanted: Settings, real: Settings, where: str) -> None:
    """See that a QEMU really has the settings that the plan asks for.

    :param where: whose QEMU it is, for the error: ``"source"``, ``"destination"``.
    :raises FeatureError: it has not; the text names the first difference.
    """
    for kind, want, have in (
        ("capability", wanted.capabilities, real.capabilities),
        ("parameter", wanted.parameters, real.parameters),
    ):
        for name, value in want.items():
            if have.get(name) != value:
                raise FeatureError(
                    f"the {where}'s process has its migration {kind} {name} at "
                    f"{have.get(name)!r} instead of {value!r}; the migration was not begun"
                )


def settings_to_wire(settings: Settings) -> dict[str, Any]:
    """Return the JSON for PREPARED."""
    return {
        "capabilities": dict(settings.capabilities),
        "parameters": dict(settings.parameters),
    }


def settings_from_wire(body: Mapping[str, Any]) -> Settings:
    """Return the settings in a peer's PREPARED.

    :raises ProtocolError: the JSON is not that of settings.
    """
    capabilities = expect(body, "capabilities", dict, {})
    if not all(isinstance(on, bool) for on in capabilities.values()):
        raise ProtocolError("a capability is neither true nor false", code="bad-json")
    return Settings(capabilities, expect(body, "parameters", dict, {}))
