"""Intervals over seeds: Student's quantiles, and how often they hold the mean."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from gspo_megatron.testing.intervals import Interval, t_probability, t_quantile


@pytest.mark.parametrize(
    ("degrees", "t"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (5, 2.570582), (9, 2.262157), (30, 2.042272)],
)
def test_quantiles_are_those_of_the_tables(degrees: int, t: float) -> None:
    assert t_quantile(0.975, degrees) == pytest.approx(t, abs=1e-6)


@pytest.mark.parametrize("degrees", [1, 2, 3, 6, 7])
def test_the_probability_is_the_integral_of_the_density(degrees: int) -> None:
    xs = np.linspace(0, 1.7, 20001)
    factor = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    density = factor * (1 + xs**2 / degrees) ** (-(degrees + 1) / 2)
    assert t_probability(1.7, degrees) == pytest.approx(0.5 + np.trapezoid(density, xs), abs=1e-8)


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    """95 of 100 intervals of five normal numbers hold their mean: 4,000 draws, within four standard errors."""
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    intervals = [Interval.of(row.tolist()) for row in draws]
    held = statistics.fmean(i.low <= 3.0 <= i.high for i in intervals if i.low is not None and i.high is not None)
    assert held == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))
