"""Several trained spans in a sequence: loss and every gradient on a choice of layouts, against loops over tokens.

The oracle uses no packing, masks or segments: it runs one sequence at a time through the model of one process,
takes the log-prob of each trained token from the full softmax, and applies the equations of tests/support/oracles.py.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import Sequence, UpdateBatch
from gspo_megatron.base.ragged import Ragged
from gspo_megatron.build.checks import check_config
from gspo_megatron.config.loading import load_config
from gspo_megatron.data.packing import pack
from gspo_megatron.device import open_device
from gspo_megatron.layout.layout import packing_rules
from gspo_megatron.mcore import compat
from gspo_megatron.mcore.groups import Groups
from gspo_megatron.mcore.packed_tokens import packed
from gspo_megatron.mcore.parameters import named_parameters
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.run.algorithm import Algorithm
from gspo_megatron.run.stages import PolicyLoss, reduced
from gspo_megatron.testing.local_ranks import run_distributed
from tests.support import oracles
from tests.support.small import SMALL

SETTINGS = (
    *SMALL,
    "model.num_layers=4",
    "model.init_std=0.3",
    "model.max_sequence_length=32",
    "precision.dtype=fp64",
    "optimizer.distributed=false",
    "optimizer.clip_grad=1e9",
)
VARIANTS = ("gspo", "gspo_sum", "gmpo", "vespo", "gspo_token", "dapo")
MASKED = ("vespo", "dapo")
"""Here every trained token was drawn from some of the ids only. Every layout has one of them, but for dp2 ep2."""
VOCAB_SIZE = 13
LAYOUTS = {
    "one process": (1, ()),
    "dp2 ep2": (2, ("parallel.ep=2",)),
    "tp2": (2, ("parallel.tp=2",)),
    "pp2 vpp2": (2, ("parallel.pp=2", "parallel.vpp=2")),
    "cp2": (2, ("parallel.cp=2",)),
    "tp2 cp2 ep2": (4, ("parallel.tp=2", "parallel.cp=2", "parallel.ep=2")),
    "pp2 cp2 dp2": (8, ("parallel.pp=2", "parallel.cp=2")),
}


def sequences(*, masked: bool = False) -> list[Sequence]:
    """Conversations: spans of trained tokens with gaps between them, one sequence without any."""
    draw, made = random.Random(11), []
    for number in range(12):
        length = draw.randint(4, 15)
        trained = torch.tensor([False, *(draw.random() < 0.55 for _ in range(length - 1))]) & (number != 4)
        old = torch.tensor([-2.6 + draw.gauss(0, 0.3) for _ in range(int(trained.sum()))], dtype=torch.float64)
        tokens = torch.tensor([draw.randrange(2, VOCAB_SIZE) for _ in range(length)])
        # Advantages are float32 in a micro-batch: these have no rounding.
        advantage = draw.choice([-1.5, -0.5, 0.25, 1.0])
        made.append(Sequence(tokens, trained, advantage, {"old_log_probs": old}))
        if masked:
            others = random.Random(number)
            kept = [{t, *others.sample(range(VOCAB_SIZE), others.randrange(9))} for t in tokens[trained].tolist()]
            made[-1].columns["support"] = Ragged.of([sorted(of_token) for of_token in kept])
            counts = made[-1].columns["support"].counts_R
            made[-1].columns["old_log_probs"] = old + 2.6 - counts.log()
    assert max(int((s.trained[1:] & ~s.trained[:-1]).sum()) for s in made) > 2, "some have three spans and more"
    return made


def open_policy(world_size: int, *settings: str) -> tuple[MegatronPolicy, Algorithm]:
    config = load_config(None, [*SETTINGS, *settings])
    device, algorithm = open_device("cpu", "fp64"), Algorithm.of(config)
    groups = Groups(check_config(config, world_size), device.torch_device)
    compat.apply_patches(on_cpu=True)
    return MegatronPolicy(config, groups, device, False, algorithm.scoring), algorithm


def update(world_size: int, settings: tuple[str, ...], variant: str) -> tuple[float, list[tuple[Any, Tensor]]]:
    """(loss, slices of gradients) of one update, as this rank has them."""
    policy, algorithm = open_policy(world_size, f"algorithm.variant={variant}", "algorithm.kl_coef=0", *settings)
    made, ranks = sequences(masked=variant in MASKED), policy.groups
    share = {"dp_rank": ranks.dp_rank, "dp_size": ranks.dp_size, "cp_rank": ranks.cp_rank, "cp_size": ranks.cp_size}
    micro_batches = pack(made, pad_id=0, max_tokens=48, rules=packing_rules(policy.config), **share)
    counts = [s.num_trained for s in made if s.num_trained]
    batch = UpdateBatch(micro_batches, len(counts), sum(counts))
    metrics = policy.update(batch, PolicyLoss(algorithm.objective, ranks, False), lr=0.0)
    loss = reduced([metrics], ranks)["loss"]
    return loss, [(place, gradient.clone()) for place, gradient in policy.gradients()]


def by_hand(variant: str) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients by name) of the same, one sequence after the other."""
    policy, _ = open_policy(1, f"algorithm.variant={variant}")
    [model] = policy.model
    new, made = [], sequences(masked=variant in MASKED)
    for s in made:
        length = len(s)
        tokens = packed(torch.arange(length), torch.tensor([0, length]), length)
        hidden = model(s.tokens, tokens).squeeze(1)
        logits = (hidden @ model.head_weight().T)[:, :VOCAB_SIZE]
        if variant in MASKED:
            for t, kept in zip(s.trained.nonzero().flatten().tolist(), s.columns["support"].tolist(), strict=True):
                outside = torch.tensor([v not in kept for v in range(VOCAB_SIZE)])
                logits = logits.masked_fill((torch.arange(length) == t - 1)[:, None] & outside, -torch.inf)
        log_probs = logits.log_softmax(dim=-1)
        new.append([log_probs[t - 1, s.tokens[t]] for t in range(length) if s.trained[t]])
    stacked = [torch.stack(y) if y else torch.empty(0) for y in new]
    old = [s.columns["old_log_probs"] for s in made]
    loss = oracles.policy_loss(variant, stacked, old, [s.advantage for s in made])
    names, parameters = zip(*((place.name, p) for place, p in named_parameters_of(policy)), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.item(), {n: g for n, g in zip(names, gradients, strict=True) if g is not None}


def named_parameters_of(policy: MegatronPolicy) -> Any:
    return (
        (place, p) for chunk in policy.model for place, p in named_parameters(chunk, policy.config.model, policy.groups)
    )


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[float, dict[str, Tensor]]]:
    return {variant: run_distributed(by_hand, 1, variant)[0] for variant in VARIANTS}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_is_that_of_the_loops(layout: str, expected: dict[str, Any]) -> None:
    world_size, settings = LAYOUTS[layout]
    for variant in VARIANTS if world_size == 1 else VARIANTS[len(layout) % 3 :: 3]:
        loss, gradients = expected[variant]
        results = run_distributed(update, world_size, world_size, settings, variant)
        slices: dict[str, dict[int, Tensor]] = {}
        places = {}
        for found, of_rank in results:
            assert found == pytest.approx(loss, rel=1e-10), f"{variant}, loss"
            for place, gradient in of_rank:
                places[place.name] = place
                slices.setdefault(place.name, {})[place.index] = gradient
        assert gradients.keys() <= places.keys()
        for name, wanted in gradients.items():
            place = places[name]
            whole = place.join([slices[name][i] for i in range(place.count)])[: len(wanted)]
            size = float(wanted.abs().max()) or 1.0
            assert float((whole - wanted).abs().max()) < 1e-9 * size, f"{variant}, {name}"
