"""The spread of a response's ratio: its numbers by hand, its page, and one small run of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ratio_spread

ROOT = Path(__file__).parents[2]


def test_spreads_by_hand() -> None:
    """Two tokens of three responses, whose log-ratios are d; the second token of the first one is outside 0.2."""
    before = [[-1.0, -2.0], [-1.0, -2.0], [-1.0, -2.0]]
    d = [[0.1, 0.5], [-0.1, 0.0], [0.0, -0.2]]
    after = [[b + x for b, x in zip(*rows, strict=True)] for rows in zip(before, d, strict=True)]
    found = ratio_spread.spreads(before, after, np.array([1.0, 1.0, -1.0]), [1, 2])
    one, two = found["by_length"]
    assert one["spread"] == pytest.approx({"sum": 0.1, "product": 0.1, "mean": 0.1})
    sums, products = [0.6, -0.1, -0.2], [0.1 + math.log(1.2), -0.1, -0.2]
    expected = {"sum": np.std(sums, ddof=1), "product": np.std(products, ddof=1), "mean": np.std(sums, ddof=1) / 2}
    assert two["spread"] == pytest.approx(expected)
    assert two["largest"] == pytest.approx({"sum": 0.6, "product": products[0], "mean": 0.3})
    # exp(0.6) with A > 0 is above 1.2, exp(-0.2) with A < 0 is not below 0.8; the mean -0.05 with A > 0 is kept.
    assert two["clipped"] == pytest.approx({"gspo_sum": 1 / 3, "gspo": 2 / 3, "tokens": 1 / 6})
    assert found["slopes"]["sum"] == pytest.approx(math.log(two["spread"]["sum"] / 0.1) / math.log(2))


def test_a_slope_is_that_of_the_power() -> None:
    assert ratio_spread.slope([16, 64, 256], [3 * n**0.7 for n in (16, 64, 256)]) == pytest.approx(0.7)


def test_the_page_has_the_committed_numbers() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "ratio_spread.json").read_text())
    assert ratio_spread.markdown(result) in (ROOT / "docs" / "study.md").read_text()


def test_a_small_run(tmp_path: Path) -> None:
    """A larger step moves ratios further, and the mean spreads by one power of the length less than the sum."""
    output = tmp_path / "found.json"
    arguments = [
        "--responses",
        "6",
        "--vocab-size",
        "32",
        "--updates",
        "3",
        "--lengths",
        "16",
        "4",
        "--seeds",
        "3",
        "4",
    ]
    assert ratio_spread.main([*arguments, "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert [seed["seed"] for seed in result["seeds"]] == [3, 4]
    updates, of_other = (seed["updates"] for seed in result["seeds"])
    # Another language, other weights and other responses.
    assert updates[0]["token_rms"] != of_other[0]["token_rms"]
    assert "2 seeds" in ratio_spread.markdown(result)
    assert [update["lr"] for update in updates] == [1e-5, 1e-4, 1e-3]
    moved = [update["token_rms"] for update in updates]
    assert 0 < 3 * moved[0] < moved[1] < moved[2] / 3
    for update in updates:
        assert [each["tokens"] for each in update["by_length"]] == [4, 16]
        assert update["slopes"]["mean"] == pytest.approx(update["slopes"]["sum"] - 1)
