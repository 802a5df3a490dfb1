"""The guest's migration capabilities and parameters, each written down once.

What QMP commands check and return, and the schema that ``query-qmp-schema`` has, come from
the two tables here.  Names, meanings and defaults are QEMU's (qapi/migration.json).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmigd.errors import ArgumentError

__all__ = ["CAPABILITIES", "PARAMETERS", "SCHEMA", "Settings"]

#: What can be switched, and what each of them cannot do without.
CAPABILITIES: Mapping[str, tuple[str, ...]] = {
    "auto-converge": (),
    "events": (),
    "multifd": (),
    "postcopy-preempt": ("postcopy-ram",),
    "postcopy-ram": (),
    "rdma-pin-all": (),
    "return-path": (),
    "zero-copy-send": ("multifd",),
}


@dataclass(frozen=True)
class Parameter:
    """A migration parameter.

    :ivar least: the lowest number that it can be; ``most`` is the highest.
    :ivar values: of an enum; empty for a number.
    """

    default: Any
    least: int = 0
    most: int = (1 << 63) - 1
    values: tuple[str, ...] = ()


PARAMETERS: Mapping[str, Parameter] = {
    "max-bandwidth": Parameter(128 << 20),
    "avail-switchover-bandwidth": Parameter(0),
    "downtime-limit": Parameter(300, most=2000_000),
    "max-postcopy-bandwidth": Parameter(0),
    "multifd-channels": Parameter(2, least=1, most=255),
    "multifd-compression": Parameter("none", values=("none", "zlib", "zstd")),
    "multifd-zlib-level": Parameter(1, most=9),
    "multifd-zstd-level": Parameter(1, most=20),
    "throttle-trigger-threshold": Parameter(50, least=1, most=100),
    "cpu-throttle-initial": Parameter(20, least=1, most=99),
    "cpu-throttle-increment": Parameter(10, least=1, most=99),
    "max-cpu-throttle": Parameter(99, least=1, most=99),
}

#: What takes a userfaultfd at the destination.
_FAULTS = "postcopy-ram"

#: Parameters that the stream depends on: not to be changed while there is one.
_FIXED = ("multifd-channels", "multifd-compression")


def _check(name: str, value: Any) -> None:
    known = PARAMETERS.get(name)
    if known is None:
        raise ArgumentError(f"Parameter '{name}' is unexpected")
    if known.values:
        if value not in known.values:
            raise ArgumentError(
                f"Parameter '{name}' does not accept value '{value}'; it can be one of "
                f"{', '.join(known.values)}"
            )
    elif isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(f"Invalid parameter type for '{name}', expected: integer")
    elif not known.least <= value <= known.most:
        raise ArgumentError(
            f"Parameter '{name}' expects a value from {known.least} to {known.most}"
        )


class Settings:
    """What is set on one guest; read by several threads, changed by one."""

    def __init__(self, busy: Callable[[], bool], *, faults: bool = True) -> None:
        """:param busy: whether there is a migration under way.
        :param faults: the guest's faults can be served, which a destination needs in postcopy.
        """
        self._busy = busy
        self._capabilities = {
            name: False
            for name, needed in CAPABILITIES.items()
            if faults or _FAULTS not in (name, *needed)
        }
        self._parameters = {name: known.default for name, known in PARAMETERS.items()}

    def on(self, name: str) -> bool:
        """Whether a capability is switched on."""
        return self._capabilities.get(name, False)

    def __getitem__(self, name: str) -> Any:
        """The value of a parameter."""
        return self._parameters[name]

    @property
    def capabilities(self) -> list[dict[str, Any]]:
        """As ``query-migrate-capabilities`` returns them."""
        return [{"capability": name, "state": on} for name, on in self._capabilities.items()]

    @property
    def parameters(self) -> dict[str, Any]:
        """As ``query-migrate-parameters`` returns them."""
        return dict(self._parameters)

    def switch(self, switches: Sequence[Mapping[str, Any]]) -> None:
        """Set capabilities, all of them or none.

        :raises ArgumentError: one is unknown, or they do not go together.
        """
        if self._busy():
            raise ArgumentError("There's a migration process in progress")
        wanted = dict(self._capabilities)
        for entry in switches:
            name, state = entry.get("capability"), entry.get("state")
            if name not in wanted:
                raise ArgumentError(f"Parameter 'capability' does not accept value '{name}'")
            if not isinstance(state, bool):
                raise ArgumentError("Invalid parameter type for 'state', expected: boolean")
            wanted[name] = state
        for name, on in wanted.items():
            for other in CAPABILITIES[name]:
                if on and not wanted[other]:
                    raise ArgumentError(f"Capability '{name}' requires capability '{other}'")
        self._capabilities = wanted
        self._together(self._parameters)

    def change(self, values: Mapping[str, Any]) -> None:
        """Set parameters, all of them or none.

        :raises ArgumentError: one is unknown, or does not fit.
        """
        for name, value in values.items():
            _check(name, value)
            if name in _FIXED and self._busy() and value != self._parameters[name]:
                raise ArgumentError(f"'{name}' cannot be changed while a migration is under way")
        wanted = {**self._parameters, **values}
        self._together(wanted)
        self._parameters = wanted

    def _together(self, parameters: Mapping[str, Any]) -> None:
        if self.on("zero-copy-send") and parameters["multifd-compression"] != "none":
            raise ArgumentError("Zero copy only available for non-compressed multifd migration")


def _schema() -> list[dict[str, Any]]:
    members: list[dict[str, Any]] = []
    entities: list[dict[str, Any]] = [
        {"name": "int", "meta-type": "builtin", "json-type": "int"},
        {"name": "str", "meta-type": "builtin", "json-type": "string"},
    ]
    for name, known in PARAMETERS.items():
        kind = "int"
        if known.values:
            kind = f"enum-{name}"
            listed = [{"name": value} for value in known.values]
            entities.append(
                {
                    "name": kind,
                    "meta-type": "enum",
                    "members": listed,
                    "values": list(known.values),
                }
            )
        members.append({"name": name, "type": kind, "default": None})
    return [
        *entities,
        {"name": "parameters", "meta-type": "object", "members": members},
        {"name": "nothing", "meta-type": "object", "members": []},
        {
            "name": "migrate-set-parameters",
            "meta-type": "command",
            "arg-type": "parameters",
            "ret-type": "nothing",
            "allow-oob": False,
        },
    ]


#: What ``query-qmp-schema`` returns: as much as is needed to enumerate the parameters.
SCHEMA = _schema()
