"""Cost that grows with the input: 16 times as much takes at most 20 times as long.

Every rank of a run does these things, on one core. Time is the process's own, and the least of several tries, so that a
busy machine does not matter.
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable
from random import Random

import pytest
import torch

from gspo_megatron.base.batches import Prompt, Rollout, RolloutGroup, Sequence
from gspo_megatron.base.errors import ConfigError
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import plan_micro_batches
from gspo_megatron.data.permutation import PromptOrder
from gspo_megatron.layout import planner
from gspo_megatron.layout.layout import PackingRules, divisors_of
from gspo_megatron.run.stages import Packer
from gspo_megatron.run.step_state import StepState
from gspo_megatron.testing.fakes import OneRank

TIMES, MOST, TRIES = 16, 20, 8
MORE = {"packing_all_lengths": 60, "order_of_an_epoch": 28}
"""Both take n log n: a heap, and the rounds of a shuffle. A search that finds the count of micro-batches at once or in
the second try is as good."""
CASES: dict[str, tuple[int, Callable[[int], Callable[[], object]]]] = {}
"""By name: a size, and what makes the work of a size."""


def case(size: int) -> Callable[[Callable[[int], Callable[[], object]]], None]:
    def added(work_of: Callable[[int], Callable[[], object]]) -> None:
        CASES[work_of.__name__] = (size, work_of)

    return added


@case(1024)
def packing_just_above_half_a_micro_batch(size: int) -> Callable[[], object]:
    lengths = [513 + i % 7 for i in range(size)]
    return lambda: plan_micro_batches(lengths, 2, 1024)


@case(1024)
def packing_all_lengths(size: int) -> Callable[[], object]:
    draw = Random(1)
    lengths = [draw.randint(1, 1024) for _ in range(size)]
    return lambda: plan_micro_batches(lengths, 4, 1024)


@case(2048)
def order_of_an_epoch(size: int) -> Callable[[], object]:
    def work() -> None:
        order = PromptOrder(size, 1)
        for k in range(0, size, 64):
            order.slice(k, 64)

    return work


@case(10**9)
def divisors(size: int) -> Callable[[], object]:
    return lambda: divisors_of(size)


@case(1_000_003 * 3)
def refusal_of_a_layout_by_processes(size: int) -> Callable[[], object]:
    config = load_config(None, ["precision.device=cpu", "parallel.tp=2", "parallel.pp=3"])

    def work() -> None:
        with pytest.raises(ConfigError):
            check_config(config, size)

    return work


@case(97 * 8)
def refusal_of_a_layout_by_layers(size: int) -> Callable[[], object]:
    stages = ["parallel.pp=5", "parallel.first_stage_layers=1", "parallel.last_stage_layers=2"]
    config = load_config(None, ["precision.device=cpu", f"model.num_layers={size}", *stages])

    def work() -> None:
        with pytest.raises(ConfigError):
            check_config(config, 8)

    return work


@case(64)
def layouts_of_a_cluster(size: int) -> Callable[[], object]:
    config = load_config(None, ["model.preset=qwen3_30b_a3b"])
    return lambda: sum(1 for _ in planner.layouts(config, size, 8))


def step_of(size: int) -> StepState:
    """`size` groups of two responses of 30 tokens, packed, with old log-probs."""
    groups, sequences = [], []
    for i in range(size):
        prompt = Prompt(i, "what is it", (1, 2, 3), "42")
        rollouts = [Rollout(2 * i + j, prompt, [5] * 30, [-0.5] * 30, False, 1, "x" * 30, j) for j in range(2)]
        groups.append(RolloutGroup(prompt, rollouts))
        sequences += [Sequence.after_prompt([1, 2, 3, *r.tokens], 3, 1.0) for r in rollouts]
    step = StepState(1, groups, sequences)
    packer = Packer(OneRank(), 0, 256, PackingRules(), float, group_size=2, updates_per_rollout=2, seed=1)
    packer.pack(step, drop_zero_advantage=False)
    for batch in step.batches:
        for m in batch.micro_batches:
            m.columns["old_log_probs"] = torch.zeros(len(m.rows_R))
    step.updates = [{}]
    return step


@case(32)
def save_of_a_step(size: int) -> Callable[[], object]:
    step = step_of(size)
    return lambda: json.dumps(step.snapshot(OneRank()).about)


@case(32)
def resume_of_a_step(size: int) -> Callable[[], object]:
    about, tensors = vars(step_of(size).snapshot(OneRank())).values()
    text = json.dumps(about)
    return lambda: StepState.restore(json.loads(text), [tensors], OneRank(), torch.float32)


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, for one call; what is too short to be timed is called again and again."""
    calls, taken = 0, 0.0
    start = time.process_time()
    while taken < 2e-3:
        work()
        calls, taken = calls + 1, time.process_time() - start
    return taken / calls


@pytest.mark.parametrize("name", CASES)
def test_sixteen_times_the_input_takes_at_most_twenty_times_as_long(name: str) -> None:
    size, work_of = CASES[name]
    small, large = work_of(size), work_of(TIMES * size)
    small(), large()  # what is cached or imported at the first call
    of_small = of_large = math.inf
    gc.collect()
    gc.disable()  # it would look through everything that other tests have left, in one of the two
    try:
        for _ in range(TRIES):
            of_small, of_large = min(of_small, seconds(small)), min(of_large, seconds(large))
            if of_large <= MORE.get(name, MOST) * of_small:
                return
    finally:
        gc.enable()
    raise AssertionError(f"{name}: {of_large:.4f} s, {of_large / of_small:.1f} times {of_small:.4f} s")
