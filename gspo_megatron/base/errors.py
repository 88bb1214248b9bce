"""Errors that a user meets, and the texts that help to mend them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work. Says the value, the rule and the fix."""


class DataError(ValueError):
    """A prompt file, tokenizer or reward that cannot be used. Says the place, what was found and what was expected."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another model."""


class StopRequested(Exception):
    """The run is to save and end. Raised at a safe point, on all processes together."""


class GuardError(RuntimeError):
    """A guard stopped the run: a number that is not finite, replicas that differ. Says what was found, and where."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the x of `names` nearest to `name`, or nothing when none is near."""
    near = get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


Row = TypeVar("Row")


def lookup(table: Mapping[str, Row], name: str, what: str) -> Row:
    """table[name], or ConfigError with the nearest right name."""
    if name not in table:
        raise ConfigError(f"{what} {name!r} is unknown{did_you_mean(name.lower(), table)}; known: {', '.join(table)}")
    return table[name]
