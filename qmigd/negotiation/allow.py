"""Who may send guests here, and which: ``allow`` in the configuration's ``[tls]``.

A peer is known by the names in its certificate, and by nothing else.  ``allow`` has
patterns for these names, either a list of them, or a table from each to the guests that
come from there::

    allow = ["hosta.example", "*.dc1.example", "192.0.2.0/24"]
    allow = { "hosta.example" = ["web*", "db1"], "*" = ["test-*"] }

- In a pattern for a DNS name ``*`` stands for any characters within one label, never for
  a dot: as in certificates, ``*.dc1.example`` is for ``hosta.dc1.example`` and not for
  ``hosta.rack2.dc1.example`` or ``dc1.example``.  ``*`` alone is for every peer.  Case
  makes no difference.
- An address stands for itself, and a network for every address in it.
- In a pattern for a guest ``*`` stands for any characters, and case makes a difference.

A certificate with several names is allowed what any one of them is allowed.  A wildcard
in a *certificate* is a name like any other here: ``*.dc1.example`` there is not allowed
by ``hosta.dc1.example``, since it does not say which host it is.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Allow", "PeerNames"]

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: A label of a DNS name (RFC 1035: at most 63 characters), with wildcards.
_LABEL = re.compile(r"[a-z0-9_*]([a-z0-9_*-]{0,61}[a-z0-9_*])?")
#: Characters of a DNS name (RFC 1035).
_LONGEST = 253
#: Names of a certificate that are worth showing.
_SHOWN = 5


@dataclass(frozen=True)
class PeerNames:
    """Whom a certificate is for.

    :ivar dns: DNS names, in lower case.
    :ivar addresses: IP addresses.
    """

    dns: tuple[str, ...] = ()
    addresses: tuple[_Address, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return iter((*self.dns, *map(str, self.addresses)))

    def __str__(self) -> str:
        """The names for a person, printable whatever is in the certificate."""
        names = [*self.dns, *map(str, self.addresses)]
        shown = ", ".join(names[:_SHOWN]) or "no name"
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return "".join(c if c.isprintable() else "?" for c in shown) + more


@dataclass(frozen=True)
class Allow:
    """Which peers may send which guests.

    :ivar entries: patterns for peers, each with patterns for guests; ``None``: every peer
        may send every guest.
    """

    entries: tuple[tuple[str, tuple[str, ...]], ...] | None = None

    @classmethod
    def of(cls, peers: Sequence[str] | Mapping[str, Sequence[str]]) -> Allow:
        """Check patterns and take them.

        :param peers: a list of patterns for peers, who may send every guest, or a mapping
            from them to patterns for guests.
        :raises ValueError: a pattern makes no sense; the text says which, and why.
        """
        if not isinstance(peers, Mapping):
            peers = dict.fromkeys(peers, ("*",))
        for pattern in peers:
            if not _is_network(pattern):
                _check_name(pattern)
        return cls(tuple((pattern, tuple(guests)) for pattern, guests in peers.items()))

    def permits_peer(self, names: PeerNames) -> str | None:
        """Return why that peer may not send anything here; ``None``: it may.

        The reason does not have the list, since the peer is told as well.
        """
        guests = self._guests(names)
        if guests is None or guests:
            return None
        return (
            f"the source's certificate is for {names}, which the destination's 'allow' does not "
            f"have"
        )

    def permits_guest(self, names: PeerNames, guest: str) -> str | None:
        """Return why that peer may not send that guest here; ``None``: it may."""
        patterns = self._guests(names)
        if patterns is None or any(_matches(pattern, guest) for pattern in patterns):
            return None
        return f"the destination's 'allow' does not let {names} send the guest {guest!r}"

    def _guests(self, names: PeerNames) -> list[str] | None:
        """Return the patterns of the guests that may come from there; ``None``: all may."""
        if self.entries is None:
            return None
        return [
            guest
            for pattern, guests in self.entries
            if _is_peer(pattern, names)
            for guest in guests
        ]


def _is_peer(pattern: str, names: PeerNames) -> bool:
    if pattern == "*":
        return True
    if _is_network(pattern):
        network = ipaddress.ip_network(pattern)
        return any(address in network for address in names.addresses)
    labels = _labels(pattern)
    return any(_same_labels(labels, _labels(name)) for name in names.dns)


def _same_labels(pattern: list[str], name: list[str]) -> bool:
    return len(pattern) == len(name) and all(map(_matches, pattern, name))


def _labels(name: str) -> list[str]:
    return name.lower().removesuffix(".").split(".")


def _matches(pattern: str, text: str) -> bool:
    """Whether a text is what a pattern with ``*`` stands for.

    No regular expression: that could take for ever for a text that a peer chooses.
    """
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == text
    *middle, last = rest
    if not text.startswith(first) or not text.endswith(last):
        return False
    at, end = len(first), len(text) - len(last)
    for part in middle:
        at = text.find(part, at, end)
        if at < 0:
            return False
        at += len(part)
    return at <= end


def _is_network(pattern: str) -> bool:
    """Whether it is an address or a network.

    :raises ValueError: it is a network with bits beyond its mask, or has a scope.
    """
    if "%" in pattern:
        raise ValueError(f"'{pattern}' has a scope, which no certificate can have")
    try:
        ipaddress.ip_network(pattern)
    except ValueError:
        try:
            network = ipaddress.ip_network(pattern, strict=False)
        except ValueError:
            return False
        raise ValueError(f"'{pattern}' is not a network; did you mean '{network}'?") from None
    return True


def _check_name(pattern: str) -> None:
    if len(pattern) > _LONGEST or not all(map(_LABEL.fullmatch, _labels(pattern))):
        raise ValueError(
            f"'{pattern}' is no name that a certificate could have, no address and no network; "
            f"a name that is not ASCII is written as in the certificate, 'xn--...'"
        )
