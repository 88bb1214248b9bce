"""The promise of the package: the same rollouts, rewards and metrics on every parallel layout, through the real
command.

In float64 a layout may change the rounding of sums, which Adam amplifies over tens of updates: 1e-12 has been seen in
log-probs. More than 1e-9 is a bug.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_layouts import LAYOUTS, overrides, train

from gspo_megatron.testing.commands import metrics, rollouts

SEVERAL = [name for name in LAYOUTS if name not in ("dp2", "ep2", "tp2", "pp2", "cp2", "pp2_vpp2", "tp2_pp2_ep2")]
"""Every axis is in one of them. Axes alone are compared by the gradient of every parameter (tools/test_layout_grid.py),
and by the first step in float32 below."""
SHORT = ("precision.dtype=fp64", "train.warm_start_batch=16")
"""Half of the tool's warm start, which takes most of a run's time: it only has to find some right answers."""


def without_log_probs(rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in rollout.items() if k != "log_probs"} for rollout in rollouts]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("one"), 1, *SHORT, real=True)


def test_the_run_has_something_to_compare(one_process: Path) -> None:
    steps = metrics(one_process)[1:]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert [len(step) for step in rollouts(one_process)] == [32] * 5
    for row in steps:
        assert 0 < row["reward/mean"] < 1 and 0 < row["groups/zero_variance_fraction"] < 1
        assert row["ratio/min"] < 1 < row["ratio/max"] and row["kl/ref"] > 0 and row["entropy"] > 0
    assert any(row["clip_fraction"] > 0 for row in steps) and any(row["truncated_fraction"] > 0 for row in steps)


@pytest.mark.parametrize("layout", SEVERAL)
def test_a_layout_changes_nothing(layout: str, one_process: Path, tmp_path: Path) -> None:
    num_processes, axes = LAYOUTS[layout]
    run = train(tmp_path, num_processes, *SHORT, *overrides(axes), real=layout == "tp2_etp2")
    for ours, theirs in zip(rollouts(run), rollouts(one_process), strict=True):
        assert without_log_probs(ours) == without_log_probs(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a["log_probs"] == pytest.approx(b["log_probs"], rel=0, abs=1e-9)
    for ours, theirs in zip(metrics(run), metrics(one_process), strict=True):
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            # Megatron sums the squares of the gradient norm in float32.
            tolerance = 1e-6 if name == "grad_norm" else 1e-9
            assert ours[name] == pytest.approx(expected, rel=tolerance, abs=tolerance), f"step {ours['step']}, {name}"


@pytest.mark.parametrize(("layout", "updates"), [("ep2", 10), ("cp2", 10), ("tp2_pp2_ep2", 0)])
def test_float32_starts_alike_with_clipped_gradients(layout: str, updates: int, tmp_path: Path) -> None:
    """float32 and the distributed optimizer: the rollouts and rewards of the first step, also behind `updates` whose
    gradient is clipped, are the same; from there on Adam magnifies the rounding."""
    runs = []
    for name, (num_processes, axes) in {"one": (1, {}), layout: LAYOUTS[layout]}.items():
        (folder := tmp_path / name).mkdir()
        settings = ("optimizer.clip_grad=0.5", f"train.warm_start_steps={updates}", "train.steps=1")
        runs.append(train(folder, num_processes, *settings, *overrides(axes)))
    one, two = runs
    assert without_log_probs(rollouts(two)[0]) == without_log_probs(rollouts(one)[0])
    assert metrics(one)[1]["grad_norm"] > 0.5 or not updates
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
