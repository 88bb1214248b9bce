"""Ten steps of a tiny run, against numbers written down. A change to them is explained in CHANGELOG.md.

PYTHONPATH=tools python tests/test_golden.py      writes them anew
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from test_layouts import metrics, train

GOLDEN = Path(__file__).parent / "golden" / "tiny_moe_fp64.txt"


def ten_steps(folder: Path) -> list[tuple[int, float, float, float]]:
    """(step, loss, grad_norm, mean reward), in float64 on one process."""
    settings = ("model.num_layers=2", "train.steps=10", "train.eval_every=0")
    run = train(folder, 1, "precision.dtype=fp64", *settings)
    return [(row["step"], row["loss"], row["grad_norm"], row["reward/mean"]) for row in metrics(run)[1:]]


def test_the_run_is_the_one_written_down(tmp_path: Path) -> None:
    """Loss and reward to rounding; the gradient norm as far as Megatron, which adds it up in float32, has it."""
    written = [tuple(map(float, line.split())) for line in GOLDEN.read_text().splitlines()[1:]]
    steps = ten_steps(tmp_path)
    assert len(steps) == len(written) == 10
    for (step, loss, grad_norm, reward), (_, *expected) in zip(steps, written, strict=True):
        assert loss == pytest.approx(expected[0], rel=1e-6, abs=1e-9), f"loss of step {step}"
        assert grad_norm == pytest.approx(expected[1], rel=1e-5), f"gradient norm of step {step}"
        assert reward == expected[2], f"reward of step {step}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        lines = [f"{step} {loss:.12g} {norm:.7g} {reward!r}" for step, loss, norm, reward in ten_steps(Path(scratch))]
    GOLDEN.write_text("\n".join(["step loss grad_norm reward", *lines]) + "\n")
