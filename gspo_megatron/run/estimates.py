"""Estimates from n responses to each of some prompts: pass@k, maj@k, and how sure a mean over prompts is.

n  responses to a prompt      c  of them that are correct      k  of them that a user would draw
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

MOST_RESPONSES = 1000
"""To a prompt: of more, the number of subsets is beyond float64."""
CONFIDENCE = 0.95
Z = 1.959963984540054
"""The quantile of the normal distribution that leaves (1 - CONFIDENCE) / 2 above it."""
RESAMPLES = 2000
MOST_DRAWN = 1_000_000
"""Numbers at a time."""
SEED = 0
"""Of the bootstrap: the same values have the same interval."""


class Estimate(NamedTuple):
    """A mean over prompts with the ends of its CONFIDENCE interval, and how that was found: wilson or bootstrap."""

    value: float
    low: float
    high: float
    interval: str


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the probability that one of k responses is correct, without bias (Chen et al. 2021,
    2107.03374 Eq. 1)."""
    assert 0 <= c <= n and 1 <= k <= n, (n, c, k)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(answers: Seq[str | None], correct: Seq[float], k: int) -> float:
    """The mean over all subsets of k responses of

        correct(a), a the most frequent answer of the subset

    Among equally frequent ones, the mean over them; None, a response without an answer, does not vote, and a subset
    without votes is wrong. correct(a) is the mean over the responses that answer a: a reward may judge more than the
    answer.

    The subsets are counted, not listed. Those in which a has m votes, nobody more, and t others as many:

        C(n_a, m) [x^(k-m) y^t]  (1 + x)^n_None  prod_(b != a) (sum_(i<m) C(n_b, i) x^i + C(n_b, m) x^m y)
    """
    assert len(answers) == len(correct) and 1 <= k <= len(answers) <= MOST_RESPONSES, (len(answers), k)
    votes = Counter(answers)
    silent = votes.pop(None, 0)
    found = 0.0
    for answer, own in votes.items():
        rightness = math.fsum(c for a, c in zip(answers, correct, strict=True) if a == answer) / own
        if not rightness:
            continue
        others = [count for other, count in votes.items() if other != answer]
        for m in range(1, min(own, k) + 1):
            found += rightness * math.comb(own, m) * _won(others, silent, m, k - m)
    return found / math.comb(len(answers), k)


def _won(others: Seq[int], silent: int, m: int, left: int) -> float:
    """The number of ways to draw `left` responses from the others so that none has more than m votes; with t others
    that have m, divided by 1 + t."""
    if silent + sum(min(count, m) for count in others) < left:
        return 0.0
    most_ties = min(sum(count >= m for count in others), left // m)
    ways_TL = np.zeros((most_ties + 1, left + 1))
    ways_TL[0] = [math.comb(silent, i) for i in range(left + 1)]
    for count in others:
        fewer_TL = np.zeros_like(ways_TL)
        for i in range(min(count, m - 1, left) + 1):
            fewer_TL[:, i:] += math.comb(count, i) * ways_TL[:, : left + 1 - i]
        if m <= min(count, left):
            fewer_TL[1:, m:] += math.comb(count, m) * ways_TL[:-1, : left + 1 - m]
        ways_TL = fewer_TL
    return float((ways_TL[:, left] / np.arange(1, most_ties + 2)).sum())


def estimate(values: Seq[float]) -> Estimate:
    """The mean of a value for each prompt. Prompts are the sample: the responses to one are not independent.

    Wilson's interval (1927) where all values are 0 or 1, which holds near 0 and 1, too; else the percentile bootstrap
    over prompts.
    """
    assert values, "an evaluation has at least one prompt"
    values_P = np.asarray(values, dtype=np.float64)
    mean = math.fsum(values) / len(values)
    if np.isin(values_P, (0.0, 1.0)).all():
        return Estimate(mean, *wilson(mean, len(values)), "wilson")
    draws = np.random.default_rng(SEED)
    # Some rows at a time: all of them, for thousands of prompts, would take a gigabyte.
    rows = max(1, min(RESAMPLES, MOST_DRAWN // len(values_P)))
    means = [
        values_P[draws.integers(0, len(values_P), (min(rows, RESAMPLES - done), len(values_P)))].mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return Estimate(mean, low, high, "bootstrap")


def wilson(share: float, count: int) -> tuple[float, float]:
    """(share + z^2 / 2n -+ z sqrt(share (1 - share) / n + z^2 / 4n^2)) / (1 + z^2 / n)"""
    middle = share + Z * Z / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)
