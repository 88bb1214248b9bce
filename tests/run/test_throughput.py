"""Speed of a step against a count by hand."""

from __future__ import annotations

import pytest

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup, Sequence
from gspo_megatron.layout.hardware import GPUS
from gspo_megatron.run.step_state import StepState
from gspo_megatron.run.throughput import Throughput


def step_of(*groups: tuple[tuple[int, float], ...]) -> StepState:
    """Groups of (length of a response, reward), each after a prompt of 2 tokens. The first sequence is live."""
    prompt = Prompt(0, "", (1, 1), "")
    made = [
        RolloutGroup(prompt, [Rollout(0, prompt, [1] * n, [0.0] * n, False, 0, reward=r) for n, r in group])
        for group in groups
    ]
    sequences = [Sequence.after_prompt([1] * (2 + n), 2) for group in groups for n, _ in group]
    return StepState(1, made, sequences, mini_batches=[[0], []])


def test_mfu() -> None:
    step = step_of(((4, 1.0), (8, 0.0)))
    found = Throughput(lambda n: 10.0 * n * n, scorings=2, num_processes=3, peak_flops=1000.0)(step, seconds=5.0)
    work = 10 * (36 + 100) + (3 + 2) * 10 * 36
    assert found["mfu"] == pytest.approx(work / (5 * 3 * 1000))
    assert (found["tokens_per_second"], found["tokens_per_second_per_gpu"]) == (16 / 5, pytest.approx(16 / 15))
    assert Throughput(float, 0, 1, None)(step, 1.0)["mfu"] is None


def test_groups_and_lengths() -> None:
    step = step_of(((1, 1.0), (2, 1.0)), ((3, 0.0), (4, 0.0)), ((10, 1.0), (6, 0.0)), ((7, 0.0), (8, 1.0)))
    found = step.metrics(lambda rollout: rollout.reward)
    assert (found["groups/all_right_fraction"], found["groups/all_wrong_fraction"]) == (0.25, 0.25)
    lengths = [found[f"response_length/{name}"] for name in ("p50", "p90", "max")]
    assert lengths == [5.0, pytest.approx(8.6), 10]


def test_the_peak_is_that_of_the_number_format() -> None:
    """A float32 run does not use tensor cores: against the bf16 peak it would never get above 0.07."""
    h100, gb300 = GPUS["h100"], GPUS["gb300"]
    known = [h100.peak_of("bf16", fp8=False), h100.peak_of("bf16", fp8=True), h100.peak_of("fp32", fp8=False)]
    assert known == pytest.approx([989.4e12, 1978.9e12, 66.9e12])
    assert gb300.peak_of("fp32", fp8=False) is None and h100.peak_of("fp64", fp8=False) is None
