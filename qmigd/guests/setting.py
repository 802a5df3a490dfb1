"""What a QEMU's migration is set to: set, read back and compared, and put back where refused.

A setting that was ignored on one side makes a migration hang, or corrupts RAM in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, maybeDeferred

from qmigd.errors import DeadlineError, GuestError, GuestGone
from qmigd.guests import schema
from qmigd.interfaces import GuestFacts, Settings
from qmigd.qmp.client import QMPClient
from qmigd.waiting import together

__all__ = ["apply", "capabilities", "readback"]


async def apply(
    client: QMPClient, guest: str, settings: Settings, facts: GuestFacts | None = None
) -> tuple[Settings, Settings]:
    """Set, and read back that it is set; returns what was before, and what is now.

    A parameter that had no value before is ``None`` in what is returned, and
    giving ``None`` unsets one where QEMU can do that (``tls-creds``); where it
    cannot (``block-bitmap-mapping``), ``None`` is passed over.

    :param guest: its name, for errors.
    :param facts: say what was before, and what is so already is not set again; without
        them QEMU is asked.
    :raises GuestError: QEMU refused or ignored one of them; all are as before.
    """
    wanted = settings if facts is None else _lacking(settings, facts)
    parameters = await _settable(client, wanted.parameters)
    # All at once: QEMU answers in order, so what it had comes before what it is told.
    (known, before), *answers = await DeferredList(
        [
            Deferred.fromCoroutine(readback(client, guest, settings))
            if facts is None
            else maybeDeferred(_pick, guest, settings, facts.capabilities, facts.parameters),
            *_set(client, Settings(wanted.capabilities, parameters, wanted.objects)),
            Deferred.fromCoroutine(readback(client, guest, settings)),
        ],
        consumeErrors=True,
    )
    try:
        for succeeded, answer in ((known, before), *answers):
            if not succeeded:
                raise answer.value
        _compare(guest, settings, answers[-1][1])
    except (GuestGone, DeadlineError):
        raise
    except GuestError:
        if known:
            earlier = await _settable(client, before.parameters)
            await together(_set(client, Settings(before.capabilities, earlier)))
            # Whether there was one: the one that was refused there never was.
            await DeferredList(_set(client, Settings(objects=before.objects)), consumeErrors=True)
        raise
    return before, answers[-1][1]


def _compare(guest: str, wanted: Settings, got: Settings) -> None:
    present = {**got.capabilities, **got.parameters}
    for name, value in {**wanted.capabilities, **wanted.parameters}.items():
        if value is not None and present[name] != value:
            raise GuestError(
                f"the process of guest {guest} was to have {name} at {value!r}, and has it"
                f" at {present[name]!r}"
            )


async def readback(client: QMPClient, guest: str, settings: Settings) -> Settings:
    """Return the present values of the names in ``settings``, ``None`` for no value.

    :raises GuestError: QEMU does not know one of the capabilities.
    """
    asked: list[Deferred[Any]] = []
    if settings.capabilities:
        asked.append(Deferred.fromCoroutine(capabilities(client)))
    if settings.parameters:
        asked.append(client.execute("query-migrate-parameters"))
    answers = await together(asked)
    return _pick(
        guest,
        settings,
        answers[0] if settings.capabilities else {},
        answers[-1] if settings.parameters else {},
    )


def _pick(
    guest: str,
    settings: Settings,
    capabilities: Mapping[str, bool],
    parameters: Mapping[str, Any],
) -> Settings:
    """Return what a QEMU has for the names in ``settings``, out of all that it has."""
    for name in settings.capabilities:
        if name not in capabilities:
            raise GuestError(f"the process of guest {guest} has no capability {name}")
    return Settings(
        {name: capabilities[name] for name in settings.capabilities},
        {name: parameters.get(name) for name in settings.parameters},
        dict.fromkeys(settings.objects),
    )


async def capabilities(client: QMPClient) -> dict[str, bool]:
    """Return all migration capabilities."""
    answer = await client.execute("query-migrate-capabilities")
    return {entry["capability"]: entry["state"] for entry in answer}


def _set(client: QMPClient, settings: Settings) -> list[Deferred[Any]]:
    """Send what sets them; returns the answers to come.

    Objects are there before a parameter names them, and go when none does any more.
    """
    asked = [
        client.execute("object-add", id=name, **arguments)
        for name, arguments in settings.objects.items()
        if arguments is not None
    ]
    if settings.capabilities:
        # All in one command: QEMU checks them together.
        switches = [
            {"capability": name, "state": state} for name, state in settings.capabilities.items()
        ]
        asked.append(client.execute("migrate-set-capabilities", capabilities=switches))
    if settings.parameters:
        asked.append(client.execute("migrate-set-parameters", **settings.parameters))
    asked += [
        client.execute("object-del", id=name)
        for name, arguments in settings.objects.items()
        if arguments is None
    ]
    return asked


async def _settable(client: QMPClient, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return them without those that are ``None`` and that QEMU cannot unset."""
    if None not in parameters.values():
        return dict(parameters)
    known = await schema.of(client)
    return {
        name: value
        for name, value in parameters.items()
        if value is not None or known.nullable(name)
    }


def _lacking(settings: Settings, facts: GuestFacts) -> Settings:
    """Return what of the settings is not so yet.

    A QEMU reads what it is told byte by byte (monitor_can_read in monitor/monitor.c), some
    3.5 us each: what need not be said makes everybody wait less.
    """
    return Settings(
        {
            name: on
            for name, on in settings.capabilities.items()
            if facts.capabilities.get(name) is not on
        },
        {
            name: value
            for name, value in settings.parameters.items()
            if facts.parameters.get(name) != value
        },
        settings.objects,
    )
