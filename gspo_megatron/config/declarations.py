"""How a setting is declared: one call holds its default, its help and the range or choices of its value.

@dataclass
class TrainConfig:
    steps: int = setting(100, "RL steps.", least=0)

settings_of(Config)["train.steps"].complaint(-1)      # "train.steps=-1 must be at least 0; the default is 100"
"""

from __future__ import annotations

import copy
import math
import operator
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from gspo_megatron.base.errors import did_you_mean, shortened

Default = TypeVar("Default")

BOUNDS = (
    ("least", "at least", operator.ge),
    ("above", "above", operator.gt),
    ("most", "at most", operator.le),
    ("below", "below", operator.lt),
)
"""Keyword of `setting`, its words, and the comparison that value and bound must pass."""


def setting(
    default: Default,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    entries: type | None = None,
) -> Default:
    """A dataclass field with its help, a sentence or two of plain text, and the rules for its value. None, where the
    type allows it, always passes. `entries`: a dataclass of settings that declares the entries of a mapping."""
    rules: dict[str, Any] = {"help": help, "choices": choices, "entries": entries}
    rules |= {"least": least, "above": above, "most": most, "below": below}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=rules)
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class Setting:
    """A declared setting. `key` is `section.name`, `type` the resolved annotation."""

    key: str
    type: Any
    default: Any
    help: str
    least: float | None
    above: float | None
    most: float | None
    below: float | None
    choices: tuple[str, ...]
    entries: type | None = None

    @property
    def is_mapping(self) -> bool:
        return get_origin(self.type) is dict

    @property
    def is_list(self) -> bool:
        return get_origin(self.type) is list

    @property
    def is_text(self) -> bool:
        return not (self.is_mapping or self.is_list) and (str in self.kinds or self.type is Any)

    @property
    def allows_none(self) -> bool:
        return type(None) in self.kinds or self.type is Any

    @property
    def is_off_at_0(self) -> bool:
        """Whether its help says so."""
        return "0: off" in self.help

    @property
    def kinds(self) -> tuple[Any, ...]:
        """(int, NoneType) of `int | None`; (float,) of `float`; (str, float), name and value, of `dict[str, float]`."""
        return get_args(self.type) or (self.type,)

    @property
    def range(self) -> str:
        """`at least 0 and below 1`; empty where every value of the type is allowed."""
        return " and ".join(f"{words} {bound:g}" for words, bound, _ in self._bounds())

    def complaint(self, value: Any) -> str | None:
        """Why this value is not allowed, with the rule and a way out; None where it is. Its type is assumed right."""
        if value is None:
            return None if self.allows_none else self._complaint_of_null()
        if self.choices and value not in self.choices:
            near = did_you_mean(str(value), self.choices) or did_you_mean(str(value).lower(), self.choices)
            return f"{self.key}={shortened(repr(value))} is not one of {', '.join(self.choices)}{near}"
        if self.is_mapping:
            return self._complaint_of_mapping(value)
        if self.is_list:
            return self._complaint_of_list(value)
        if isinstance(value, float) and not math.isfinite(value):
            return f"{self.key}={value} must be a finite number"
        if not all(passes(value, bound) for _, bound, passes in self._bounds()):
            default = "null" if self.default is None else self.default
            return f"{self.key}={shortened(_digits(value))} must be {self.range}; the default is {default}"
        return None

    def _complaint_of_null(self) -> str:
        way_out = "0 switches it off" if self.is_off_at_0 else f"leave it out for the default, {self.default}"
        return f"{self.key}=null: it has no value that stands for none; {way_out}"

    def declared_entries(self) -> dict[str, Setting]:
        """Those of a mapping, where they are declared, by their own keys."""
        return _settings_in(self.key, self.entries) if self.entries else {}

    def _complaint_of_mapping(self, entries: dict[str, Any]) -> str | None:
        if self.entries:
            return next(filter(None, (self._complaint_of_entry(name, entries[name]) for name in entries)), None)
        for name, value in entries.items():
            if float in self.kinds and not (isinstance(value, float) and math.isfinite(value)):
                return f"{self.key}.{name}={value} must be a finite number"
        return None

    def _complaint_of_entry(self, name: str, value: Any) -> str | None:
        declared = self.declared_entries()
        if (entry := declared.get(f"{self.key}.{name}")) is None:
            names = [key.rpartition(".")[2] for key in declared]
            near = did_you_mean(str(name), names) or "."
            return f"unknown config key '{self.key}.{name}'{near} Keys of {self.key}: {', '.join(names)}"
        if not (type(value) in entry.kinds or (type(value) is int and float in entry.kinds)):
            words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in entry.kinds)
            return f"{entry.key}={shortened(repr(value))} must be a value of type {words}"
        return entry.complaint(value)

    def _complaint_of_list(self, items: list[Any]) -> str | None:
        """Lists hold texts and token ids, or mappings, which whoever reads them checks."""
        if self.kinds != (Any,):
            return None
        for item in items:
            if isinstance(item, bool) or not isinstance(item, (str, int)) or item == "":
                return f"{self.key}: {item!r} is neither a text nor a token id; write texts in quotes"
        return None

    def _bounds(self) -> list[tuple[str, float, Any]]:
        given = ((words, getattr(self, keyword), passes) for keyword, words, passes in BOUNDS)
        return [(words, bound, passes) for words, bound, passes in given if bound is not None]


def _digits(value: Any) -> str:
    """A number as text. Python refuses to write out integers of thousands of digits."""
    return f"an integer of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > 2**1000 else str(value)


@cache
def settings_of(config: type) -> dict[str, Setting]:
    """Every setting of a dataclass of sections by its key, in the order of their declaration."""
    sections = get_type_hints(config).items()
    return {key: found for name, section in sections for key, found in _settings_in(name, section).items()}


def _settings_in(name: str, section: type) -> dict[str, Setting]:
    found, types = {}, get_type_hints(section)
    for f in fields(section):
        key = f"{name}.{f.name}"
        assert "help" in f.metadata, f"{key} is not declared: write {f.name}: {f.type} = setting(default, help)"
        default = f.default if f.default_factory is MISSING else f.default_factory()
        found[key] = Setting(key, types[f.name], default, **f.metadata)
    return found
