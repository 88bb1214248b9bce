r"""Whether a response ends in the answer, in `\boxed{...}` or after `####`, by the package math-verify.

Called in processes of their own: sympy may hang, or take gigabytes. Numbers are compared here, which is 200 times as
fast. Beyond that, math-verify decides, guarded against what it gets wrong:

- Only the last box is judged, or the rest of the line after the last `####`. math-verify reads any number of a text,
  and a set where there are several boxes.
- Its repair of malformed operators is off: after a \frac it adds up the digits of numbers behind a brace, so that
  \frac{\pi}{12}+\log_{2}11 equals \frac{\pi}{12}+1. \frac12 and \sqrt2 get their braces here.
- Words are compared as text: as a product of letters, Eve equals vEe.
- Numerals in different bases are different, as are a set and an interval, which it compares as sets.

It still ignores a percent sign, since data sets leave it out, and rounds to 6 decimals (1/3 is 0.333333).
"""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

from gspo_megatron.rewards.rules import NUMBER, decimal_of, final_expression

try:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
except ImportError as error:
    raise ImportError("it needs the package math-verify: pip install 'math-verify', or '.[math]' here") from error

VERDICTS = ("right", "wrong", "unparsed", "timed_out")
CONFIGS = (
    LatexExtractionConfig(
        normalization_config=replace(LatexExtractionConfig().normalization_config, malformed_operators=False)
    ),
    ExprExtractionConfig(),
)
WORD = re.compile(r"[A-Za-z]{2,}(?:[ -][A-Za-z]+)*")
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")
BASE = re.compile(r"[0-9A-F]+_\{?([0-9]+)\}?")
UNBRACED = (
    (re.compile(r"\\([dt]?)frac\s?(\d)\s?(\d)"), r"\\\1frac{\2}{\3}"),
    (re.compile(r"\\sqrt\s?(\d)"), r"\\sqrt{\1}"),
)

for logger in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(logger).setLevel(logging.CRITICAL)  # they log every text that they cannot read


class TooLong(BaseException):
    """Not an Exception, which the libraries catch."""


def math(*, response: str, answer: str, seconds: float = 5.0) -> dict[str, float]:
    r"""1 when what the response's last `\boxed{...}` holds equals the answer: as a number, or else as math-verify
    compares them. Without a box, what follows its last `####` is judged.

    The answer is an expression, with or without `$` or a box around it, or ends in `#### expression`. Besides the
    score, one of `right`, `wrong`, `unparsed` (nothing to judge, or nothing that can be read) and `timed_out` (after
    `seconds`) is 1.

    Raises:
        ValueError: an answer that math-verify cannot read.
    """
    expected = final_expression(answer)
    verdict = verdict_of(final_expression(response), answer.strip() if expected is None else expected, seconds)
    return {"score": float(verdict == "right"), **{name: float(name == verdict) for name in VERDICTS}}


def verdict_of(found: str | None, expected: str, seconds: float) -> str:
    """One of VERDICTS."""
    if found is None or not found.strip():
        return "unparsed"
    found, expected = (_braced(text.strip().strip("$").strip()) for text in (found, expected))
    numbers = [NUMBER.fullmatch(text) for text in (found, expected)]
    if numbers[0] and numbers[1]:
        return _verdict(decimal_of(numbers[0]) == decimal_of(numbers[1]))
    if _bare(found) == _bare(expected):
        return "right"
    if WORD.fullmatch(_bare(expected)) or _kinds_differ(found, expected):
        return "wrong"
    try:
        with _at_most(seconds):
            gold, target = _parsed_answer(expected), _parsed(found)
            return _verdict(_equal(gold, target)) if target else "unparsed"
    except TooLong:
        return "timed_out"


def _verdict(is_right: bool) -> str:
    return "right" if is_right else "wrong"


def _braced(text: str) -> str:
    for pattern, braced in UNBRACED:
        text = pattern.sub(braced, text)
    return text


def _bare(text: str) -> str:
    r"""Without text commands, white space doubled or at the ends, and the case of words: `\text{ Monday}` is monday."""
    return " ".join(TEXT_COMMAND.sub(r"\1", text).split()).casefold()


def _kinds_differ(found: str, expected: str) -> bool:
    """What math-verify would not tell apart."""
    bases = [BASE.fullmatch(text) for text in (found, expected)]
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return True
    is_set = [text.startswith(r"\{") and text.endswith(r"\}") for text in (found, expected)]
    is_interval = [text[:1] in ("(", "[") and text[-1:] in (")", "]") for text in (found, expected)]
    return (is_set[0] and is_interval[1]) or (is_interval[0] and is_set[1])


def _parsed_answer(expected: str) -> list[Any]:
    """The row's answer, as math-verify reads it.

    Raises:
        ValueError: nothing in it can be read.
    """
    parsed = _parsed(expected)
    if not parsed:
        raise ValueError(f"the answer {expected[-60:]!r} is nothing that math-verify can read")
    return parsed


@lru_cache(maxsize=4096)
def _parsed(text: str) -> list[Any]:
    """What math-verify reads in a box, most likely first; empty where it only repeats the text."""
    found = parse(rf"\boxed{{{text}}}", extraction_config=CONFIGS, parsing_timeout=None)
    return found if any(not isinstance(expression, str) for expression in found) else []


def _equal(gold: list[Any], target: list[Any]) -> bool:
    return bool(verify(gold, target, timeout_seconds=None))  # the order matters: x<5 may be answered by an interval


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Bounds what runs within it.

    Raises:
        TooLong: the time is over, even where a library has caught that once.
    """
    late = False

    def ring(*_: object) -> None:
        nonlocal late
        late = True
        raise TooLong

    before = signal.signal(signal.SIGALRM, ring)
    try:
        # Again and again: a bare `except:` somewhere in the libraries takes the first.
        signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if late:
        raise TooLong
