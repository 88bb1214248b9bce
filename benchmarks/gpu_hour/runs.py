"""The part `runs`: runs of the demo's model as a user starts them, python -m benchmarks.gpu_hour.runs --output FILE.

- The same run in float32 on the CPU and on the GPU: random numbers are the same there, so the first step samples the
  same tokens, but for those whose probabilities differ in their last bits.
- In bf16 with precision.deterministic, a run, and another that begins at the first one's checkpoint after half of its
  steps: the steps that both make should be equal to the last bit.

With --rehearse all of them run on the CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_hour.parts import ROOT
from gspo_megatron.monitor.catalogue import OF_THE_MACHINE

STEPS = 4
DEMO = (
    "parallel.ep=1",
    "optimizer.lr_decay=constant",
    f"train.steps={STEPS}",
    "train.warm_start_steps=20",
    "train.eval_every=0",
    f"checkpoint.save_every={STEPS // 2}",
    f"logging.rollouts_per_step={32 * 8}",
    "logging.tensorboard=false",
)
SMALL = ("rollout.prompts_per_step=4", "rollout.group_size=2", "data.eval_size=16", "train.warm_start_steps=2")


Row = dict[str, Any]


def run(folder: Path, *settings: str) -> list[Row]:
    """The rows of a run's metrics.jsonl, without what the machine decides."""
    command = [sys.executable, "-W", "ignore", "-m", "gspo_megatron.train", "--config", "examples/cpu_tiny_moe.yaml"]
    done = subprocess.run([*command, *DEMO, f"run.dir={folder}", *settings], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}{done.stderr[-4000:]}\n{' '.join(settings)}: exit status {done.returncode}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(OF_THE_MACHINE)} for row in rows]


def responses(folder: Path) -> list[Any]:
    lines = (folder / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    return [json.loads(line)["tokens"] for line in lines]


def after_resume(whole: Sequence[Row], continued: Sequence[Row]) -> list[tuple[Row, Row]]:
    """The two rows of each step that both runs make.

    Raises:
        ValueError: one of them lacks such a step, and a comparison without it would say too little.
    """
    by_step = [{row["step"]: row for row in rows} for rows in (whole, continued)]
    wanted = list(range(STEPS // 2 + 1, STEPS + 1))
    for name, rows in zip(("whole", "continued"), by_step, strict=True):
        if missing := [step for step in wanted if step not in rows]:
            raise ValueError(f"the {name} run has no rows of the steps {missing}, which were to be compared")
    return [(by_step[0][step], by_step[1][step]) for step in wanted]


def measured(folder: Path, rehearse: bool) -> dict[str, Any]:
    small, gpu = (SMALL, "cpu") if rehearse else ((), "cuda")
    on_cpu = run(folder / "cpu", "precision.device=cpu", "precision.dtype=fp32", *small)
    on_gpu = run(folder / "gpu", f"precision.device={gpu}", "precision.dtype=fp32", *small)
    pairs = list(zip(responses(folder / "cpu"), responses(folder / "gpu"), strict=True))
    exact = (f"precision.device={gpu}", "precision.dtype=bf16", "precision.deterministic=true", *small)
    whole = run(folder / "whole", *exact)
    half = folder / "whole" / "checkpoints" / f"step_{STEPS // 2:06d}"
    continued = run(folder / "continued", *exact, f"checkpoint.load={half}")
    both = after_resume(whole, continued)
    keys = {key for a, b in both for key in {*a, *b} if a.get(key) != b.get(key)}
    warm = [rows[0]["warm_start/loss"] for rows in (on_cpu, on_gpu)]
    return {
        "responses": len(pairs),
        "responses_that_differ": sum(a != b for a, b in pairs),
        "warm_start_loss_difference": abs(warm[1] / warm[0] - 1),
        "reward_mean": [[row["reward/mean"] for row in rows if row["step"]] for rows in (on_cpu, on_gpu)],
        "steps_compared": len(both),
        "steps_that_differ": sum(a != b for a, b in both),
        "which": sorted(keys)[:20],
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--output", type=Path, required=True)
    options.add_argument("--rehearse", action="store_true", help="on the CPU, smaller")
    given = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        values = measured(Path(folder), given.rehearse)
    given.output.write_text(json.dumps({"values": values}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
