"""FP8 as Megatron and Transformer Engine drive it, on the CPU; see fp8.py for what computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, Prompt, UpdateBatch
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.mcore.sampler import MegatronSampler
from gspo_megatron.models.families import FAMILIES
from gspo_megatron.rollout.native.stopping import Stops
from gspo_megatron.testing.local_ranks import run_distributed
from tests.te import fp8
from tests.te.bench import (
    TE_FAMILIES,
    Case,
    Measured,
    advantage_weighted,
    measured,
    micro_batches_of,
    open_groups,
    policy_of,
    sequences,
    worst_gradient,
    worst_log_prob,
)

pytestmark = [
    pytest.mark.te,
    pytest.mark.skipif(not fp8.has_reference(), reason="this Transformer Engine has no reference of current scaling"),
]
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {"one process": (1, {}), "tp2 ep2": (4, {"tp": 2, "ep": 2})}
SAMPLING = ("rollout.max_new_tokens=3", "rollout.max_batch=8")


WIDTHS = {
    "deepseek_v3": tuple(
        f"model.{name}=16"
        for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
}
"""Where doubling the widths of the smallest model is not enough."""


def case_of(family: str, layout: str, *settings: str) -> Case:
    """So wide that every shard has a multiple of 16 columns."""
    world_size, axes = LAYOUTS[layout]
    settings = ("model.num_layers=2", *WIDTHS.get(family, ()), *settings)
    return Case(family, world_size, axes, "bf16", settings, widened=2)


def in_fp8(case: Case) -> Case:
    return replace(case, settings=(*case.settings, *SAMPLING, *fp8.SETTINGS))


def bf16_and_fp8(case: Case) -> tuple[Measured, Measured]:
    fp8.use_reference()
    config, groups = open_groups(case)
    return measured(policy_of(config, groups, "te")), measured(policy_of(in_fp8(case).config(), groups, "te"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", TE_FAMILIES)
def test_differs_from_bf16_by_rounding(family: str, layout: str) -> None:
    """Every token goes to all experts here. Where it has a choice, rounding sends some tokens to another expert, and
    the gradient of an expert with few tokens can then be anything."""
    uses = FAMILIES[family].uses
    sizes = {"num_experts": 4, "router_groups": 1, "router_groups_per_token": 1, "experts_per_token": 4}
    case = case_of(family, layout, *(f"model.{name}={size}" for name, size in sizes.items() if name in uses))
    for bf16, fp8_ in run_distributed(bf16_and_fp8, case.world_size, case, timeout_s=120):
        assert 1e-4 < worst_log_prob(fp8_.log_probs, bf16.log_probs) < 0.4, "above 0: FP8 was used"
        assert worst_gradient(fp8_, bf16)[0] < 0.5, worst_gradient(fp8_, bf16)
        assert fp8_.grad_norm == pytest.approx(bf16.grad_norm, rel=5e-2)


def sample(policy: MegatronPolicy) -> None:
    prompts = [Prompt(i, "", tuple(range(1, 4 + i)), "") for i in range(4)]
    rollouts = MegatronSampler(policy, stops=Stops((0,)), pad_id=0).generate(prompts, [0, 1, 2, 3])
    assert all(rollout.tokens for rollout in rollouts)


def one_update(policy: MegatronPolicy, loss: Any = advantage_weighted, lr: float = 1e-3) -> None:
    counted = [s.num_trained for s in sequences()]
    batch = UpdateBatch(micro_batches_of(policy), sum(map(bool, counted)), sum(counted))
    policy.update(batch, loss, lr=lr)


def activity(case: Case) -> list[tuple[str, dict[str, int], list[tuple[int, ...]]]]:
    """What each call did, one after the other: (call, tensors quantised, sizes of the products)."""
    fp8.use_reference()
    config, groups = open_groups(in_fp8(case))
    policy = policy_of(config, groups, "te")
    policy.freeze_reference()
    watched, found = fp8.Watched(), []
    micro_batches = micro_batches_of(policy)
    calls = {
        "log_probs": lambda: policy.log_probs(micro_batches),
        "sample": lambda: sample(policy),
        "reference": lambda: policy.log_probs(micro_batches, reference=True),
        "update": lambda: one_update(policy),
    }
    order = ("log_probs", "log_probs", "sample", "sample", "reference", "reference")
    for name in (*order, "update", "sample", "log_probs", "reference"):
        watched.products.clear()
        watched.quantised.clear()
        calls[name]()
        found.append((name, dict(watched.quantised), sorted(watched.products)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", TE_FAMILIES)
def test_every_forward_is_in_fp8_aligned_and_quantises_weights_once(family: str, layout: str) -> None:
    case = case_of(family, layout)
    for found in run_distributed(activity, case.world_size, case, timeout_s=120):
        for name, _, products in found:
            assert products, f"{name} computed nothing in FP8"
            odd = [sizes for sizes in products if any(size % 16 for size in sizes)]
            assert not odd, f"{name}: cuBLAS takes multiples of 16, not {odd}"
        weights = [(name, quantised.get("weight", 0)) for name, quantised, _ in found]
        every = weights[0][1]
        assert every > 0
        assert weights == [
            ("log_probs", every),
            ("log_probs", 0),
            ("sample", 0),
            ("sample", 0),
            ("reference", every),
            ("reference", 0),
            ("update", every),
            ("sample", every),
            ("log_probs", 0),
            ("reference", 0),
        ]


def old_and_first(case: Case) -> list[tuple[bool, int]]:
    """(whether old log-probs and those of the first forward of the update are the same bits, micro-batches), in two
    steps."""
    fp8.use_reference()
    config, groups = open_groups(in_fp8(case))
    policy, found = policy_of(config, groups, "te"), []
    for _ in range(2):
        old = policy.log_probs(micro_batches_of(policy))
        seen: list[Tensor] = []

        def loss(log_probs_R: Tensor, entropy_R: Tensor | None, m: MicroBatch, batch: UpdateBatch) -> LossTerms:
            seen.append(log_probs_R.detach().clone())  # noqa: B023  (called before the next turn)
            return advantage_weighted(log_probs_R, entropy_R, m, batch)

        one_update(policy, loss)
        found.append((all(map(torch.equal, old, seen)), len(seen)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", TE_FAMILIES)
def test_the_first_ratio_is_one(family: str, layout: str) -> None:
    case = case_of(family, layout)
    for found in run_distributed(old_and_first, case.world_size, case, timeout_s=120):
        assert len(found) == 2 and all(same and count for same, count in found)
