"""RSPO's factor of a ratio, by loops over tokens in plain Python (2510.23027)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.objective import PolicyObjective, Segments, resolve_variant

FLOOR = 0.8
LENGTHS = (5, 3, 4)
ADVANTAGES = (1.0, -1.5, 0.5)
LOW, HIGH = 0.1, 0.15
WIDTH = 0.02


def data() -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, old ones, shifts), [R]. Some shifts are beyond the floor, some 0."""
    draw = torch.Generator().manual_seed(3)
    new, old = (torch.randn(2, sum(LENGTHS), generator=draw, dtype=torch.float64) * 0.2 - 1).unbind()
    shift = torch.rand(sum(LENGTHS), generator=draw, dtype=torch.float64) * 0.4
    shift[::4] = 0
    return new, old, shift


def by_loops(name: str, new: list[Tensor], old: list[float], shift: list[float]) -> Tensor:
    """The loss: each token's ratio times max(exp(-shift), FLOOR), then what each algorithm does with its ratios."""
    total, at = torch.zeros((), dtype=torch.float64), 0
    for length, advantage in zip(LENGTHS, ADVANTAGES, strict=True):
        ratios = []
        for t in range(at, at + length):
            ratios.append(torch.exp(new[t] - old[t]) * max(math.exp(-shift[t]), FLOOR))
        at += length
        if name == "grpo":
            terms = [min(w * advantage, min(max(w, 1 - LOW), 1 + HIGH) * advantage) for w in ratios]
            value = sum(terms) / length
        elif name == "gspo":
            s = math.prod(ratios) ** (1 / length)
            value = min(s * advantage, min(max(s, 1 - LOW), 1 + HIGH) * advantage)
        else:
            held = []
            for w in ratios:
                clipped = min(max(w, math.exp(-LOW)), math.exp(HIGH))
                held.append(min(w, clipped) if advantage > 0 else max(w, clipped))
            value = math.prod(held) ** (1 / length) * advantage
        total = total - value / len(LENGTHS)
    return total


@pytest.mark.parametrize("name", ["grpo", "gspo", "gmpo"])
def test_value_and_gradient_are_those_of_the_loops(name: str) -> None:
    new, old, shift = data()
    variant = resolve_variant(name, dials={"clip.low": LOW, "clip.high": HIGH})
    advantages, segments = torch.tensor(ADVANTAGES), Segments.from_lengths(LENGTHS)
    ours = new.clone().requires_grad_()
    objective = PolicyObjective(variant, kl_coef=0.0, router_shift_floor=FLOOR)
    loss, metrics = objective(ours, old, advantages, segments, router_shift_T=shift)
    [gradient] = torch.autograd.grad(loss, ours)

    theirs = [x.clone().requires_grad_() for x in new]
    expected = by_loops(name, theirs, old.tolist(), shift.tolist())
    wanted = torch.stack([g if g is not None else old.new_zeros(()) for g in _gradients(expected, theirs)])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)
    assert (gradient != 0).sum() > 3

    weights = [max(math.exp(-x), FLOOR) for x in shift.tolist()]
    found = metrics["router/shift_weight"]
    assert found.total / found.weight == pytest.approx(sum(weights) / len(weights), rel=1e-12)
    assert metrics["router/shift_floor_fraction"].total == sum(w == FLOOR for w in weights) > 1
    # The distance to the old policy is not that of the weighted ratios.
    plain = PolicyObjective(variant, kl_coef=0.0)(new, old, advantages, segments)
    assert metrics["kl/old"] == plain.metrics["kl/old"] and loss.item() != plain.loss.item()


def masked_by_loops(name: str, new: list[Tensor], old: list[float], shift: list[float]) -> tuple[Tensor, int]:
    """(loss, masked tokens) of DPPO: the ratio with its factor weighs a token that the probabilities keep."""
    total, masked, at = torch.zeros((), dtype=torch.float64), 0, 0
    for length, advantage in zip(LENGTHS, ADVANTAGES, strict=True):
        for t in range(at, at + length):
            p, q = math.exp(new[t].item()), math.exp(old[t])
            divergence = abs(p - q)
            if name == "dppo_kl":
                divergence = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
            if divergence > WIDTH and (p - q) * advantage > 0:
                masked += 1
                continue
            total = total - p / q * max(math.exp(-shift[t]), FLOOR) * advantage * new[t] / sum(LENGTHS)
        at += length
    return total, masked


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_a_mask_of_probabilities_does_not_see_the_shift(name: str) -> None:
    """A factor below 1 is not a token that has become less likely."""
    new, old, shift = data()
    variant = resolve_variant(name, dials={"clip.width": WIDTH})
    inputs = old, torch.tensor(ADVANTAGES), Segments.from_lengths(LENGTHS)
    ours = new.clone().requires_grad_()
    loss, metrics = PolicyObjective(variant, router_shift_floor=FLOOR)(ours, *inputs, router_shift_T=shift)
    [gradient] = torch.autograd.grad(loss, ours)

    theirs = [x.clone().requires_grad_() for x in new]
    expected, masked = masked_by_loops(name, theirs, old.tolist(), shift.tolist())
    wanted = torch.stack([g if g is not None else old.new_zeros(()) for g in _gradients(expected, theirs)])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)
    plain = PolicyObjective(variant)(new, *inputs).metrics
    assert metrics["clip_fraction"].total == plain["clip_fraction"].total == masked > 0
    # Old log-probs that contain the factor would mask others.
    moved = old + shift.clamp(max=-math.log(FLOOR))
    folded = PolicyObjective(variant)(new, moved, *inputs[1:]).metrics
    assert folded["clip_fraction"].total != masked


def _gradients(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, inputs, allow_unused=True)


def test_without_a_shift_nothing_changes() -> None:
    new, old, shift = data()
    inputs = new, old, torch.tensor(ADVANTAGES), Segments.from_lengths(LENGTHS)
    with_it = PolicyObjective(resolve_variant("gspo"), router_shift_floor=FLOOR)(*inputs, router_shift_T=0 * shift)
    assert with_it.loss == PolicyObjective(resolve_variant("gspo"))(*inputs).loss
    assert with_it.metrics["router/shift_weight"].total == len(new)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"router_shift_floor=1.0: the least of a weight up to 1; try 0.8"):
        PolicyObjective(resolve_variant("gspo"), router_shift_floor=1.0)
    new, old, _ = data()
    with pytest.raises(ConfigError, match=r"router_shift_floor=0.8: pass router_shift_T, or set it to None"):
        objective = PolicyObjective(resolve_variant("gspo"), router_shift_floor=FLOOR)
        objective(new, old, torch.tensor(ADVANTAGES), Segments.from_lengths(LENGTHS))
