"""Whose guest it is: the one table, and the rules behind it.

A guest must never run on both hosts, and never on neither for good.  So at every
moment exactly one side *owns* it, and only the owner's daemon lets it run:

* The destination's QEMU is kept from running by itself: it is told to ``stop``
  while it still waits for the stream, and ends up paused when all is loaded.
* The source owns the guest until it sends RELEASE.  Before that, whatever breaks,
  the guest goes on at the source: by itself where QEMU resumes it, by ``cont``
  where its QEMU had already finished.  Nothing can have run at the destination.
* RELEASE is sent when the source's QEMU has finished for good (``completed``), or,
  for postcopy, when the guest has been stopped on the source and the switch is the
  next thing to happen.  From then on the source never lets it run again, unless
  the destination itself says that it never ran there.
* Where the connection breaks after RELEASE, the source cannot know whether it
  arrived.  The guest stays stopped at the source and the error says how to find
  out: better a guest that waits for a person than one that runs twice.

The stop on the source before postcopy is a fence as well: QEMU 10.0 and newer let
the source's guest run again when the connection breaks just before the end of
postcopy, while it runs at the destination.  A guest that was stopped before the
switch stays stopped.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, Literal

__all__ = ["SAID", "Act", "Peer", "Released", "on_destination_failure", "on_source_failure"]


class Released(Enum):
    """Whether RELEASE was sent (on the source) or has come (on the destination)."""

    NO = "no"
    YES = "yes"


class Peer(Enum):
    """What the source knows of the destination's guest."""

    NEVER_RAN = "never ran"
    RUNS = "runs"
    UNKNOWN = "unknown"


#: What a destination's word for it means: "ran" in OUTCOME, and in the answer to who asks.
SAID: Final = {True: Peer.RUNS, False: Peer.NEVER_RAN, None: Peer.UNKNOWN}


class Act(Enum):
    """What is done with the guest of this side."""

    #: Let it run, if it ran before the migration.
    RUN = "run"
    #: Leave it as it is: stopped where the other side has it, running where it came to.
    LEAVE = "leave as it is"
    #: End its QEMU: what it holds is of no use any more.
    QUIT = "quit"


Loaded = Literal["nothing", "partly", "all"]

# What the source does with its guest when a migration fails.
_SOURCE: Final = {
    (Released.NO, Peer.NEVER_RAN): Act.RUN,
    (Released.NO, Peer.UNKNOWN): Act.RUN,
    (Released.NO, Peer.RUNS): Act.LEAVE,
    (Released.YES, Peer.NEVER_RAN): Act.RUN,
    (Released.YES, Peer.UNKNOWN): Act.LEAVE,
    (Released.YES, Peer.RUNS): Act.LEAVE,
}

# What the destination does with its guest when a migration fails.
_DESTINATION: Final = {
    (Released.NO, False): Act.QUIT,
    (Released.NO, True): Act.QUIT,
    (Released.YES, False): Act.QUIT,
    (Released.YES, True): Act.LEAVE,
}


def on_source_failure(released: Released, peer: Peer) -> Act:
    """Return what becomes of the source's guest."""
    return _SOURCE[released, peer]


def on_destination_failure(released: Released, ran: bool) -> Act:
    """Return what becomes of the destination's guest.

    :param ran: it runs, or has run, at the destination.
    """
    return _DESTINATION[released, ran]
