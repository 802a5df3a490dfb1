"""The handshake: one pure state machine for each role, bytes in and events out.

:class:`DestinationHandshake` serves an accepted connection, of either kind;
:class:`SourceHandshake` a control connection and :class:`ChannelHandshake` a
payload channel, on the side that opened it.  ``events`` is what they tell.
"""

from __future__ import annotations

from qmigd.handshake.channel import ChannelHandshake
from qmigd.handshake.destination import DestinationHandshake
from qmigd.handshake.source import SourceHandshake

__all__ = ["ChannelHandshake", "DestinationHandshake", "SourceHandshake"]
