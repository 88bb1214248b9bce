"""The tables of docs/stability.md: of the committed numbers, ratios with their spread over the turns."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import routing_replay, sampler_routing, sampling_mask
from benchmarks.numerics import Size
from benchmarks.reports import spread_ratio

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def test_the_spread_of_ratios_by_hand() -> None:
    """Of the ratios 0.5, 1, 2, 3, 10 the quartiles are 1 and 3."""
    assert spread_ratio([1.0, 20.0, 2.0, 2.0, 3.0], [2.0, 2.0, 2.0, 1.0, 1.0]) == "2.000 (1.000 to 3.000)"


@pytest.mark.parametrize("benchmark", [routing_replay, sampling_mask, sampler_routing])
def test_the_page_has_the_committed_numbers(benchmark: ModuleType) -> None:
    name = benchmark.__name__.rpartition(".")[2]
    found = json.loads((RESULTS / f"{name}.json").read_text())
    page = (ROOT / "docs" / "stability.md").read_text()
    assert f"<!-- {name} -->\n{benchmark.report(found)}<!-- end of {name} -->" in page


@pytest.mark.parametrize("benchmark", [routing_replay, sampling_mask])
def test_a_page_is_written_from_kept_numbers(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = benchmark.__name__.rpartition(".")[2]
    kept, page = RESULTS / f"{name}.json", tmp_path / "page.md"
    page.write_text(f"<!-- {name} -->\nold\n<!-- end of {name} -->\n")
    monkeypatch.setattr("sys.argv", [name, "--from", str(kept), "--markdown", str(page)])
    benchmark.main()
    assert benchmark.report(json.loads(kept.read_text())) in page.read_text()


def test_every_row_of_a_model_has_its_updates_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(size: Size, folder: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        return [{"format": "bf16"}, {"format": "fp32"}], {"loss": 1.0 / size.updates, "machine": "one"}

    monkeypatch.setattr(sampler_routing, "_measure", measured)
    found = sampler_routing.measure([Size(8, 32, 512, 20), Size(8, 32, 512, 300)], "nowhere")
    assert found["machine"] == "one" and "loss" not in found
    assert [(row["updates"], row["loss"], row["format"]) for row in found["rows"]] == [
        (20, 0.05, "bf16"),
        (20, 0.05, "fp32"),
        (300, 1 / 300, "bf16"),
        (300, 1 / 300, "fp32"),
    ]
