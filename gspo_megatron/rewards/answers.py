"""The answer in a response, as a text that equal answers share: what a majority votes on."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal

from gspo_megatron.rewards.rules import (
    NUMBER,
    boxed_content,
    decimal_of,
    final_expression,
    last_number_of,
    marked_number,
)


def answer_of(reward: str, response: str) -> str | None:
    """What the reward function of that name judges in a response; of one that is not in EXTRACT, the whole text, white
    space at its ends aside. None where that is nothing."""
    return EXTRACT.get(reward, str.strip)(response) or None


def _number(find: Callable[[str], Decimal | None]) -> Callable[[str], str]:
    def text(response: str) -> str:
        number = find(response)
        return "" if number is None else _shortest(number)

    return text


def _expression(find: Callable[[str], str | None]) -> Callable[[str], str]:
    """As `boxed` compares them: numbers by their values, other texts without white space."""

    def text(response: str) -> str:
        found = (find(response) or "").strip()
        number = NUMBER.fullmatch(found)
        return _shortest(decimal_of(number)) if number else "".join(found.split())

    return text


EXTRACT: dict[str, Callable[[str], str]] = {
    "final_number": _number(marked_number),
    "last_number": _number(last_number_of),
    "boxed": _expression(boxed_content),
    "math": _expression(final_expression),
}
"""By the names in `rules.REWARDS` and `rules.IN_WORKERS`."""


def _shortest(number: Decimal) -> str:
    """`1200` of 1,200.0: one text for each number."""
    text = f"{number:f}" if number else "0"
    return text.rstrip("0").rstrip(".") if "." in text else text
