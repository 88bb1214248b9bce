"""What a majority votes on: the answer that a reward judges."""

from __future__ import annotations

import pytest

from gspo_megatron.rewards.answers import EXTRACT, answer_of
from gspo_megatron.rewards.rules import IN_WORKERS, REWARDS


@pytest.mark.parametrize(
    ("reward", "response", "answer"),
    [
        ("exact_match", " 12 \n", "12"),
        ("exact_match", "012", "012"),
        ("exact_match", "  ", None),
        ("my_module:judge", "So: 12.0", "So: 12.0"),
        ("last_number", "3 and 1,200.50 apples", "1200.5"),
        ("last_number", "1200 apples", "1200"),
        ("last_number", "-0.0", "0"),
        ("last_number", "100000000000000000000000000000000001", "100000000000000000000000000000000001"),
        ("last_number", "none", None),
        ("final_number", "12\n#### $7.", "7"),
        ("final_number", "12", None),
        ("boxed", r"\boxed{ 1{,}2 } or \boxed{007}", "7"),
        ("boxed", r"\boxed{a + b}", "a+b"),
        ("boxed", "12", None),
        ("boxed", r"\boxed{}", None),
        ("math", r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("math", "so\n#### 12.50", "12.5"),
        ("math", "12", None),
    ],
)
def test_answers(reward: str, response: str, answer: str | None) -> None:
    assert answer_of(reward, response) == answer


def test_the_table_names_rewards() -> None:
    assert EXTRACT.keys() <= REWARDS.keys() | IN_WORKERS.keys()
