"""The promise of the package: the same rollouts, rewards and metrics on every parallel layout, through the real
command.

In float64 a layout may change the rounding of sums, and what Adam makes of it over tens of updates: 1e-12 has been seen
in log-probs. More than 1e-9 is a mistake.

    PYTHONPATH=tools python tests/test_layouts.py docs/runs/layouts.json      writes what differs on each layout
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from commands import forked, metrics, rollouts, torchrun

# 2 + 11 tokens: no tensor-parallel size divides the vocabulary. Micro-batches of a few sequences, rollouts in several
# batches, some right and some wrong, some clipped; KL, entropy bonus and two updates a step.
CONFIG = """
run: {seed: 3}
model: {num_layers: 4, hidden_size: 32, num_attention_heads: 4, num_query_groups: 2, head_dim: 8, num_experts: 4,
        expert_ffn_size: 32, max_sequence_length: 16, init_std: 0.2}
precision: {device: cpu}
data: {train: "task:sort_digits", eval: "task:sort_digits", task: {min_length: 1, max_length: 4}, eval_size: 12,
       tokenizer: "characters:0123456789>"}
rollout: {prompts_per_step: 8, group_size: 4, max_new_tokens: 4, temperature: 0.9, max_batch: 12}
algorithm: {clip_low: 1.0e-2, clip_high: 1.2e-2, kl_coef: 0.05, entropy_coef: 0.02, updates_per_rollout: 2}
optimizer: {lr: 3.0e-3, clip_grad: 1000.0}
train: {steps: 5, warm_start_steps: 40, warm_start_batch: 32, warm_start_lr: 1.0e-2, eval_every: 2,
        tokens_per_micro_batch: 48}
logging: {tensorboard: false, rollouts_per_step: -1}
"""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "ep2": (2, {"ep": 2}),
    # The experts' tokens are split over the tensor-parallel ranks, the experts are not: the layout that Megatron-Core
    # 0.16.1 trains wrongly by itself (compat.mark_expert_parameters).
    "tp2": (2, {"tp": 2, "recompute": "selective"}),
    "tp2_etp2": (2, {"tp": 2, "etp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}),
    "cp2": (2, {"cp": 2, "recompute": "full"}),
    "tp2_pp2_ep2": (4, {"tp": 2, "pp": 2, "ep": 2}),
    "cp2_dp2_ep2_etp2": (4, {"cp": 2, "ep": 2, "etp": 2, "token_dispatcher": "allgather"}),
    "tp2_pp2_vpp2_cp2_ep4": (8, {"tp": 2, "pp": 2, "vpp": 2, "cp": 2, "ep": 4}),
}


def overrides(axes: dict[str, Any]) -> list[str]:
    return [f"parallel.{axis}={size}" for axis, size in axes.items()]


def train(folder: Path, num_processes: int, *settings: str, real: bool = False) -> Path:
    """Runs the command, from torchrun or on forked ranks; returns the run directory."""
    config = folder / "config_of_test.yaml"
    config.write_text(CONFIG)
    arguments = ["--config", str(config), f"run.dir={folder}", *settings]
    for status, output in [torchrun(num_processes, arguments)] if real else forked(num_processes, arguments):
        assert status == 0, output
    return folder


def without_log_probs(rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in rollout.items() if k != "log_probs"} for rollout in rollouts]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("one"), 1, "precision.dtype=fp64", real=True)


def test_the_run_has_something_to_compare(one_process: Path) -> None:
    steps = metrics(one_process)[1:]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5]
    assert [len(step) for step in rollouts(one_process)] == [32] * 5
    for row in steps:
        assert 0 < row["reward/mean"] < 1 and 0 < row["groups/zero_variance_fraction"] < 1
        assert row["ratio/min"] < 1 < row["ratio/max"] and row["kl/ref"] > 0 and row["entropy"] > 0
    assert any(row["clip_fraction"] > 0 for row in steps) and any(row["truncated_fraction"] > 0 for row in steps)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_nothing(layout: str, one_process: Path, tmp_path: Path) -> None:
    num_processes, axes = LAYOUTS[layout]
    run = train(tmp_path, num_processes, "precision.dtype=fp64", *overrides(axes), real=layout == "ep2")
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


@pytest.mark.parametrize(("layout", "updates"), [("ep2", 10), ("cp2", 10), ("tp2_etp2", 0), ("tp2_pp2_ep2", 0)])
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


def largest_differences(run: Path, reference: Path) -> list[dict[str, float]]:
    """Of each step: rollouts whose tokens differ; largest absolute difference of a log-prob in the others, of the
    gradient norm, and of any other metric."""
    found = []
    steps = zip(metrics(run)[1:], metrics(reference)[1:], rollouts(run), rollouts(reference), strict=True)
    for a, b, ours, theirs in steps:
        pairs = list(zip(ours, theirs, strict=True))
        alike = [(x, y) for x, y in pairs if x["tokens"] == y["tokens"]]
        tokens = [abs(u - v) for x, y in alike for u, v in zip(x["log_probs"], y["log_probs"], strict=True)]
        others = [abs(a[k] - b[k]) for k in a if k != "grad_norm" and a[k] is not None]
        found.append(
            {
                "step": a["step"],
                "rollouts_that_differ": len(pairs) - len(alike),
                "log_probs": max(tokens),
                "metrics": max(others),
                "grad_norm": abs(a["grad_norm"] - b["grad_norm"]),
            }
        )
    return found


if __name__ == "__main__":
    measured: dict[str, Any] = {"versions": {name: version(name) for name in ("megatron-core", "torch")}}
    # float32 twice: what Adam makes of its rounding in the warm start is a matter of how long that is.
    for name, settings in {
        "fp64": ["precision.dtype=fp64"],
        "fp32": ["precision.dtype=fp32"],
        "fp32, no warm start": ["precision.dtype=fp32", "train.warm_start_steps=0"],
    }.items():
        measured[name] = {}
        with tempfile.TemporaryDirectory() as scratch:
            for layout, (num_processes, axes) in {"one": (1, {}), **LAYOUTS}.items():
                (folder := Path(scratch, layout)).mkdir()
                train(folder, num_processes, *settings, *overrides(axes))
                measured[name][layout] = largest_differences(folder, Path(scratch, "one"))
    Path(sys.argv[1]).write_text(json.dumps(measured, indent=1) + "\n")
