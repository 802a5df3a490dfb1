"""The commands that hand descriptors over, for the management apps that make every connection."""

from __future__ import annotations

from .declare import INT, STR, Command, Member

__all__ = ["DESCRIPTOR_COMMANDS"]

_NO_CHANNEL = (
    "argument",
    "There is no descriptor of that name, or it is no stream socket that is connected and open "
    "in both directions. It was closed.",
)
_FDNAME = Member("fdname", STR, "the name that `getfd` has given the descriptor.")

DESCRIPTOR_COMMANDS: tuple[Command, ...] = (
    Command(
        "getfd",
        "Take a file descriptor from this client, and give it a name.\n\n"
        "The descriptor comes with the command, by SCM_RIGHTS. It belongs to this "
        "connection: the commands that use it have to come over the same one, and what "
        "none has taken is closed with it. A descriptor that had the name is closed.",
        (Member("fdname", STR, "its name; it does not begin with a digit."),),
        errors=(("argument", "No descriptor has come, or it cannot be called so."),),
        descriptors=True,
    ),
    Command(
        "closefd",
        "Close a descriptor that `getfd` has given a name.",
        (_FDNAME,),
        errors=(("argument", "There is no descriptor of that name."),),
        descriptors=True,
    ),
    Command(
        "add-channel",
        "Hand over a connection that a migration has asked for.\n\n"
        "It answers a `CHANNEL_REQUEST`, on either side. At the source a channel of the "
        "settled `CHANNEL_PLAN` can be handed over before it is asked for; what the "
        "migration has not used when it is over is closed. The descriptor is qmigd's from "
        "here on, whatever comes of it; the client closes its own copy.",
        (
            Member("id", STR, "the migration."),
            Member("channel", STR, "the channel's name: `control`, `main` and so on."),
            _FDNAME,
            Member("index", INT, "which one of that name; 0 if left out.", optional=True),
        ),
        errors=(
            _NO_CHANNEL,
            ("migration", "The migration does not want this channel. It was closed."),
        ),
        descriptors=True,
    ),
    Command(
        "incoming",
        "Take in a connection that the other side's qmigd is at the far end of.\n\n"
        "It is treated like one that was accepted on a port: what the peer says on it "
        "first makes it the control connection of a migration or one of its payload "
        "channels. It can be given any number of times. TLS has to be used on it where "
        "the policy requires that, and where the socket leads to another host, as far as "
        "the kernel can tell, unless `insecure` in `[daemon]` does without.",
        (
            Member(
                "uri",
                STR,
                "`fd:FDNAME`, with the name that `getfd` has given the descriptor; "
                "`in-band:fd:FDNAME`, where the peer migrates to `in-band:fd:`.",
            ),
        ),
        errors=(_NO_CHANNEL,),
        descriptors=True,
    ),
)
