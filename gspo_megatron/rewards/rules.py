"""Rewards by rule: functions of a response, mostly of its decoded text."""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Sequence as Seq
from decimal import Decimal

RewardFunction = Callable[..., float]
"""Called with those of prompt=, response=, answer=, ... that it names (`functions.ARGUMENTS`); returns a number."""


NUMBER = re.compile(r"([-+]?)\$?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)")
SIGNED_ALONE = re.compile(r"((?<![0-9])[-+]|)" + NUMBER.pattern.partition(")")[2])
MARKER = "####"


def exact_match(*, prompt: str, response: str, answer: str) -> float:
    """1 when the response is the answer, ignoring white space around them."""
    return float(response.strip() == answer.strip())


def final_number(*, prompt: str, response: str, answer: str) -> float:
    """1 when the number after the response's last `####` equals that of the answer (`#### 1,200.0` = `1200`).

    The number must be alone on the rest of its line: `#### 3 or 4` does not count. An answer may be a bare number.

    Raises:
        ValueError: an answer without such a number.
    """
    expected = marked_number(answer if MARKER in answer else f"{MARKER} {answer}")
    if expected is None:
        raise ValueError(f"the answer {answer[-60:]!r} is not a number and does not end in '{MARKER} number'")
    return float(marked_number(response) == expected)


def last_number(*, prompt: str, response: str, answer: str) -> float:
    """1 when the last number of the response, wherever it stands, equals that of the answer (`The answer is 12.`).

    Raises:
        ValueError: an answer without a number.
    """
    expected = last_number_of(answer)
    if expected is None:
        raise ValueError(f"the answer {answer[-60:]!r} has no number")
    return float(last_number_of(response) == expected)


def boxed(*, prompt: str, response: str, answer: str) -> float:
    r"""1 when the response's last `\boxed{...}` holds the answer: the same number, or the same text but for white
    space. The answer may be boxed itself."""
    found, expected = boxed_content(response), boxed_content(answer) or answer
    if found is None:
        return 0.0
    numbers = [NUMBER.fullmatch(text.strip()) for text in (found, expected)]
    if numbers[0] and numbers[1]:
        return float(decimal_of(numbers[0]) == decimal_of(numbers[1]))
    return float("".join(found.split()) == "".join(expected.split()))


def answer_format(*, response: str, pattern: str | None = None) -> float:
    """1 when the whole response matches the regular expression `pattern`, in which . stands for line breaks, too, white
    space at its ends aside. Without a pattern: when its last line is `#### number`, and its only `####`."""
    if pattern is not None:
        return float(re.fullmatch(pattern, response.strip(), re.DOTALL) is not None)
    last_line = response.strip().rpartition("\n")[2]
    well_formed = last_line.startswith(MARKER) and marked_number(last_line) is not None
    return float(well_formed and response.count(MARKER) == 1)


def length(*, tokens: Seq[int], max_tokens: int, buffer: int) -> float:
    """0 for a response of up to max_tokens - buffer tokens, from there on falling linearly to -1 at max_tokens:

        0                                        |y| <= max_tokens - buffer
        ((max_tokens - buffer) - |y|) / buffer   |y| <= max_tokens
        -1                                       beyond                  (DAPO's overlong punishment, 2503.14476 Eq. 13)

    Raises:
        ValueError: not 0 < buffer <= max_tokens.
    """
    if not 0 < buffer <= max_tokens:
        raise ValueError(f"buffer={buffer} must be from 1 to max_tokens={max_tokens}")
    return max(-1.0, min(0.0, (max_tokens - buffer - len(tokens)) / buffer))


def repetition(*, response: str, n: int = 3) -> float:
    """(different n-grams of words) / (all of them) - 1: 0 where none comes twice, near -1 for one over and over.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    words = response.lower().split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) - 1 if grams else 0.0


def countdown(*, prompt: str, response: str, answer: str) -> float:
    """1 when the response is a sum like `7+5-3` that uses each number once and reaches the target.

    The answer is the exercise, `7,5,3=9`.

    Raises:
        ValueError: an answer of another form.
    """
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*=[0-9]+", answer):
        raise ValueError(f"the answer {answer[:60]!r} is not a countdown exercise like '7,5,3=9'")
    numbers, _, target = answer.partition("=")
    expression = response.strip()
    if not re.fullmatch(r"[0-9]+([+-][0-9]+)*", expression):
        return 0.0
    if sorted(re.findall("[0-9]+", expression)) != sorted(numbers.split(",")):
        return 0.0
    return float(sum(map(int, re.findall("[+-]?[0-9]+", expression))) == int(target))


REWARDS: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "final_number": final_number,
    "last_number": last_number,
    "boxed": boxed,
    "format": answer_format,
    "length": length,
    "repetition": repetition,
    "countdown": countdown,
}


IN_WORKERS = {
    "code": "gspo_megatron.rewards.code:code",
    "math": "gspo_megatron.rewards.math:math",
    "json_schema": "gspo_megatron.rewards.structure:json_schema",
}
"""Rules that may run for hours on a hostile response, or need other packages: called in processes of their own."""
SERVICES = {
    "remote": "gspo_megatron.rewards.remote:Remote",
    "judge": "gspo_megatron.rewards.judge:Judge",
    "reward_model": "gspo_megatron.rewards.reward_model:RewardModel",
}
"""Rewards that another program computes (`services.py`)."""


def marked_number(text: str) -> Decimal | None:
    """The number that fills the rest of the line after the last marker: `72`, `-1,200.50`, `$5.`"""
    _, marker, tail = text.rpartition(MARKER)
    number = NUMBER.fullmatch(tail.partition("\n")[0].strip())
    return decimal_of(number) if marker and number else None


def last_number_of(text: str) -> Decimal | None:
    """The sign of `5-3` is a minus between two numbers."""
    numbers = list(SIGNED_ALONE.finditer(text))
    return decimal_of(numbers[-1]) if numbers else None


def boxed_content(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, with braces inside it balanced; None without one that is closed."""
    _, marker, tail = text.rpartition(r"\boxed{")
    depth = 1
    for i, character in enumerate(tail if marker else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return tail[:i]
    return None


def final_expression(text: str) -> str | None:
    """What its last box holds, or what follows its last marker on that line."""
    boxed = boxed_content(text)
    if boxed is None and MARKER in text:
        return text.rpartition(MARKER)[2].partition("\n")[0].strip()
    return boxed


def decimal_of(number: re.Match[str]) -> Decimal:
    """The value of a match of NUMBER."""
    return Decimal(number[1] + number[2].replace(",", ""))
