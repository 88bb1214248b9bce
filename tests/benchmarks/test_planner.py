"""The planner's committed tables are what its command computes."""

from __future__ import annotations

import json

import pytest

from benchmarks.planner import (
    GPU_COUNTS,
    MODELS,
    PAGE,
    RESULTS,
    published,
    published_table,
    recomputed,
    scaling_row,
    scaling_table,
    with_table,
)

PUBLISHED = json.loads((RESULTS / "planner_published.json").read_text())
SCALING = json.loads((RESULTS / "planner_scaling.json").read_text())


def test_the_comparison_with_published_numbers_is_computed_again() -> None:
    assert published() == PUBLISHED
    for row in PUBLISHED:
        assert row["error"] == pytest.approx(row["predicted"] / row["published"] - 1, abs=1e-3) and row["source"]


def test_every_row_of_the_scaling_table_is_computed_again() -> None:
    assert [recomputed(row) for row in SCALING] == SCALING
    assert {row["model"] for row in SCALING} == set(MODELS)
    assert {row["gpus"] for row in SCALING if row["model"] == MODELS[0]} <= set(GPU_COUNTS)
    assert max(row["gpus"] for row in SCALING) == 4096


@pytest.mark.parametrize(("model", "gpus"), [("qwen3_30b_a3b", 16), ("qwen3_235b_a22b", 128)])
def test_the_search_finds_the_same_plan(model: str, gpus: int) -> None:
    [row] = [row for row in SCALING if (row["model"], row["gpus"], row["fp8"]) == (model, gpus, "none")]
    assert scaling_row(model, gpus, "none") == row


def test_where_nothing_fits_there_is_no_row() -> None:
    smallest = {model: min(row["gpus"] for row in SCALING if row["model"] == model) for model in MODELS}
    for model, gpus in smallest.items():
        if gpus > GPU_COUNTS[0]:
            assert scaling_row(model, gpus // 2, "none") is None


def test_the_page_shows_these_tables() -> None:
    text = PAGE.read_text()
    assert with_table(text, "published", published_table(PUBLISHED)) == text
    assert with_table(text, "scaling", scaling_table(SCALING)) == text
    assert "prediction" in text
