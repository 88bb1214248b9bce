"""The load of the experts: what a count by hand of the routers' choices gives, and the same on every layout."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, Sequence, UpdateBatch
from gspo_megatron.base.metrics import LossTerms, merge, on_host, values
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import pack
from gspo_megatron.device import open_device
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.mcore import compat, schedule
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support.small import SMALL

LENGTHS = ((9, 4), (5, 1), (12, 7), (3, 2), (8, 8))
"""Tokens and first trained token of each sequence; the last has none."""


def sequences() -> list[Sequence]:
    draws = torch.Generator().manual_seed(3)
    return [Sequence.after_prompt(torch.randint(13, (n,), generator=draws).tolist(), prompt) for n, prompt in LENGTHS]


def open_policy(world_size: int, *axes: str) -> MegatronPolicy:
    settings = [*SMALL, "model.max_sequence_length=32", "precision.dtype=fp64", "optimizer.distributed=false", *axes]
    config = load_config(None, settings)
    device = open_device("cpu", "fp64")
    groups = Groups(check_config(config, world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    return MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring)


def batch_of(policy: MegatronPolicy) -> UpdateBatch:
    groups = policy.groups
    ranks = {"dp_rank": groups.dp_rank, "dp_size": groups.dp_size, "cp_rank": groups.cp_rank, "cp_size": groups.cp_size}
    micro_batches = pack(sequences(), pad_id=0, max_tokens=16, rules=packing_rules(policy.config), **ranks)
    return UpdateBatch(micro_batches, len(LENGTHS), 1)


def loss(log_probs_R: Tensor, entropy_R: Tensor | None, m: MicroBatch, batch: UpdateBatch) -> LossTerms:
    return LossTerms(-log_probs_R.sum(), {})


def measured(world_size: int, axes: tuple[str, ...]) -> dict[str, float]:
    policy = open_policy(world_size, *axes)
    batch = batch_of(policy)
    policy.log_probs(batch.micro_batches)  # counts nothing
    found = on_host(policy.update(batch, loss, lr=0.0))
    again = on_host(policy.update(batch, loss, lr=0.0))
    every = policy.groups.gather([found, again])
    return {k: v for k, v in values(merge(every)).items() if k.startswith("router/")}


def counted_by_hand() -> list[list[int]]:
    """[layer][expert]: tokens, from the choices of the routers for one sequence at a time."""
    policy = open_policy(1)
    [model], counts = policy.model, [Counter[int](), Counter[int]()]
    seen: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda router, inputs, output: seen.append(output[1]))
    for sequence, (length, first) in zip(sequences(), LENGTHS, strict=True):
        [m] = pack([sequence], pad_id=0, max_tokens=64, rules=packing_rules(policy.config), dp_rank=0, dp_size=1)
        seen.clear()
        with torch.no_grad():
            model(*schedule.model_input(m, policy.groups))
        for count, chosen in zip(counts, seen, strict=True):
            for position in range(first - 1, length - 1):
                count.update(chosen[position].nonzero().flatten().tolist())
    return [[count[e] for e in range(4)] for count in counts]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    [counts] = run_distributed(counted_by_hand, 1)
    found = {}
    for layer, n in enumerate(counts, start=1):
        assert sum(n) == 2 * sum(length - first for length, first in LENGTHS)
        shares = [x / sum(n) for x in n if x]
        found[f"router/max_load/layer_{layer:02d}"] = max(n) / (sum(n) / 4)
        found[f"router/dead_experts/layer_{layer:02d}"] = n.count(0)
        found[f"router/entropy/layer_{layer:02d}"] = -sum(p * math.log(p) for p in shares) / math.log(4)
    return found


@pytest.mark.parametrize(
    ("world_size", "axes"),
    [
        (1, ("parallel.recompute=full",)),
        (2, ("parallel.tp=2", "parallel.recompute=full")),
        (2, ("parallel.pp=2",)),
        (2, ("parallel.cp=2",)),
        (2, ("parallel.ep=2",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_load(world_size: int, axes: tuple[str, ...], expected: dict[str, Any]) -> None:
    for found in run_distributed(measured, world_size, world_size, axes):
        assert found == pytest.approx(expected, abs=1e-12)
