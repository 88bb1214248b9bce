"""The terms of a reward, as settings name them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gspo_megatron.base.errors import ConfigError, did_you_mean, shortened
from gspo_megatron.rewards.rules import IN_WORKERS, REWARDS, SERVICES


@dataclass(frozen=True)
class Term:
    """One function in the weighted sum.

    Attributes:
        name: what metrics and messages call it.
        function: one of REWARDS, or `module:function`.
        gate: a response whose value is below 1 gets 0 for all later terms, which are not computed.
        parameters: passed to the function by keyword.
    """

    name: str
    function: str
    weight: float = 1.0
    gate: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_users(self) -> bool:
        return ":" in self.function


KINDS: dict[str, tuple[type, ...]] = {"name": (str,), "function": (str,), "weight": (int, float), "gate": (bool,)}
"""Keys of an entry of reward.terms that are not the function's parameters, and the types of their values."""


def terms_of(
    functions: Mapping[str, float],
    terms: Sequence[Mapping[str, Any]] = (),
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Term]:
    """Those of reward.functions, name: weight, then those of reward.terms. `defaults`: parameters by function.

    Raises:
        ConfigError: there is none, a name comes twice, or a weight is not finite.
    """
    found = [Term(name, name, weight) for name, weight in functions.items()] + [_term(term) for term in terms]
    if not found:
        known = ", ".join((*REWARDS, *IN_WORKERS, *SERVICES))
        raise ConfigError(f"reward.functions is empty; add one of {known} or 'module:function'")
    for i, term in enumerate(found):
        if not math.isfinite(term.weight):
            raise ConfigError(f"the weight {term.weight} of reward {term.name!r} must be a finite number")
        if term.name in [earlier.name for earlier in found[:i]]:
            raise ConfigError(f"reward.terms: two terms are called {term.name!r}; give one of them another name")
    if all(term.gate for term in found) and not any(term.weight for term in found):
        raise ConfigError(
            f"reward.terms: {found[0].name!r} is a gate to nothing; give it a weight, or add a term after it"
        )
    below = defaults or {}
    return [replace(t, parameters={**below.get(t.function, {}), **t.parameters}) for t in found]


def _term(given: Mapping[str, Any]) -> Term:
    shown = shortened(repr(dict(given)))
    if not isinstance(given.get("function"), str):
        near = did_you_mean("function", [key for key in given if isinstance(key, str)])
        raise ConfigError(f"reward.terms: {shown} names no function{near or '; write {function: last_number}'}")
    own = {key: given[key] for key in KINDS if key in given}
    own.setdefault("name", own["function"])
    own.setdefault("weight", 0.0 if own.get("gate") else 1.0)
    own.setdefault("gate", False)
    for key, kinds in KINDS.items():
        if type(own[key]) not in kinds:
            words = " or ".join(kind.__name__ for kind in kinds)
            raise ConfigError(f"reward.terms: {key}={own[key]!r} in {shown} must be a value of type {words}")
    parameters = {key: value for key, value in given.items() if key not in KINDS}
    if isinstance(pattern := parameters.get("pattern"), str):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"reward.terms: pattern={pattern!r} is not a regular expression ({error})") from error
    return Term(**{**own, "weight": float(own["weight"])}, parameters=parameters)
