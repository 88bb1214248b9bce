"""The value of an arithmetic expression, exactly, without running code.

    value      = product (("+" | "-") product)*
    product    = signed (("*" | "/") signed)*
    signed     = ("+" | "-") signed | number | "(" value ")"

Commas in a number are left out: 1,000 is 1000.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 200
"""Characters of an expression; they bound the depth of its brackets and the size of every number in it."""
TOKEN = re.compile(r"\s*(?:(?P<number>\d[\d,]*(?:\.\d*)?|\.\d+)|(?P<mark>[-+*/()]))")
DIGITS = 10


def evaluate(expression: str) -> Fraction:
    """The value of an expression, exactly.

    Raises:
        ValueError: not an expression of numbers, + - * / and brackets, or too long.
        ZeroDivisionError: a division by 0.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"an expression of {len(expression)} characters, more than {LONGEST}")
    reader = _Reader(_tokens(expression.rstrip()))
    value = reader.value()
    if reader.next is not None:
        raise ValueError(f"{reader.next!r} where the expression should end")
    return value


def written(value: Fraction) -> str:
    """As a decimal number: exact, or rounded to DIGITS after the point."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(abs(value) * 10**DIGITS)
    whole, part = divmod(scaled, 10**DIGITS)
    decimals = f"{part:0{DIGITS}d}".rstrip("0")
    sign = "-" if value < 0 and scaled else ""
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"


def _tokens(expression: str) -> list[str]:
    found, position = [], 0
    while position < len(expression):
        match = TOKEN.match(expression, position)
        if match is None:
            raise ValueError(f"{expression[position:].lstrip()[:20]!r} is not a number, operator or bracket")
        found.append((match["number"] or match["mark"]).replace(",", ""))
        position = match.end()
    return found


class _Reader:
    """Reads tokens from the left. `next`: the one to read, None at the end."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = iter(tokens)
        self.next: str | None = None
        self._take()

    def _take(self) -> str | None:
        taken, self.next = self.next, next(self._tokens, None)
        return taken

    def value(self) -> Fraction:
        found = self._product()
        while self.next in ("+", "-"):
            found += self._product() if self._take() == "+" else -self._product()
        return found

    def _product(self) -> Fraction:
        found = self._signed()
        while self.next in ("*", "/"):
            if self._take() == "*":
                found *= self._signed()
            else:
                found /= self._signed()
        return found

    def _signed(self) -> Fraction:
        taken = self._take()
        if taken in ("+", "-"):
            return self._signed() if taken == "+" else -self._signed()
        if taken == "(":
            found = self.value()
            if self._take() != ")":
                raise ValueError("a bracket is not closed")
            return found
        if taken is None or taken in "*/)":
            raise ValueError(f"{'the end' if taken is None else repr(taken)} where a number should be")
        return Fraction(taken)
