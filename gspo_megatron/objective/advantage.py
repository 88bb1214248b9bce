"""Group baselines: what a reward is worth beside the other rewards of the same prompt.

S  sequences      G  groups
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gspo_megatron.base.errors import DataError, lookup


def _unit_scale(sum_of_squares_S: Tensor, size_S: Tensor) -> Tensor:
    return torch.ones_like(sum_of_squares_S)


def _standard_deviation(sum_of_squares_S: Tensor, size_S: Tensor) -> Tensor:
    return (sum_of_squares_S / (size_S - 1)).sqrt()


EQUAL = 1e-6
"""Rewards of a group that differ by less than this share of their size are equal."""

BASELINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean_std": _standard_deviation,
    "mean": _unit_scale,
}
"""What R - mean is divided by, from each sequence's group: (sum of (R - mean)^2, group size) -> [S]."""


def group_advantages(
    rewards_S: Tensor | Sequence[float], group_ids_S: Tensor | Sequence[int], baseline: str = "mean_std"
) -> Tensor:
    """A_i = (R_i - mean(R)) / std(R) over the group of i ("mean_std", 2507.18071 Eq. 6), or R_i - mean(R) ("mean").

    std divides by G - 1: the rewards are a sample of what the prompt can earn, and other trainers do the same, so
    learning rates carry over (dividing by G would make every advantage sqrt(G / (G - 1)) times as large). Nothing is
    added to std. Rewards that agree to six digits are equal: 0.1 + 0.2 and 0.3 differ by rounding, and must not become
    +1 and -1. A group of equal rewards, a group of one included, teaches nothing: its advantages are exactly 0.

    Args:
        rewards_S: one reward per sequence, finite.
        group_ids_S: integers; equal ones form a group. In any order, of any size.
        baseline: a key of BASELINES.

    Returns:
        [S], in the dtype of the rewards, without gradient; computed in float64.

    Raises:
        DataError: a reward is NaN or infinite. ConfigError: unknown baseline.
    """
    rewards_S, group_ids_S = torch.as_tensor(rewards_S).detach(), torch.as_tensor(group_ids_S)
    assert rewards_S.shape == group_ids_S.shape, f"{tuple(rewards_S.shape)} rewards, {tuple(group_ids_S.shape)} groups"
    scale = lookup(BASELINES, baseline, "advantage baseline")
    bad = (~rewards_S.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"reward of sequence {bad[0]} is {rewards_S[bad[0]].item()} ({len(bad)} such): rewards must be finite, "
            "since one spoils its whole group; mend the reward function, or drop the rollout before this"
        )

    _, group_S, size_G = torch.unique(group_ids_S, return_inverse=True, return_counts=True)
    size_S, reward_S = size_G[group_S], rewards_S.double()

    def group_sum(values_S: Tensor) -> Tensor:
        return values_S.new_zeros(size_G.shape).index_add(0, group_S, values_S)[group_S]

    def group_extreme(which: str) -> Tensor:
        return reward_S.new_zeros(size_G.shape).scatter_reduce(0, group_S, reward_S, which, include_self=False)[group_S]

    lowest_S, highest_S = group_extreme("amin"), group_extreme("amax")
    varied_S = highest_S - lowest_S > EQUAL * torch.maximum(lowest_S.abs(), highest_S.abs())
    centred_S = reward_S - group_sum(reward_S) / size_S
    advantages_S = torch.where(varied_S, centred_S / scale(group_sum(centred_S.square()), size_S), 0.0)
    return advantages_S.to(torch.promote_types(rewards_S.dtype, torch.float32))
