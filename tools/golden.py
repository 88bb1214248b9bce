"""Writes the golden run: ten steps of a tiny model in float64. A change to it is explained in CHANGELOG.md.

python tools/golden.py        writes tests/golden/tiny_moe_fp64.txt
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from run_layouts import train

from gspo_megatron.testing.commands import metrics

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "tiny_moe_fp64.txt"


def ten_steps(folder: Path, *more: str) -> list[tuple[int, float, float, float]]:
    """(step, loss, grad_norm, mean reward), in float64 on one process, with `more` settings."""
    settings = ("model.num_layers=2", "train.steps=10", "train.eval_every=0", *more)
    run = train(folder, 1, "precision.dtype=fp64", *settings)
    return [(row["step"], row["loss"], row["grad_norm"], row["reward/mean"]) for row in metrics(run)[1:]]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        lines = [f"{step} {loss:.12g} {norm:.7g} {reward!r}" for step, loss, norm, reward in ten_steps(Path(scratch))]
    GOLDEN.write_text("\n".join(["step loss grad_norm reward", *lines]) + "\n")
