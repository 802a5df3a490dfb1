"""The choice of features and of the path: a pure function of both sides' terms.

Features are tried one after another: first those that somebody requires, then
those of security, then those that somebody prefers (the source's wishes before the
destination's), then by rank, certainty before speed before thrift, and by name where even
that is equal.  A feature is taken together with those that it requires, if none of them
excludes or contradicts what has been taken before, and if a path remains that
carries all of them; one that gains but thrift, only if the path that is taken without
it carries it; and so is one for speed that a QEMU must not have on some path.  A path that
somebody prefers is settled on once all features that somebody names, and those of security,
have been tried: the others are taken if it carries them.  One of the lowest rank is left out
unless somebody names it.  Whatever is not taken gets a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..errors import FeatureError
from ..interfaces import CONFLICT, DIRECT, HANDOVER, PATH, PATHS, POLICY, RELAY, Rank
from .obstacles import Obstacle
from .terms import Conflict, Terms, Traits

__all__ = ["Choice", "choose"]

_WHY = {
    HANDOVER: "one channel: the socket is handed to the guest, and no byte passes through qmigd",
    DIRECT: "the guest's processes connect to each other, with all their channels",
    RELAY: "each side speaks to its own qmigd, which carries every channel through one port",
}


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    :ivar features: in alphabetical order.
    :ivar path: one of :data:`qmigd.interfaces.PATHS`.
    :ivar path_reason: why this path and not another, for people.
    :ivar left_out: each candidate that was not taken, with the reason.
    """

    features: tuple[str, ...]
    path: str
    path_reason: str
    left_out: Mapping[str, Obstacle]


def choose(
    candidates: Iterable[str],
    source: Terms,
    destination: Terms,
    given_up: Mapping[str, Obstacle] | None = None,
) -> Choice:
    """Choose out of ``candidates``, the features that neither side has given up.

    :param given_up: why the others were, for the error; the choice does not depend on it.
    :raises FeatureError: something required cannot be had, with the reason.
    """
    traits = {
        name: source.traits[name] & destination.traits[name]
        for name in sorted(set(candidates))
        if name in source.traits and name in destination.traits
    }
    require = dict.fromkeys((*source.require, *destination.require))
    prefer = dict.fromkeys((*source.prefer, *destination.prefer))
    paths = _open_paths(source, destination, require)
    wishes = (*require, *prefer)
    conflicts = (*source.conflicts, *destination.conflicts)
    narrowed = _narrowed(traits, conflicts, wishes)
    for name in narrowed:
        traits[name] = replace(traits[name], rank=Rank.THRIFT)
    order = _ordered(traits, require, prefer)

    taken: dict[str, Traits] = {}
    left_out: dict[str, Obstacle] = {}
    settled = False
    for name in order:
        if name in taken:
            continue
        if not settled and name not in wishes and traits[name].rank < Rank.SECURITY:
            settled = True
            carriers = _carriers(paths, taken, conflicts)
            preferred = [path for path in prefer if path in carriers]
            paths = tuple(preferred[:1]) or paths
        group = _with_required(name, traits)
        obstacle = _on_request(name, group, traits, taken, wishes) or _obstacle(
            name, group, traits, taken, conflicts, paths
        )
        if obstacle is None and traits[name].rank == Rank.THRIFT and name not in wishes:
            without, _ = _best_path(paths, taken, prefer, require, source, destination)
            together = {**taken, **{member: traits[member] for member in group}}
            if not _carriers([without], together, conflicts):
                able = " or ".join(sorted(traits[name].paths))
                obstacle = Obstacle(
                    f"it gains on the path {able} only, and {without} is better than that", PATH
                )
                if name in narrowed:
                    at, why = narrowed[name]
                    obstacle = Obstacle(
                        f"not together with {at}: {why}; {without} is better than the rest",
                        CONFLICT,
                    )
        if obstacle is None:
            taken.update((member, traits[member]) for member in group)
            left_out = {key: one for key, one in left_out.items() if key not in taken}
        else:
            left_out[name] = obstacle

    for name in require:
        if name not in taken and name not in PATHS:
            missing = left_out.get(name) or (given_up or {}).get(name)
            missing = missing or Obstacle("one of the two sides does not have it", CONFLICT)
            raise FeatureError(f"{name} is required but cannot be had: {missing}")
    path, path_reason = _best_path(paths, taken, prefer, require, source, destination)
    return Choice(tuple(sorted(taken)), path, path_reason, left_out)


def _narrowed(
    traits: Mapping[str, Traits], conflicts: Iterable[Conflict], wishes: Iterable[str]
) -> dict[str, tuple[str, str]]:
    """Features that are for speed, and that a QEMU must not have on some path.

    They are no reason to take one that costs more.

    :returns: of each, which path it is, and why.
    """
    found = {}
    for conflict in conflicts:
        for path in conflict.features.intersection(PATHS):
            for name in conflict.features - {path}:
                alone = len(conflict.features) == 2 and name in traits and name not in wishes
                if alone and traits[name].rank == Rank.SPEED:
                    found[name] = (path, conflict.reason)
    return found


def _ordered(
    traits: Mapping[str, Traits], require: Mapping[str, None], prefer: Mapping[str, None]
) -> list[str]:
    wishes = {name: place for place, name in enumerate((*require, *prefer))}

    def key(name: str) -> tuple[bool, bool, int, int, str]:
        # A mere preference does not bring a guest's RAM onto the wire in clear.
        guarded = name in require or traits[name].rank >= Rank.SECURITY
        place = wishes.get(name, len(wishes))
        return name not in require, not guarded, place, -traits[name].rank, name

    return sorted(traits, key=key)


def _open_paths(source: Terms, destination: Terms, require: Mapping[str, None]) -> tuple[str, ...]:
    insisted = [path for path in PATHS if path in require]
    if len(insisted) > 1:
        raise FeatureError(
            f"{' and '.join(insisted)} are both required, but a migration takes one path"
        )
    for path in insisted:
        reason = source.closed.get(path) or destination.closed.get(path)
        if reason:
            raise FeatureError(f"the path {path} is required but closed: {reason}")
    wanted = insisted or PATHS
    paths = tuple(
        path for path in wanted if path not in source.closed and path not in destination.closed
    )
    if not paths:
        closed = {**destination.closed, **source.closed}
        reasons = "; ".join(f"{path}: {closed[path]}" for path in PATHS if path in closed)
        raise FeatureError(f"no path is open between the two hosts ({reasons})")
    return paths


def _with_required(name: str, traits: Mapping[str, Traits]) -> list[str]:
    """``name`` and all that it requires, directly or not."""
    group = [name]
    for member in group:
        if member in traits:
            group.extend(sorted(traits[member].requires - set(group)))
    return group


def _on_request(
    name: str,
    group: Iterable[str],
    traits: Mapping[str, Traits],
    taken: Mapping[str, Traits],
    wishes: Iterable[str],
) -> Obstacle | None:
    """What has to be asked for, and was not, is left out with what needs it."""
    for member in group:
        if member not in traits or member in taken or member in wishes:
            continue
        if traits[member].rank <= Rank.ON_REQUEST:
            needs = "" if member == name else f"needs {member}, which "
            return Obstacle(
                f"it {needs}is offered, and taken only with '--prefer {member}' or if [policy]"
                " says so",
                POLICY,
            )
    return None


def _obstacle(
    name: str,
    group: list[str],
    traits: Mapping[str, Traits],
    taken: Mapping[str, Traits],
    conflicts: Iterable[Conflict],
    paths: tuple[str, ...],
) -> Obstacle | None:
    for member in group:
        if member not in traits:
            return Obstacle(f"it needs {member}, which cannot be had", CONFLICT)
    together = {**taken, **{member: traits[member] for member in group}}
    for member in group:
        for other, theirs in together.items():
            if other in traits[member].excludes or member in theirs.excludes:
                return Obstacle(f"it cannot be combined with {other}", CONFLICT)
    for conflict in conflicts:
        if conflict.features <= together.keys() and not conflict.features <= taken.keys():
            others = sorted(conflict.features - {name})
            return Obstacle(
                f"not together with {' and '.join(others)}: {conflict.reason}", CONFLICT
            )
    if not _carriers(paths, together, conflicts):
        alone = {member: traits[member] for member in group}
        if not _carriers(paths, alone, conflicts):
            for path in _carriers(paths, alone):
                if bad := _in_the_way(path, alone, conflicts):
                    return Obstacle(f"not together with {path}: {bad.reason}", CONFLICT)
            able = ", ".join(sorted(traits[name].paths)) or "none"
            return Obstacle(
                f"it needs another path ({able}) than is open or preferred ({', '.join(paths)})",
                PATH,
            )
        return Obstacle(
            f"no open path carries it together with {' and '.join(sorted(taken))}", PATH
        )
    return None


def _carriers(
    paths: Iterable[str], features: Mapping[str, Traits], conflicts: Iterable[Conflict] = ()
) -> list[str]:
    """The ``paths`` that carry all ``features``."""
    return [
        path
        for path in paths
        if all(traits.carried_by(path, features) for traits in features.values())
        and _in_the_way(path, features, conflicts) is None
    ]


def _in_the_way(
    path: str, features: Mapping[str, Traits], conflicts: Iterable[Conflict]
) -> Conflict | None:
    """What makes ``path`` the wrong one for ``features``."""
    for conflict in conflicts:
        if path in conflict.features and conflict.features <= {*features, path}:
            return conflict
    return None


def _best_path(
    paths: tuple[str, ...],
    taken: Mapping[str, Traits],
    prefer: Mapping[str, None],
    require: Mapping[str, None],
    source: Terms,
    destination: Terms,
) -> tuple[str, str]:
    conflicts = (*source.conflicts, *destination.conflicts)
    able = _carriers(paths, taken, conflicts)
    wishes = [path for path in prefer if path in able]
    avoided = {
        path: [name for name in sorted(taken) if path in taken[name].avoids] for path in paths
    }
    path = (wishes or [path for path in able if not avoided[path]] or able)[0]
    reason = _WHY[path]
    if path in require:
        reason += "; required by the policy"
    elif path in wishes:
        reason += "; preferred by the policy"
    else:
        # Say what stood in the way of the paths that would have come first.
        for better in PATHS[: PATHS.index(path)]:
            closed = source.closed.get(better) or destination.closed.get(better)
            blockers = [
                name
                for name in sorted(taken)
                if not taken[name].carried_by(better, taken)
                and (taken[name].rank > Rank.THRIFT or name in (*require, *prefer))
            ]
            if closed:
                reason += f"; not {better}: {closed}"
            elif blockers:
                reason += f"; not {better}: it cannot carry {' and '.join(blockers)}"
            elif avoided.get(better):
                reason += f"; not {better}: {' and '.join(avoided[better])} costs more there"
            elif bad := _in_the_way(better, taken, conflicts):
                others = " and ".join(sorted(bad.features - {better}))
                reason += f"; not {better}: not together with {others}: {bad.reason}"
    return path, reason
