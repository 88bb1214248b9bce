"""Guards on real Megatron: a rejected update leaves no trace, and differing copies of a parameter are found, whichever
axis replicates them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import Sequence, UpdateBatch
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import pack
from gspo_megatron.device import open_device
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.mcore import compat, replica_check
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.optimizer import get_step_count, shards_of_adam
from gspo_megatron.mcore.parameters import named_parameters
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support.small import SMALL


def policies(count: int, world_size: int, *settings: str) -> list[MegatronPolicy]:
    """Equal ones, on one set of groups."""
    config = load_config(None, [*SMALL, "model.max_sequence_length=24", "model.init_std=0.3", *settings])
    device = open_device("cpu", config.precision.dtype)
    groups = Groups(check_config(config, world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    return [MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring) for _ in range(count)]


def update(policy: MegatronPolicy, accept: Any = None, *, scale: float = 1.0, spoil: str = "") -> float:
    """One update of likelihoods; `spoil` makes the loss or its gradient of this rank not a number. The norm."""
    groups = policy.groups
    sequences = [
        Sequence.after_prompt([3, 4, 5, 6, 7, 8], 2),
        Sequence.after_prompt([7, 8, 9, 10], 1),
        Sequence.after_prompt([1, 2, 3, 11, 12], 2),
    ]
    micro_batches = pack(
        sequences,
        pad_id=0,
        max_tokens=24,
        rules=packing_rules(policy.config),
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        cp_rank=groups.cp_rank,
        cp_size=groups.cp_size,
    )

    def loss(log_probs_R: Tensor, *_: Any) -> LossTerms:
        share = -log_probs_R.sum() / 10 * scale
        if spoil == "loss":
            share = share * math.nan
        elif spoil == "gradient":
            share = share + (log_probs_R * 0).sum().sqrt()
        return LossTerms(share, {})

    metrics = policy.update(UpdateBatch(micro_batches, 3, 10), loss, lr=1e-2, accept=accept)
    return float(metrics["grad_norm"].total) if "grad_norm" in metrics else math.nan


def everything(policy: MegatronPolicy) -> list[Tensor]:
    """Weights, main weights, Adam's moments: copies."""
    shards = shards_of_adam(policy.optimizer, policy.chunks).values()
    weights = [p.detach() for chunk in policy.model for p in chunk.parameters()]
    return [t.clone() for t in [*weights, *(t for s in shards for t in (s.main, s.exp_avg, s.exp_avg_sq))]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


LAYOUTS = {
    "dp2": (2, ()),
    "dp2_ep2_bf16": (2, ("parallel.ep=2", "precision.dtype=bf16")),
    "dp2_whole_optimizer": (2, ("optimizer.distributed=false",)),
    "pp2": (2, ("parallel.pp=2",)),
    "tp2": (2, ("parallel.tp=2",)),
}


def steps_both_ways(settings: tuple[str, ...]) -> list[tuple[bool, bool, bool]]:
    """Three updates, clipped and not, through the guarded way and through Megatron's own `step`: after each, whether
    they moved, agree, and know the same norm."""
    ours, theirs = policies(2, 2, "optimizer.clip_grad=1", *settings)
    theirs._step = lambda norm: None  # the gradients stay ready, for the optimizer's own step
    found = []
    for scale in (1.0, 1e-3, 3.0):
        before = everything(ours)
        norm = update(ours, lambda norm, finite: finite, scale=scale)
        update(theirs, scale=scale)
        with theirs.device.optimizer_scope():
            _, own, _ = theirs.optimizer.step()
        first = (ours.groups.dp_rank, ours.groups.cp_rank) == (0, 0)
        after = everything(ours)
        found.append((not same(before, after), same(after, everything(theirs)), not first or norm == float(own)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_guarded_update_is_megatrons_own(layout: str) -> None:
    num_processes, settings = LAYOUTS[layout]
    for found in run_distributed(steps_both_ways, num_processes, settings):
        assert found == [(True, True, True)] * 3


def refused(settings: tuple[str, ...], where: str) -> tuple[list[tuple[float, bool]], bool, int, int, float]:
    """Updates that one rank spoils, between good ones: what every rank was asked, whether anything but the version
    changed, the numbers of Adam's steps and of versions at the end, and the norm of the update after."""
    [policy] = policies(1, 2, *settings)
    update(policy)
    rank, asked = torch.distributed.get_rank(), []

    def accept(norm: float, finite: bool) -> bool:
        asked.append((norm, finite))
        return finite and math.isfinite(norm)

    before = everything(policy)
    if where == "buffer":
        # A gradient that breaks on one rank after it has been reduced: no other rank's is touched.
        own: Callable[..., None] = policy.model[0].config.finalize_model_grads_func

        def broken(*args: Any, **kwargs: Any) -> None:
            own(*args, **kwargs)
            for parameter in policy.model[0].parameters():
                parameter.main_grad.view(-1)[:] = math.nan if rank == 1 else parameter.main_grad.view(-1)

        policy.model[0].config.finalize_model_grads_func = broken
        update(policy, accept)
        policy.model[0].config.finalize_model_grads_func = own
    else:
        update(policy, accept, spoil=where if rank == 1 else "")
    unchanged = same(before, everything(policy))
    norm = update(policy, accept)
    return asked, unchanged, get_step_count(policy.optimizer), policy.version, norm


@pytest.mark.parametrize("where", ["loss", "gradient", "buffer"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_refused_update_leaves_nothing_behind(layout: str, where: str) -> None:
    num_processes, settings = LAYOUTS[layout]
    found = run_distributed(refused, num_processes, settings, where)
    for asked, unchanged, adam_steps, version, _ in found:
        assert asked == found[0][0], "all ranks were asked the same"
        (norm, finite), (next_norm, next_finite) = asked
        assert norm == math.inf and finite == (where != "loss")
        assert math.isfinite(next_norm) and next_norm > 0 and next_finite
        assert unchanged and (adam_steps, version) == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_fingerprint_sees_a_bit_and_an_exchange(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 11, generator=torch.Generator().manual_seed(1)).to(dtype)
    bits = values.view(replica_check.BITS[values.element_size()]).view(-1).tolist()
    wrapped = [total % 2**64 for total in (sum(bits), sum(i * b for i, b in enumerate(bits)))]
    for chunk in (1 << 22, 10):
        monkeypatch.setattr(replica_check, "CHUNK", chunk)
        expected = replica_check.fingerprint(values)
        assert [total % 2**64 for total in expected.tolist()] == wrapped
    flipped, exchanged, signed = values.clone(), values.clone(), torch.zeros(3, dtype=dtype)
    flipped.view(replica_check.BITS[values.element_size()])[6, 10] ^= 1
    exchanged[0, 0], exchanged[5, 5] = values[5, 5], values[0, 0]
    for other in (flipped, exchanged):
        assert not torch.equal(replica_check.fingerprint(other), expected)
    assert not torch.equal(replica_check.fingerprint(signed), replica_check.fingerprint(-signed)), (
        "0 and -0 are equal, not alike"
    )


Found = tuple[list[str], dict[str, list[str]]]


def look(world_size: int, axes: tuple[str, ...], changes: dict[str, int]) -> Found:
    """What is found in equal copies; and, for each parameter and rank, when one bit is changed there."""
    [policy] = policies(1, world_size, *axes)
    update(policy)
    clean, found = policy.differing_replicas(), {}
    for name, rank in changes.items():
        mine = [
            parameter
            for chunk in policy.model
            for place, parameter in named_parameters(chunk, policy.config.model.shape, policy.groups)
            if place.name == name and torch.distributed.get_rank() == rank
        ]
        for parameter in mine:
            parameter.data.view(-1).view(torch.int32)[1] ^= 1
        found[name] = policy.differing_replicas()
        for parameter in mine:
            parameter.data.view(-1).view(torch.int32)[1] ^= 1
    return clean, found


NORM, ROUTER = "decoder.final_layernorm.weight", "decoder.layers.1.mlp.router.weight"
QKV, EMBEDDING = "decoder.layers.0.self_attention.linear_qkv.weight", "embedding.word_embeddings.weight"
EXPERT = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight"


@pytest.mark.parametrize(
    ("world_size", "axes", "changes"),
    [
        (3, (), {NORM: (2, "0, 1 | 2"), EXPERT: (1, "0, 2 | 1"), EMBEDDING: (0, "1, 2 | 0")}),
        (2, ("parallel.cp=2",), {QKV: (1, "0 | 1")}),
        # Tensor parallel cuts neither norms nor the router; experts it cuts with parallel.etp only.
        (2, ("parallel.tp=2",), {NORM: (1, "0 | 1"), ROUTER: (0, "0 | 1"), QKV: (1, ""), EXPERT: (1, "0 | 1")}),
        (2, ("parallel.tp=2", "parallel.etp=2"), {NORM: (0, "0 | 1"), EXPERT: (1, "")}),
        # Expert 3 lives on ranks 1 and 3, everything else on all four or on one tensor-parallel half of them.
        (4, ("parallel.tp=2", "parallel.ep=2"), {EXPERT: (3, "1 | 3"), QKV: (2, "0 | 2"), NORM: (3, "1, 2 | 3")}),
        (2, ("parallel.pp=2",), {NORM: (1, ""), EMBEDDING: (0, "")}),
        (2, ("parallel.pp=2", "model.tie_embeddings=true"), {NORM: (1, ""), EMBEDDING: (1, "0 | 1")}),
    ],
    ids=["dp3", "cp2", "tp2", "tp2_etp2", "tp2_dp2_ep2", "pp2", "pp2_tied"],
)
def test_copies_that_differ_are_named(
    world_size: int, axes: tuple[str, ...], changes: dict[str, tuple[int, str]]
) -> None:
    results = run_distributed(look, world_size, world_size, axes, {name: rank for name, (rank, _) in changes.items()})
    for clean, found in results:
        assert clean == []
        assert found == results[0][1], "every rank says the same"
        for name, (_, ranks) in changes.items():
            assert found[name] == ([f"{name} on ranks {ranks}"] if ranks else []), name
