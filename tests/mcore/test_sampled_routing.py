"""R3: the experts that the sampler chose are recorded on every layout, and used in scoring and updates.

A real trainer samples and packs. Its experts are replaced by drawn ones, on the ranks that have them: loss and every
gradient are then those of a loop over sequences through the model of one process.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.batches import NO_EXPERT
from gspo_megatron.base.metrics import merge, on_host, values
from gspo_megatron.build.inputs import settle
from gspo_megatron.build.trainer import device_of, open_trainer
from gspo_megatron.config.loading import load_config
from gspo_megatron.mcore.packed_tokens import packed
from gspo_megatron.monitor.console import Console
from gspo_megatron.run.step_state import StepState
from gspo_megatron.run.trainer import Trainer
from gspo_megatron.testing.local_ranks import run_distributed
from tests.mcore.test_routing import LAYERS, Forced, drawn_experts
from tests.mcore.test_spans import SETTINGS as MODEL
from tests.mcore.test_spans import named_parameters_of
from tests.support import oracles

SETTINGS = (
    *(setting for setting in MODEL if "vocab_size" not in setting),
    "rollout.prompts_per_step=3",
    "rollout.group_size=4",
    "rollout.max_new_tokens=6",
    "rollout.max_batch=5",
    "reward.functions.exact_match=1",
    "train.tokens_per_micro_batch=48",
    "data.eval_size=1",
    "logging.tensorboard=false",
    "algorithm.kl_coef=0",
    "algorithm.updates_per_rollout=1",
    "algorithm.old_log_probs=recompute",
    "algorithm.routing_replay=R3",
)
LAYOUTS = {
    "one process": (1, ()),
    "tp2": (2, ("parallel.tp=2",)),
    "dp2 ep2 allgather": (2, ("parallel.ep=2", "parallel.token_dispatcher=allgather")),
    "pp2 vpp2 recompute": (2, ("parallel.pp=2", "parallel.vpp=2", "parallel.recompute=full")),
    "cp2": (2, ("parallel.cp=2",)),
    "tp2 cp2 ep2 etp2": (4, ("parallel.tp=2", "parallel.cp=2", "parallel.ep=2", "parallel.etp=2")),
}
NAMES = ("router/sampler_changed_fraction", "router/changed_fraction")
Gradients = list[tuple[Any, Tensor]]


class Result(NamedTuple):
    """Of a rank."""

    rollouts: list[tuple[list[int], int, float]]
    """(tokens, length of the prompt, advantage)."""
    held: list[int]
    """Which rollouts this rank has sampled."""
    experts: list[Tensor]
    """That the micro-batches have, by rollout."""
    scoring_changes: bool
    gradients_that_change: int
    drift: dict[str, float]
    planted: tuple[float, list[float], Gradients]
    """Loss, old log-probs and slices of gradients with `drawn_experts`."""
    drift_of_planted: dict[str, float]


def step_of(trainer: Trainer, groups: Any) -> StepState:
    sequences = trainer.advantages(groups)
    for i, sequence in enumerate(sequences):
        sequence.advantage = random.Random(i).choice([-1.5, -0.5, 0.25, 1.0])
    step = StepState(1, groups, sequences)
    trainer.pack(step)
    return step


def update(trainer: Trainer, step: StepState) -> tuple[dict[str, float], Gradients]:
    [batch] = step.batches
    metrics = on_host(trainer.policy.update(batch, trainer.loss, lr=0.0))
    gradients = [(place, gradient.clone()) for place, gradient in trainer.policy.gradients()]
    return values(merge(trainer.ranks.gather([metrics]))), gradients


def changed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "changed" in name}


def replayed(folder: str, settings: tuple[str, ...]) -> Result:
    config = load_config(None, [*SETTINGS, *settings, f"run.dir={folder}"])
    device = device_of(config)
    with open_trainer(settle(config, device.world_size), device, Console(on=False)) as trainer:
        policy: Any = trainer.policy
        policy.begin(with_reference=False)
        groups = trainer.sample(1)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        held = [i for i, rollout in enumerate(rollouts) if rollout.routed_experts is not None]
        step = step_of(trainer, groups)
        assert all(rollout.routed_experts is None for rollout in rollouts), "they are kept once"
        [batch] = step.batches
        free = policy.log_probs(batch.micro_batches)
        trainer.score(step)
        same = all(torch.equal(a, m.columns["old_log_probs"]) for a, m in zip(free, batch.micro_batches, strict=True))
        metrics, gradients = update(trainer, step)
        step.collect_columns(trainer.ranks)
        experts = [sequence.columns["routed_experts"] for sequence in step.sequences]
        for m in batch.micro_batches:
            m.columns.pop("routed_experts", None)
        _, without = update(trainer, step)

        for i in held:
            rollouts[i].routed_experts = drawn_experts(i, len(experts[i]) - 1)
        planted = step_of(trainer, groups)
        trainer.score(planted)
        forced, forced_gradients = update(trainer, planted)
        planted.collect_columns(trainer.ranks)
        old = [x for s in planted.sequences for x in s.columns["old_log_probs"].tolist()]
    return Result(
        [(s.tokens.tolist(), len(r.prompt.tokens), s.advantage) for r, s in zip(rollouts, step.sequences, strict=True)],
        held,
        experts,
        not same,
        sum(not torch.equal(a, b) for (_, a), (_, b) in zip(gradients, without, strict=True)),
        changed(metrics),
        (forced["loss"], old, forced_gradients),
        changed(forced),
    )


def by_hand(folder: str, rollouts: list[tuple[list[int], int, float]]) -> tuple[float, list[float], dict[str, Tensor]]:
    """(loss, old log-probs, gradients by name) with `drawn_experts`, one sequence after the other."""
    config = load_config(None, [*SETTINGS, f"run.dir={folder}"])
    device = device_of(config)
    with open_trainer(settle(config, 1), device, Console(on=False)) as trainer:
        policy: Any = trainer.policy
        [model] = policy.model
        new = []
        for i, (tokens, prompt_length, _) in enumerate(rollouts):
            length = len(tokens)
            # Nothing follows the last token, so its experts do not matter.
            forced = Forced(drawn_experts(i, length - 1)[[*range(length - 1), 0]])
            inputs = packed(torch.arange(length), torch.tensor([0, length]), length, routing=forced)
            hidden = model(torch.tensor(tokens), inputs).squeeze(1)
            logits = (hidden @ model.head_weight().T)[:, : policy.num_ids]
            log_probs = logits.log_softmax(dim=-1)
            new.append(torch.stack([log_probs[t - 1, tokens[t]] for t in range(prompt_length, length)]))
        old = [y.detach() for y in new]
        loss = oracles.policy_loss("gspo", new, old, [advantage for *_, advantage in rollouts])
        names, parameters = zip(*((place.name, p) for place, p in named_parameters_of(policy)), strict=True)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found = {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
    return float(loss), torch.cat(old).tolist(), found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = str(tmp_path_factory.mktemp("alone"))
    return run_distributed(replayed, 1, folder, (), like_torchrun=True)[0]


@pytest.fixture(scope="module")
def expected(alone: Result, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, list[float], dict[str, Tensor]]:
    folder = str(tmp_path_factory.mktemp("by_hand"))
    return run_distributed(by_hand, 1, folder, alone.rollouts, like_torchrun=True)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_every_layout(layout: str, alone: Result, expected: Any, tmp_path: Path) -> None:
    world_size, settings = LAYOUTS[layout]
    found = run_distributed(replayed, world_size, str(tmp_path), settings, like_torchrun=True) if settings else [alone]
    loss, old, gradients = expected
    samplers = 2 if "dp2" in layout or "cp2" in layout else 1
    assert len({tuple(result.held) for result in found}) == samplers
    assert {i for result in found for i in result.held} == set(range(12))
    slices: dict[str, dict[int, Tensor]] = {}
    places = {}
    for result in found:
        assert result.rollouts == alone.rollouts
        for one, other in zip(alone.experts, result.experts, strict=True):
            assert torch.equal(one.sort(dim=2).values, other.sort(dim=2).values)
            assert (other[-1] == NO_EXPERT).all() and other[:-1].min() >= 0, "the last token is not processed"
        # In float64 the sampler and the trainer choose the same.
        assert not result.scoring_changes and result.gradients_that_change == 0
        names = [f"{name}/layer_{n:02d}" for name in NAMES for n in range(1, LAYERS + 1)]
        assert result.drift == dict.fromkeys(names, 0)
        assert result.drift_of_planted == pytest.approx(alone.drift_of_planted, abs=0)
        assert min(result.drift_of_planted.values()) > 0.3
        assert result.planted[0] == pytest.approx(loss, rel=1e-10)
        assert result.planted[1] == pytest.approx(old, rel=1e-10)
        for place, gradient in result.planted[2]:
            places[place.name] = place
            slices.setdefault(place.name, {})[place.index] = gradient
    assert gradients.keys() <= places.keys()
    for name, wanted in gradients.items():
        place = places[name]
        whole = place.join([slices[name][i] for i in range(place.count)])[: len(wanted)]
        assert float((whole - wanted).abs().max()) < 1e-9 * float(wanted.abs().max()), name
