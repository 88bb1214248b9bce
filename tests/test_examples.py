"""The recipes of examples/ for clusters: each fits its GPUs on paper, and its layout, shrunk, changes no gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
from check_layout import main as check_layout

from gspo_megatron.config.loading import load_config
from gspo_megatron.layout.hardware import GPUS
from gspo_megatron.train import main

ROOT = Path(__file__).parents[1]
RECIPES = {"qwen3_30b_a3b": 32, "qwen3_235b_a22b": 128, "deepseek_v3": 512}
"""GPUs of each recipe."""


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their prompts are named from there."""
    monkeypatch.chdir(ROOT)


def test_every_recipe_is_listed() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*_gspo.yaml")} == {f"{name}_gspo" for name in RECIPES}


@pytest.mark.parametrize("fp8", ["none", "blockwise"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_gpus(name: str, fp8: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, gpus = f"examples/{name}_gspo.yaml", RECIPES[name]
    arguments = ["--config", path, "--dry-run", "--world-size", str(gpus), f"precision.fp8={fp8}"]
    assert main([*arguments, "--gpu-memory", str(GPUS["h100"].memory_gib)]) == 0
    printed = capsys.readouterr().out
    assert "memory: fits: " in printed and f"layout: {gpus} processes" in printed
    assert main([*arguments, "--gpu-memory", "40"]) == 2
    # The commands at its head are these.
    head = (ROOT / path).read_text().split("run:")[0]
    assert f"--config {path} --dry-run --world-size {gpus} --gpu-memory 79.6" in head
    assert f"tools/check_layout.py --config {path} --max-processes 8" in head


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_gspo_as_published(name: str) -> None:
    config = load_config(f"examples/{name}_gspo.yaml", [])
    assert config.model.preset == name
    assert (config.algorithm.variant, config.algorithm.clip_low, config.algorithm.clip_high) == ("gspo", 3e-4, 4e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_the_layout_of_a_recipe_changes_no_gradient(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_layout(["--config", f"examples/{name}_gspo.yaml", "--max-processes", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("\nEQUAL\n")
    assert ("stages of unequal depth" in printed) == (name != "qwen3_30b_a3b")
