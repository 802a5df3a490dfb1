"""What the operator of this daemon, and the user of one migration, ask for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..errors import FeatureError

__all__ = ["LEGACY", "Legacy", "Policy"]

#: What is done where nobody greets.
Legacy = Literal["refuse", "allow"]
LEGACY: tuple[Legacy, ...] = ("refuse", "allow")


@dataclass(frozen=True)
class Policy:
    """Names of features, or of paths, in three lists, and what becomes of old peers.

    :ivar prefer: taken before others where they exclude each other, in this order.
    :ivar require: the migration is refused without them.
    :ivar exclude: never taken.
    :ivar legacy: whether a destination without a qmigd gets QEMU's plain stream.
    """

    prefer: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    legacy: Legacy = "refuse"

    def narrowed(
        self,
        prefer: Iterable[str] = (),
        require: Iterable[str] = (),
        exclude: Iterable[str] = (),
        legacy: Legacy | None = None,
    ) -> Policy:
        """Add what one migration asks for.

        The operator's ``require`` and ``exclude`` stay in force: whoever asks for the
        contrary is refused.  In ``prefer`` the migration's own names come first.

        :param legacy: ``None``: as the operator says.
        :raises FeatureError: it asks for what cannot be, for itself or beside the operator's.
        """
        prefer, require, exclude = tuple(prefer), tuple(require), tuple(exclude)
        for name in require:
            if name in self.exclude:
                raise FeatureError(
                    f"{name} is required here but excluded by the [policy] of this daemon's "
                    f"configuration"
                )
        for name in exclude:
            if name in self.require:
                raise FeatureError(
                    f"{name} is excluded here but required by the [policy] of this daemon's "
                    f"configuration"
                )
            for word, names in (("required", require), ("preferred", prefer)):
                if name in names:
                    raise FeatureError(f"{name} is both {word} and excluded; name it once")
        return Policy(
            _unique((*prefer, *self.prefer)),
            _unique((*self.require, *require)),
            _unique((*self.exclude, *exclude)),
            legacy or self.legacy,
        )

    def unknown(self, known: Iterable[str]) -> tuple[str, ...]:
        """Return the names in any of the lists that are not ``known``, in order."""
        names = set(known)
        mentioned = _unique((*self.prefer, *self.require, *self.exclude))
        return tuple(name for name in mentioned if name not in names)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
