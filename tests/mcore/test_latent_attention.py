"""Latent attention and what comes with DeepSeek-V3, without transformers: the cache of latents, the router's bias that
is a weight without being a parameter, and weights loaded into any layout. test_deepseek_v3.py compares with
transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import MicroBatch, Position, Prompt, Sequence, UpdateBatch
from gspo_megatron.base.errors import CheckpointError
from gspo_megatron.base.metrics import LossTerms
from gspo_megatron.build.checks import check_config
from gspo_megatron.checkpoint.directory import CheckpointDirectory
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import pack
from gspo_megatron.device import open_device
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.kv_cache import KVCache
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.mcore.sampler import MegatronSampler
from gspo_megatron.mcore.saving import MegatronCheckpoints
from gspo_megatron.models.families import family_of
from gspo_megatron.models.names import InMemory
from gspo_megatron.rollout.native.stopping import Stops
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.testing.fakes import PlainState, plain
from gspo_megatron.testing.local_ranks import run_distributed

TINY = (
    "model.preset=tiny_mla",
    "model.hidden_size=24",
    "model.vocab_size=31",
    "model.max_sequence_length=32",
    "model.init_std=0.3",
    "rollout.max_new_tokens=6",
    "rollout.max_batch=5",
    "precision.device=cpu",
)
BIAS = "mlp.gate.e_score_correction_bias"
Weights = dict[str, Tensor]


def open_policy(world_size: int, *settings: str) -> MegatronPolicy:
    config = load_config(None, [*TINY, "precision.dtype=fp32", *settings])
    device = open_device("cpu", config.precision.dtype)
    groups = Groups(check_config(config, world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    return MegatronPolicy(config, groups, device, False, Algorithm.of(config).scoring)


def weights_of(policy: MegatronPolicy) -> Weights:
    rules = family_of(policy.config.model.shape).rules
    return {name: tensor.clone() for name, tensor in policy.weights(rules)}


def with_biases(weights: Weights) -> Weights:
    """Drawn as zeros, which would hide their loss."""
    draw = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(tensor.shape, generator=draw) * 0.1 if BIAS in name else tensor
        for name, tensor in weights.items()
    }


def load(policy: MegatronPolicy, weights: Weights) -> None:
    policy.load_weights(lambda name: InMemory(weights[name]), family_of(policy.config.model.shape).rules)


def update(policy: MegatronPolicy, lr: float = 0.05) -> None:
    groups = policy.groups
    sequences = [Sequence.after_prompt(list(range(start, start + 9)), 2) for start in (1, 4, 9, 14)]
    ranks = {"dp_rank": groups.dp_rank, "dp_size": groups.dp_size, "cp_rank": groups.cp_rank, "cp_size": groups.cp_size}
    micro_batches = pack(sequences, pad_id=0, max_tokens=64, rules=packing_rules(policy.config), **ranks)

    def loss(log_probs_R: Tensor, entropy_R: Tensor | None, m: MicroBatch, batch: UpdateBatch) -> LossTerms:
        return LossTerms(-log_probs_R.sum() / 28, {})

    policy.update(UpdateBatch(micro_batches, 4, 28), loss, lr=lr)


@pytest.fixture(scope="module")
def drawn() -> Weights:
    """The weights that one process draws, with biases."""
    return with_biases(run_distributed(drawn_weights, 1)[0])


def drawn_weights(*settings: str) -> Weights:
    return weights_of(open_policy(1, *settings))


def test_biases_are_drawn_as_zeros_and_norms_as_ones(drawn: Weights) -> None:
    [weights] = run_distributed(drawn_weights, 1)
    vectors = {name: tensor for name, tensor in weights.items() if tensor.dim() == 1}
    assert sum(BIAS in name for name in vectors) == 3
    assert all(tensor.eq(0 if BIAS in name else 1).all() for name, tensor in vectors.items())


# ------------------------------------------------------------------------------------------------ loading, any layout

LAYOUTS = [
    (1, ()),
    (2, ("parallel.tp=2", "parallel.etp=2")),
    (2, ("parallel.pp=2", "parallel.vpp=2")),
    (4, ("parallel.tp=2", "parallel.ep=4")),
]


def loaded(world_size: int, settings: tuple[str, ...], weights: Weights) -> bool:
    policy = open_policy(world_size, "run.seed=7", *settings)
    assert not torch.equal(weights_of(policy)["lm_head.weight"], weights["lm_head.weight"])
    load(policy, weights)
    ours = weights_of(policy)
    update(policy, lr=0.0)  # the optimizer's own copy, too
    again = weights_of(policy)
    dtype = policy.device.dtype
    return all(
        torch.equal(ours[name].to(dtype), x.to(dtype)) and torch.equal(again[name], ours[name])
        for name, x in weights.items()
    )


@pytest.mark.parametrize(("world_size", "settings"), [*LAYOUTS, (2, ("precision.dtype=bf16", "parallel.tp=2"))])
def test_loaded_weights_are_bit_for_bit_those_that_were_given(
    world_size: int, settings: tuple[str, ...], drawn: Weights
) -> None:
    assert all(run_distributed(loaded, world_size, world_size, settings, drawn))


def refused(name: str, weights: Weights) -> str:
    policy = open_policy(1)
    with pytest.raises(CheckpointError) as error:
        load(policy, weights | {name: weights[name][:-1]})
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm_head.weight", "has size [30, "),
        ("model.layers.2.mlp.shared_experts.down_proj.weight", "model.layers.2.mlp.shared_experts.down_proj.weight"),
        (f"model.layers.1.{BIAS}", "has size [11], but a model of these settings has [12]"),
    ],
)
def test_weights_of_another_size_are_refused_by_name(name: str, message: str, drawn: Weights) -> None:
    assert message in run_distributed(refused, 1, name, drawn)[0]


# ------------------------------------------------------------------------------------------------- the router's bias


def trained(world_size: int, settings: tuple[str, ...], weights: Weights) -> Weights:
    policy = open_policy(world_size, *settings)
    load(policy, weights)
    for _ in range(2):
        update(policy)
    return weights_of(policy)


@pytest.mark.parametrize(("world_size", "settings"), LAYOUTS)
def test_updates_leave_the_bias_as_it_was(world_size: int, settings: tuple[str, ...], drawn: Weights) -> None:
    """Megatron's own update of it would route the next log-probs unlike the rollouts."""
    for after in run_distributed(trained, world_size, world_size, settings, drawn):
        for name, tensor in after.items():
            assert torch.equal(tensor, drawn[name]) == (BIAS in name), name


def saved(folder: Path, weights: Weights) -> Weights:
    policy = open_policy(2, "parallel.tp=2")
    load(policy, weights)
    policy.freeze_reference()
    update(policy)
    checkpoints = MegatronCheckpoints(policy, CheckpointDirectory(folder, keep=1), print)
    checkpoints.save(Position(0, 0, 1), PlainState({"updates": 1}), wait=True)
    return weights_of(policy)


def resumed(folder: Path, settings: tuple[str, ...], world_size: int) -> tuple[Weights, list[Tensor]]:
    policy = open_policy(world_size, "run.seed=7", *settings)
    assert MegatronCheckpoints(policy, CheckpointDirectory(folder, keep=1), print).load("latest", plain) is not None
    assert policy.reference is not None
    frozen = [b for chunk in policy.reference for name, b in chunk.named_buffers() if name.endswith("expert_bias")]
    return weights_of(policy), [bias.clone() for bias in frozen]


def test_a_checkpoint_holds_the_bias_of_policy_and_reference(drawn: Weights, tmp_path: Path) -> None:
    before = run_distributed(saved, 2, tmp_path, drawn)[0]
    biases = [drawn[f"model.layers.{i}.{BIAS}"] for i in (1, 2, 3)]
    for settings, world_size in (((), 1), (("parallel.pp=2", "parallel.ep=1"), 2)):
        found = run_distributed(resumed, world_size, tmp_path, settings, world_size)
        assert all(torch.equal(found[0][0][name], before[name]) for name in before)
        for ours, theirs in zip([bias for _, frozen in found for bias in frozen], biases, strict=True):
            assert torch.equal(ours, theirs)


def differing(world_size: int, settings: tuple[str, ...], spoiled_rank: int) -> list[str]:
    policy = open_policy(world_size, *settings)
    alike = policy.differing_replicas()
    if torch.distributed.get_rank() == spoiled_rank:
        policy.model[0].decoder.layers[1].mlp.router.expert_bias[3] += 1e-3
    return alike + policy.differing_replicas()


@pytest.mark.parametrize("settings", [(), ("parallel.tp=2",)])
def test_a_bias_that_differs_between_ranks_is_found(settings: tuple[str, ...]) -> None:
    for found in run_distributed(differing, 2, 2, settings, 1):
        assert found == ["decoder.layers.1.mlp.router.expert_bias on ranks 0 | 1"]


# ----------------------------------------------------------------------------------------------------------- the cache


def sampled(world_size: int, *settings: str) -> tuple[float, set[tuple[int, ...]]]:
    """(largest difference between a log-prob as it was sampled and as it is scored, sizes of what a layer caches)."""
    policy = open_policy(world_size, "precision.dtype=fp64", *settings)
    sampler, sizes = MegatronSampler(policy, stops=Stops((1,)), pad_id=0), set()
    own = KVCache.layer

    def layer(cache: KVCache, number: int, like: Any) -> tuple[Tensor, ...]:
        kept = own(cache, number, like)
        sizes.update(tuple(x.shape[1:2] + x.shape[3:]) for x in kept)
        return kept

    prompts = [Prompt(i, "", tokens, "") for i, tokens in enumerate([(3, 4, 5, 6, 7, 8), (2,), (12, 11)] * 3)]
    with patch.object(KVCache, "layer", layer):
        rollouts = sampler.generate(prompts, list(range(len(prompts))))
    sequences = [
        Sequence.after_prompt([*prompt.tokens, *r.tokens], len(prompt.tokens), 0.0, {"old_log_probs": r.log_probs})
        for prompt, r in zip(prompts, rollouts, strict=True)
    ]
    for sequence in sequences:
        sequence.columns["old_log_probs"] = torch.as_tensor(sequence.columns["old_log_probs"], dtype=torch.float64)
    micro_batches = pack(sequences, pad_id=0, max_tokens=64, rules=packing_rules(policy.config))
    scored = policy.log_probs(micro_batches)
    pairs = zip(scored, (m.columns["old_log_probs"] for m in micro_batches), strict=True)
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs), sizes


@pytest.mark.parametrize("settings", [(), ("parallel.tp=2",), ("model.q_lora_rank=0",)])
def test_sampling_from_latents_is_scoring_with_keys_and_values(settings: tuple[str, ...]) -> None:
    """kv_lora_rank + qk_rope_head_dim numbers for a token and layer, on every tensor-parallel rank."""
    world_size = 2 if settings == ("parallel.tp=2",) else 1
    for difference, sizes in run_distributed(sampled, world_size, world_size, *settings):
        assert difference < 1e-12
        assert sizes == {(1, 32 + 8)}
