"""Baselines: advantages from the rewards of one prompt.

S  sequences      G  groups
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_megatron.base.errors import DataError, lookup
from gspo_megatron.objective.dials import Baseline, Groups, make_dial, table


@dataclass(frozen=True)
class GroupMeanStd(Baseline):
    """A_i = (R_i - mean(R)) / std(R)                                                            (2507.18071 Eq. 6)

    std divides by G - 1: the rewards are a sample, and other trainers do the same, so learning rates carry over
    (dividing by G would scale every advantage by sqrt(G / (G - 1))). No epsilon is added to std.
    """

    name = "mean_std"

    def advantages(self, rewards_S: Tensor, groups: Groups) -> Tensor:
        centred_S = rewards_S - groups.mean(rewards_S)
        return centred_S / (groups.sum(centred_S.square()) / (groups.size_S - 1)).sqrt()


@dataclass(frozen=True)
class GroupMean(Baseline):
    """A_i = R_i - mean(R)"""

    name = "mean"

    def advantages(self, rewards_S: Tensor, groups: Groups) -> Tensor:
        return rewards_S - groups.mean(rewards_S)


BASELINES: dict[str, type[Baseline]] = table(GroupMeanStd, GroupMean)

EQUAL = 1e-6
"""Rewards of a group are equal when they differ by at most this fraction of their magnitude."""


def group_advantages(
    rewards_S: Tensor | Sequence[float], group_ids_S: Tensor | Sequence[int], baseline: str | Baseline = "mean_std"
) -> Tensor:
    """A_i = baseline(R)_i over the group of i, and exactly 0 in a group of equal rewards.

    Such a group, a group of one included, gives no gradient. Rewards that agree to six digits are equal: 0.1 + 0.2 and
    0.3 differ by rounding, and must not become +1 and -1.

    Args:
        rewards_S: one reward per sequence, finite.
        group_ids_S: integers; sequences with equal ones form a group. Any order, groups of any size.
        baseline: a dial, or a key of BASELINES for one with its default parameters.

    Returns:
        [S], in the dtype of the rewards, without gradient; computed in float64.

    Raises:
        DataError: a reward is NaN or infinite.
        ConfigError: unknown baseline, or one that needs a parameter.
    """
    rewards_S, group_ids_S = torch.as_tensor(rewards_S).detach(), torch.as_tensor(group_ids_S)
    assert rewards_S.shape == group_ids_S.shape, f"{tuple(rewards_S.shape)} rewards, {tuple(group_ids_S.shape)} groups"
    if isinstance(baseline, str):
        baseline = make_dial(lookup(BASELINES, baseline, "advantage baseline"), {})
    bad = (~rewards_S.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise DataError(
            f"reward of sequence {bad[0]} is {rewards_S[bad[0]].item()} ({len(bad)} not finite in all): rewards must "
            "be finite, since one spoils its whole group; fix the reward function, or drop the rollout before this"
        )

    _, index_S, size_G = torch.unique(group_ids_S, return_inverse=True, return_counts=True)
    groups, reward_S = Groups(index_S, size_G[index_S], len(size_G)), rewards_S.double()

    def group_extreme(which: str) -> Tensor:
        return reward_S.new_zeros(size_G.shape).scatter_reduce(0, index_S, reward_S, which, include_self=False)[index_S]

    lowest_S, highest_S = group_extreme("amin"), group_extreme("amax")
    varied_S = highest_S - lowest_S > EQUAL * torch.maximum(lowest_S.abs(), highest_S.abs())
    advantages_S = torch.where(varied_S, baseline.advantages(reward_S, groups), 0.0)
    return advantages_S.to(torch.promote_types(rewards_S.dtype, torch.float32))
