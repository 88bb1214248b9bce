"""Ten steps of a tiny run, against numbers recorded by tools/golden.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import GOLDEN, ten_steps


def test_the_run_is_the_one_written_down(tmp_path: Path) -> None:
    """Loss and reward to rounding; the gradient norm as far as Megatron, which adds it up in float32, has it."""
    written = [tuple(map(float, line.split())) for line in GOLDEN.read_text().splitlines()[1:]]
    steps = ten_steps(tmp_path)
    assert len(steps) == len(written) == 10
    for (step, loss, grad_norm, reward), (_, *expected) in zip(steps, written, strict=True):
        assert loss == pytest.approx(expected[0], rel=1e-6, abs=1e-9), f"loss of step {step}"
        assert grad_norm == pytest.approx(expected[1], rel=1e-5), f"gradient norm of step {step}"
        assert reward == expected[2], f"reward of step {step}"


def test_deterministic_changes_no_bit_on_the_cpu(tmp_path: Path) -> None:
    """Nor is anything refused there: torch raises at every operation that has no deterministic form."""
    for name in ("plain", "deterministic"):
        (tmp_path / name).mkdir()
    with_it = ten_steps(tmp_path / "deterministic", "precision.deterministic=true")
    assert with_it == ten_steps(tmp_path / "plain")
