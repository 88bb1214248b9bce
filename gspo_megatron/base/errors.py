"""Errors that users see, and helpers for their messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot work. Names the value, the rule and the fix."""


class DataError(ValueError):
    """A prompt file, tokenizer or reward that cannot be used. Names the place, what was found and what was expected."""


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or from another model."""


class EngineError(RuntimeError):
    """An engine that cannot be started, does not answer, or has other weights than it should. Names the engine."""


class UnfitEngine(EngineError):
    """An engine that the run cannot use as the settings name it: another program, or one started otherwise."""


class EnginesDown(EngineError):
    """No engine is left to sample with. The policy is as good as before: the run is saved and can be started again."""


class EnginesStale(EnginesDown):
    """No engine has the current weights, and some answer: they can be given them.

    Attributes:
        ended: responses that the engines have finished so far.
    """

    ended: int = 0


class Refused(EngineError):
    """An engine that is well refuses what it was asked (HTTP 4xx), as every other one would."""


class CannotSend(EngineError):
    """The trainer cannot send its weights. The engines are as well as before, and so is the policy."""


class WrongWeights(EngineError):
    """An engine has other log-probs than the trainer for the same tokens: nothing that it samples can be trained on."""


class StartError(RuntimeError):
    """Processes that do not find each other. Names the rank, the address and what to try."""


class StopRequested(Exception):
    """The run should save and end. Raised at a safe point, on all processes together."""


class GuardError(RuntimeError):
    """A guard stopped the run: a non-finite number, or replicas that differ. Says what was found, and where."""


CLOSE = 0.65
"""How like a name another has to be to be suggested (difflib's ratio): `question` for `solution`, 0.63, misleads."""
LONGEST_VALUE = 200
"""Characters of a value that a message shows."""


def shortened(text: str, most: int = LONGEST_VALUE) -> str:
    """The text, cut where a message would drown in it."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def printable(text: str) -> str:
    """The text with NUL, escapes and whatever else steers a terminal written out, as in `\\x1b`; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def plural(count: int, noun: str) -> str:
    """`1 step`, `2 steps`, `1,024 processes`."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def memory_size(gib: float) -> str:
    """`79.6 GiB`; below 0.1 GiB `12.0 MiB`."""
    return f"{gib:,.1f} GiB" if gib >= 0.1 else f"{1024 * gib:,.1f} MiB"


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the closest of the `names` that begin so, `dppo_tv` for `dppo`; else with the closest,
    or one that has it as a part, `clip.low` for `low`; an empty string when none is close."""
    known = list(names)
    # A letter alone begins too many names to mean one of them.
    longer = [k for k in known if len(name) > 1 and k.startswith(name)]
    near = get_close_matches(name, longer, n=1, cutoff=0) or get_close_matches(name, known, n=1, cutoff=CLOSE)
    near = near or [k for k in known if name in re.split("[._]", k)]
    return f"; did you mean {near[0]!r}?" if near else ""


Row = TypeVar("Row")


def lookup(table: Mapping[str, Row], name: str, what: str) -> Row:
    """table[name].

    Raises:
        ConfigError: `name` is not in the table. Suggests the closest key.
    """
    if name not in table:
        near = did_you_mean(name.lower(), table) or "."
        raise ConfigError(f"{what} {name!r} is unknown{near} Known: {', '.join(table)}")
    return table[name]
