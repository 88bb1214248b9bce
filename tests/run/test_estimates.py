"""pass@k and maj@k against all subsets, written out; intervals against their defining equations."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from gspo_megatron.run.estimates import MOST_RESPONSES, Z, estimate, majority_at_k, pass_at_k, wilson


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response() -> None:
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            correct = [True] * c + [False] * (n - c)
            share = statistics.fmean(any(subset) for subset in itertools.combinations(correct, k))
            assert pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12), (n, c, k)


def test_pass_at_k_of_many_is_exact() -> None:
    """A product of ratios loses digits here."""
    assert pass_at_k(10_000, 1, 1) == pytest.approx(1e-4, rel=1e-12)
    assert pass_at_k(2000, 1, 1000) == 0.5


def majority_of_subsets(answers: Sequence[str | None], correct: Sequence[float], k: int) -> float:
    """Every subset votes; among the most frequent answers each is as good as another."""

    def verdicts() -> Iterator[float]:
        for subset in itertools.combinations(range(len(answers)), k):
            votes = Counter(answers[i] for i in subset if answers[i] is not None)
            top = [a for a, count in votes.items() if count == max(votes.values())]
            of_answer = [statistics.fmean(c for b, c in zip(answers, correct, strict=True) if b == a) for a in top]
            yield statistics.fmean(of_answer) if of_answer else 0.0

    return statistics.fmean(verdicts())


def test_maj_at_k_is_the_mean_over_subsets() -> None:
    draws = random.Random(0)
    for _ in range(150):
        n = draws.randint(1, 9)
        answers = draws.choices([None, "1", "2", "3", "4"], weights=draws.choices([1, 2, 4], k=5), k=n)
        # Mostly, equal answers are equally right; a reward may also judge the format.
        right = {a: draws.random() < 0.5 for a in answers}
        correct = [float(right[a] if draws.random() < 0.9 else not right[a]) for a in answers]
        for k in range(1, n + 1):
            assert majority_at_k(answers, correct, k) == pytest.approx(
                majority_of_subsets(answers, correct, k), abs=1e-12
            )


def test_maj_at_k_of_many() -> None:
    """All of them: the most frequent answer wins. One: the mean."""
    answers = ["7"] * 40 + ["8"] * 39 + [str(i) for i in range(100, 277)]
    correct = [float(a == "7") for a in answers]
    assert majority_at_k(answers, correct, 256) == pytest.approx(1.0, abs=1e-9)
    assert majority_at_k(answers, correct, 1) == pytest.approx(40 / 256, abs=1e-12)
    assert 0.4 < majority_at_k(answers, correct, 64) < 0.6
    assert majority_at_k([*"ab"] * (MOST_RESPONSES // 2), [1.0, 0.0] * (MOST_RESPONSES // 2), 500) == pytest.approx(0.5)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (0, 40), (40, 40), (7, 50), (263, 500)])
def test_wilson_ends_are_where_the_share_is_z_deviations_away(right: int, count: int) -> None:
    """p is an end of the interval when |share - p| = z sqrt(p (1 - p) / n): Wilson's definition."""
    values = [1.0] * right + [0.0] * (count - right)
    found = estimate(values)
    assert found.interval == "wilson" and found.low <= found.value <= found.high
    assert wilson(right / count, count) == (found.low, found.high)
    for end in (found.low, found.high):
        distance = abs(right / count - end)
        if 0 < end < 1:
            assert distance == pytest.approx(Z * math.sqrt(end * (1 - end) / count), rel=1e-9)
        else:
            assert distance == pytest.approx(0, abs=1e-12)


def test_the_bootstrap_interval_is_the_normal_one_where_that_holds() -> None:
    draws = random.Random(1)
    values = [draws.betavariate(2, 3) for _ in range(400)]
    found = estimate(values)
    half = Z * statistics.stdev(values) / math.sqrt(len(values))
    assert found.interval == "bootstrap" and found.value == pytest.approx(statistics.fmean(values))
    assert (found.value - found.low, found.high - found.value) == (
        pytest.approx(half, rel=0.1),
        pytest.approx(half, rel=0.1),
    )
    assert estimate(values) == found
