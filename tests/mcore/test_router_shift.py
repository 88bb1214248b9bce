"""RSPO: the shift of the routers, and loss and gradients with ratios weighed by it, against a loop over sequences.

After old log-probs are scored the routers are moved. The loop takes the log-probs of the experts from the routers' own
scores, before and after.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.metrics import merge, on_host, values
from gspo_megatron.mcore.packed_tokens import packed
from gspo_megatron.mcore.policy import MegatronPolicy
from gspo_megatron.mcore.routing import Choice
from gspo_megatron.run.stages import PolicyLoss
from gspo_megatron.testing.local_ranks import run_distributed
from tests.mcore.test_routing import LAYERS, batch_of
from tests.mcore.test_spans import named_parameters_of, open_policy, sequences
from tests.support import oracles

FLOOR = 0.85
SHIFT = (f"algorithm.router_shift_floor={FLOOR}", "algorithm.kl_coef=0")
LAYOUTS = {
    "one process": (1, ()),
    "tp2 recompute, R2": (2, ("parallel.tp=2", "parallel.recompute=full", "algorithm.routing_replay=R2")),
    "cp2 ep2": (2, ("parallel.cp=2", "parallel.ep=2")),
}


def move_routers(policy: MegatronPolicy) -> None:
    for place, parameter in named_parameters_of(policy):
        if "router" in place.name:
            draws = torch.Generator().manual_seed(sum(map(ord, place.name)))
            noise = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
            parameter.data.add_(0.05 * noise)


class Result(NamedTuple):
    """Of a rank."""

    loss: float
    shifts: list[float]
    """By layer."""
    weight: float
    floored: float
    gradients: list[tuple[Any, Tensor]]


def shifted(world_size: int, settings: tuple[str, ...]) -> Result:
    policy, algorithm = open_policy(world_size, *SHIFT, *settings)
    loss = PolicyLoss(algorithm.objective, policy.groups, False)
    batch, _ = batch_of(policy, sequences())
    policy.log_probs(batch.micro_batches, as_old=True)
    move_routers(policy)
    metrics = values(merge(policy.groups.gather([on_host(policy.update(batch, loss, lr=0.0))])))
    gradients = [(place, gradient.clone()) for place, gradient in policy.gradients()]
    by_layer = [metrics[f"router/shift/layer_{n:02d}"] for n in range(1, LAYERS + 1)]
    weight, floored = metrics["router/shift_weight"], metrics["router/shift_floor_fraction"]
    return Result(metrics["loss"], by_layer, weight, floored, gradients)


class Listening:
    """`Routing` of one whole sequence on one process: log-probs of all experts, and what the router chose. With
    `given`, uses those experts."""

    def __init__(self, given: dict[int, Tensor] | None = None) -> None:
        self.given, self.log_probs, self.chosen = given, dict[int, Tensor](), dict[int, Tensor]()

    def choose(self, layer: int, scores_TE: Tensor, own: Choice) -> Choice:
        self.log_probs[layer] = (scores_TE.exp() / scores_TE.exp().sum(1, keepdim=True)).log().detach()
        self.chosen[layer] = own[1]
        if self.given is None:
            return own
        return scores_TE.gather(1, self.given[layer]), self.given[layer]


class ByHand(NamedTuple):
    loss: float
    shifts: list[float]
    weight: float
    gradients: dict[str, Tensor]


def by_hand(replays: bool) -> ByHand:
    policy, _ = open_policy(1, *SHIFT)
    [model] = policy.model
    made = sequences()

    def run(i: int, given: dict[int, Tensor] | None) -> tuple[Tensor, Listening]:
        length, routing = len(made[i]), Listening(given)
        tokens = packed(torch.arange(length), torch.tensor([0, length]), length, routing=routing)
        hidden = model(made[i].tokens, tokens).squeeze(1)
        return (hidden @ model.head_weight().T)[:, :13].log_softmax(dim=-1), routing

    old = [run(i, None)[1] for i in range(len(made))]
    move_routers(policy)
    new, weighed, weights = [], [], []
    moved: list[list[float]] = [[] for _ in range(LAYERS)]
    for i, s in enumerate(made):
        log_probs, now = run(i, old[i].chosen if replays else None)
        of_rows = []
        for t in range(len(s)):
            distances = []
            for layer in range(LAYERS):
                experts = old[i].chosen[layer][t].tolist()
                before, after = old[i].log_probs[layer][t], now.log_probs[layer][t]
                distances.append(sum(abs(float(after[e] - before[e])) for e in experts) / len(experts))
                moved[layer].append(distances[-1])
            of_rows.append(max(math.exp(-sum(distances) / LAYERS), FLOOR))
        rows = [t - 1 for t in range(len(s)) if s.trained[t]]
        weights += [of_rows[t] for t in rows]
        new.append(torch.stack([log_probs[t, s.tokens[t + 1]] for t in rows]) if rows else torch.empty(0))
        # pi / (pi_old / weight) is the ratio times the weight.
        log_weights = torch.tensor([math.log(of_rows[t]) for t in rows], dtype=torch.float64)
        weighed.append(s.columns["old_log_probs"] - log_weights)
    loss = oracles.policy_loss("gspo", new, weighed, [s.advantage for s in made])
    names, parameters = zip(*((place.name, p) for place, p in named_parameters_of(policy)), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
    return ByHand(loss.item(), [sum(x) / len(x) for x in moved], sum(weights) / len(weights), found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_the_loop(layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    [expected] = run_distributed(by_hand, 1, "R2" in layout)
    slices: dict[str, dict[int, Tensor]] = {}
    places = {}
    for found in run_distributed(shifted, world_size, world_size, settings):
        assert found.loss == pytest.approx(expected.loss, rel=1e-10)
        assert found.shifts == pytest.approx(expected.shifts, rel=1e-10) and min(found.shifts) > 0.01
        assert found.weight == pytest.approx(expected.weight, rel=1e-10) and found.weight < 0.99
        assert 0 < found.floored < 1
        for place, gradient in found.gradients:
            places[place.name] = place
            slices.setdefault(place.name, {})[place.index] = gradient
    assert expected.gradients.keys() <= places.keys()
    for name, wanted in expected.gradients.items():
        place = places[name]
        whole = place.join([slices[name][i] for i in range(place.count)])[: len(wanted)]
        assert float((whole - wanted).abs().max()) < 1e-9 * float(wanted.abs().max()), name


def without_a_record(settings: tuple[str, ...]) -> tuple[float, list[Tensor]]:
    """(Mean weight, gradients) of an update on old log-probs whose experts were not recorded."""
    policy, algorithm = open_policy(1, *settings)
    loss = PolicyLoss(algorithm.objective, policy.groups, False)
    metrics = values(on_host(policy.update(batch_of(policy, sequences())[0], loss, lr=0.0)))
    return metrics.get("router/shift_weight", 1.0), [gradient.clone() for _, gradient in policy.gradients()]


def test_nothing_recorded_is_no_shift() -> None:
    """As in a step that goes on, on a rank without sequences."""
    [(_, expected)] = run_distributed(without_a_record, 1, SHIFT[1:])
    [(weight, gradients)] = run_distributed(without_a_record, 1, SHIFT)
    assert weight == 1 and len(gradients) > 10
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))
