"""Finds the features: entry points ``qmigd.features`` and drop-ins in ``twisted/plugins``.

A feature that fails to load, does not provide :class:`qmigd.interfaces.IFeature`
as a whole, or takes a name that is taken, is logged by name and left out; the
others are there all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points

from twisted.logger import Logger
from twisted.plugin import IPlugin, getPlugins
from zope.interface import Interface
from zope.interface.exceptions import Invalid
from zope.interface.verify import verifyObject

from ..interfaces import PATHS, TRANSPORTS, IFeature

__all__ = ["GROUP", "collect", "load_features"]

log = Logger()

#: The entry-point group that third parties register their features in.
GROUP = "qmigd.features"


def load_features() -> dict[str, IFeature]:
    """Return all usable features by their names, in alphabetical order."""
    return collect([*_from_entry_points(), *_from_plugins(IFeature)])


def collect(found: Iterable[tuple[str, object]]) -> dict[str, IFeature]:
    """Keep what fulfils the interface.

    :param found: where each object comes from, for the log, and the object.
    """
    features: dict[str, IFeature] = {}
    for origin, candidate in found:
        reason = _unusable(candidate, features)
        if reason is not None:
            log.error("feature {origin} is left out: {reason}", origin=origin, reason=reason)
            continue
        feature = IFeature(candidate)
        features[feature.name] = feature
    return dict(sorted(features.items()))


def _unusable(candidate: object, taken: Mapping[str, IFeature]) -> str | None:
    try:
        verifyObject(IFeature, candidate)
    except Invalid as error:
        return " ".join(str(error).split())
    name = getattr(candidate, "name", None)
    if not isinstance(name, str) or not 1 <= len(name) <= 255 or not name.isascii():
        return f"its name {name!r} is not 1 to 255 ASCII characters"
    if name in taken:
        return f"there is a feature called {name} already"
    if name in PATHS:
        return f"{name} is the name of a path"
    for what, known in (("paths", PATHS), ("transports", TRANSPORTS)):
        given = getattr(candidate, what, None)
        if not isinstance(given, frozenset) or not given or not given <= set(known):
            return f"its {what} {given!r} are not a frozenset out of {', '.join(known)}"
    return None


def _from_entry_points() -> Iterator[tuple[str, object]]:
    for entry in entry_points(group=GROUP):
        origin = f"{entry.name} ({entry.value})"
        try:
            yield origin, entry.load()
        except Exception as error:
            log.error(
                "feature {origin} is left out: it cannot be loaded: {error}",
                origin=origin,
                error=f"{type(error).__name__}: {error}",
            )


def _from_plugins(interface: type[Interface]) -> Iterator[tuple[str, object]]:
    # A drop-in provides IPlugin beside IFeature; Twisted logs a module that fails.
    for plugin in getPlugins(interface):
        if IPlugin.providedBy(plugin):
            yield f"{getattr(plugin, 'name', plugin)!s} (twisted/plugins)", plugin
