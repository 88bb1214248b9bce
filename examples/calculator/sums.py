"""Arithmetic that a tiny model cannot do in its head: `data.train: sums:rows`."""

from __future__ import annotations

from random import Random

SIZES = {"train": 5000, "eval": 200}


def rows(split: str) -> list[dict[str, str]]:
    """`38*7-112>`, whose solution calls the calculator and copies what it says: `<<38*7-112>>154=154`. Prompts of the
    two splits differ in their seed alone; of 1.9 million there are few in both."""
    random = Random(split)
    made = []
    for _ in range(SIZES[split]):
        a, b, c = (random.randint(2, limit) for limit in (99, 99, 999))
        exercise = f"{a}{random.choice('+*')}{b}{random.choice('+-')}{c}"
        answer = str(eval(exercise))  # digits, + - and * alone: nothing a model wrote
        made.append({"prompt": f"{exercise}>", "answer": answer, "solution": f"<<{exercise}>>{answer}={answer}"})
    return made
