"""Complete runs on ten layouts against one process: the differences in rollouts and metrics, step by step.

python tools/run_layouts.py --output benchmarks/results/layouts.json      (part of `make grid`)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gspo_megatron.testing.commands import forked, metrics, rollouts, torchrun

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
    # The experts' tokens are split over the tensor-parallel ranks, the experts are not. Without
    # compat.mark_expert_parameters, Megatron-Core 0.16.1 trains this layout incorrectly.
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
    """Runs the command, under torchrun or on forked ranks; returns the run directory."""
    config = folder / "config_of_test.yaml"
    config.write_text(CONFIG)
    arguments = ["--config", str(config), f"run.dir={folder}", *settings]
    for status, output in [torchrun(num_processes, arguments)] if real else forked(num_processes, arguments):
        assert status == 0, output
    return folder


def largest_differences(run: Path, reference: Path) -> list[dict[str, float]]:
    """For each step: rollouts whose tokens differ; largest absolute difference of a log-prob in the others, of the
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the differences")
    options = parser.parse_args(argv)
    measured: dict[str, Any] = {"versions": {name: version(name) for name in ("megatron-core", "torch")}}
    # float32 with and without the warm start: the longer that is, the more Adam amplifies rounding.
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
    options.output.write_text(json.dumps(measured, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
