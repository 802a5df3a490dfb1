"""After the daemon itself died: what becomes of the migrations that it had under way.

The journal says how far each one was.  QEMU has gone on without the daemon, or has
stopped because its relay was gone; either way the rules of
:mod:`qmigd.migration.ownership` say whose the guest is, and what qmigd had set on
its QEMU is put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.logger import Logger

from ..channels.saved_files import discard
from ..errors import GuestGone, QmigdError
from ..interfaces import Settings
from ..transports.programs import reach
from ..transports.uri import InBandAddress, bare, parse_uri
from .move import OVER, Move
from .services import Services
from .verdicts import ask

__all__ = ["recover"]

log = Logger()


async def recover(services: Services, migration: str, role: str, entry: Mapping[str, Any]) -> None:
    """Bring one migration of an earlier life of the daemon to an end.  Never raises."""
    record = services.records.new(
        migration, entry["guest"], "source" if role == "source" else "destination", entry["peer"]
    )
    move = Move(services, record)
    try:
        move.guest = services.guests.retake(entry["guest"], entry["qmp"], migration)
        if role == "destination":
            services.verdicts.expect(migration, bytes.fromhex(entry.get("secret", "")))
        await move.attach(move.guest)
        move.saved = Settings(
            entry.get("capabilities", {}),
            entry.get("parameters", {}),
            dict.fromkeys(entry.get("objects", ())),
        )
        act = _source if role == "source" else _destination
        step = await act(move, entry)
        await move.put_back()
    except GuestGone as gone:
        if role == "destination" and entry["stage"] != "released":
            services.verdicts.settle(migration, False)
        if role == "source" and "file" in entry:
            discard(entry["file"])
        step = f"its QEMU is gone: {gone.text}"
    except QmigdError as error:
        step = f"it could not be brought to an end: {error.text}"
    except Exception:
        log.failure("recovery of migration {id}", id=migration)
        step = "qmigd failed in it"
    move.let_go()
    services.journal.forget(migration, role)
    log.warn(
        "migration {id} of guest {guest} was interrupted by the end of an earlier qmigd: {step}",
        id=migration,
        guest=entry["guest"],
        step=step,
    )


async def _source(move: Move, entry: Mapping[str, Any]) -> str:
    assert move.guest is not None
    # Nobody finishes a file any more.  If QEMU still writes, then to one that has no name.
    if "file" in entry and not discard(entry["file"]):
        return "it was saved"
    if entry["stage"] == "released" and not await _never_ran(move, entry):
        return "the guest is the destination's"
    if await move.look() not in {*OVER, "none"}:
        await move.guest.cancel()
    await move.until_over()
    if entry.get("baseline") and move.qemu_status == "completed":
        # Nobody has to be asked there: the destination's QEMU lets it run by itself.
        return "the guest is the destination's"
    if entry.get("was-running", True) and await move.guest.query_status() != "running":
        await move.guest.cont()
    return "the guest goes on here"


async def _never_ran(move: Move, entry: Mapping[str, Any]) -> bool:
    """Whether the destination says so of a guest that was released to it."""
    services = move.services
    try:
        uri, secret = parse_uri(entry["peer"]), bytes.fromhex(entry["secret"])
    except (QmigdError, KeyError, ValueError) as error:
        log.warn("migration {id} cannot be asked about: {error}", id=move.record.id, error=error)
        return False
    peer = services.bound(bare(uri), move.record.id, entry["guest"])
    hostname = entry.get("tls-hostname")
    tls = services.security.calling(hostname) if hostname else None
    reached, programs = reach(services.reactor, peer, move.record.name)
    end = move.now() + services.deadlines.ask
    try:
        while move.now() < end:
            try:
                answer = await ask(
                    services.reactor,
                    reached,
                    move.record.id,
                    secret,
                    services.deadlines.handshake,
                    tls,
                    in_band=isinstance(uri, InBandAddress),
                )
            except QmigdError as error:
                log.info("no answer from {peer}: {error}", peer=reached, error=error.text)
            else:
                if answer.get("ran") is not None:
                    return answer["ran"] is False
            await move.rest()
    finally:
        if programs is not None:
            await programs.end()
    return False


async def _destination(move: Move, entry: Mapping[str, Any]) -> str:
    assert move.guest is not None
    if entry["stage"] == "prepared":
        return "nothing had been moved; its QEMU still waits"
    if "file" in entry:
        return await _restored(move, entry)
    if entry["stage"] == "receiving":
        if entry.get("baseline"):
            # QEMU has the connection, and lets the guest run by itself.
            await move.until_over()
        if await move.guest.query_status() == "running":
            move.services.verdicts.settle(move.record.id, True)
            return "it runs here"
        if entry.get("baseline") and move.qemu_status == "completed":
            return "it is here, as it was at the source"
        move.saved = Settings()
        await move.guest.quit()
        move.services.verdicts.settle(move.record.id, False)
        return "the guest is the source's; the half of it that was here was ended"
    await move.until_over()
    if entry.get("run", True) and await move.guest.query_status() != "running":
        await move.guest.cont()
    move.services.verdicts.settle(move.record.id, True)
    return "the guest runs here"


async def _restored(move: Move, entry: Mapping[str, Any]) -> str:
    """A guest out of a file: QEMU may have it whole, if it reads the file by itself."""
    assert move.guest is not None
    await move.until_over()
    if move.qemu_status == "none":
        return "nothing of it had been loaded; its QEMU still waits"
    if move.qemu_status != "completed":
        move.saved = Settings()
        await move.guest.quit()
        return "its file was not read to the end, and its QEMU was ended"
    if entry.get("run", True) and await move.guest.query_status() != "running":
        await move.guest.cont()
    return "it was restored"
