"""The benchmark of numerical noise: its numbers by hand, its page, and one small run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import numerics

ROOT = Path(__file__).parents[2]


def test_noise_by_hand() -> None:
    one, other = [[0.0, -1.0, -2.0, -1.0], [-1.0, -1.0, -1.0, -1.0]], [[-0.001, -1.0, -2.0, -1.0], [-1.0] * 4]
    found = numerics.noise(one, other, [2, 4])
    assert found["token"] == pytest.approx({"max": 1e-3, "mean": 1e-3 / 8, "rms": 1e-3 / 8**0.5})
    assert found["2"] == pytest.approx({"max": 5e-4, "rms": 5e-4 / 2**0.5, "outside": 0.5})
    assert found["4"] == pytest.approx({"max": 2.5e-4, "rms": 2.5e-4 / 2**0.5, "outside": 0.0})


def test_the_page_has_the_committed_numbers() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "numerics.json").read_text())
    assert numerics.markdown(result) in (ROOT / "docs" / "numerics.md").read_text()


def test_a_small_run(tmp_path: Path) -> None:
    size = numerics.Size(responses=3, tokens=24, vocab_size=64, updates=3)
    rows = numerics.measure(size, ["tiny_moe"], [], str(tmp_path))["rows"]
    noise = {(row["dtype"], row["how"]): row["token"]["rms"] for row in rows}
    assert noise["fp32", numerics.AGAIN] == noise["bf16", numerics.AGAIN] == 0
    assert noise["fp32", numerics.SAMPLER] < 1e-5 < noise["bf16", numerics.SAMPLER] < 0.1
