"""Parameters of a reward that is more than a function: declared as fields, each with its range beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, field, fields
from typing import Any, TypeVar

from gspo_megatron.base.errors import ConfigError, did_you_mean, shortened

KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
    "tuple[str, ...]": (list, tuple),
    "tuple[float, float]": (list, tuple),
    "Mapping[str, Any]": (dict,),
}
"""What YAML may give for a field of that type."""
Declared = TypeVar("Declared")


def number(default: float | None, *, least: float = -math.inf, above: float = -math.inf) -> Any:
    """A field whose value must be at least `least`, or above `above`, and finite."""
    return field(default=default, metadata={"least": least, "above": above})


def read(kind: type[Declared], given: Mapping[str, Any]) -> Declared:
    """The dataclass `kind` with these values.

    Raises:
        ConfigError: a parameter that is unknown, missing, of another type or out of range.
    """
    declared = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in declared:
            raise ConfigError(f"it has no parameter {name!r} to set{did_you_mean(name, declared) or '.'}")
        _check(declared[name], value)
    for name, f in declared.items():
        if f.default is MISSING and f.default_factory is MISSING and name not in given:
            raise ConfigError(f"it needs {name}: write {{function: ..., {name}: ...}} in reward.terms")
    return kind(**given)


def _check(declared: Any, value: Any) -> None:
    name, shown = declared.name, shortened(repr(value))
    kinds = KINDS[declared.type]
    if type(value) not in kinds:
        words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ConfigError(f"{name}={shown} must be a value of type {words}")
    least, above = (declared.metadata.get(bound, -math.inf) for bound in ("least", "above"))
    if type(value) in (int, float) and not (value >= least and value > above and value < math.inf):
        rule = (
            f"at least {least:g}" if math.isfinite(least) else f"above {above:g}" if math.isfinite(above) else "finite"
        )
        raise ConfigError(f"{name}={shown} must be {rule}, and finite")
