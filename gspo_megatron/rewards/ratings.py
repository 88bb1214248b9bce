"""Finds the rating in a judge's answer. Called in a process of its own: a pattern may backtrack for hours."""

from __future__ import annotations

import re

from gspo_megatron.rewards.user_code import plain

SHOWN = 120


def rating(*, response: str, pattern: str, low: float, high: float) -> dict[str, float]:
    """The number that the last match of `pattern` in a judge's answer captures: (rating - low) / (high - low), and the
    rating itself.

    Raises:
        ValueError: there is no match, or no number from low to high in it.
    """
    found = list(re.finditer(pattern, response, re.IGNORECASE))
    if not found:
        raise ValueError(f"the judge gave no rating that pattern finds: {_end_of(response)!r}")
    text = found[-1][1] if found[-1].re.groups else found[-1][0]
    try:
        number = float(text or "")
    except ValueError:
        raise ValueError(f"the judge's rating {text!r} is not a number: {_end_of(response)!r}") from None
    if not low <= number <= high:
        raise ValueError(f"the judge's rating {number:g} is not from {low:g} to {high:g}: {_end_of(response)!r}")
    return {"score": (number - low) / (high - low), "rating": number}


def _end_of(text: str) -> str:
    """Ratings come last."""
    return plain(("..." if len(text) > SHOWN else "") + text[-SHOWN:], 2 * SHOWN)
