"""Baselines: advantages from the rewards of one prompt, or of a batch.

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


@dataclass(frozen=True)
class LeaveOneOut(Baseline):
    """A_i = R_i - mean(R of the others) = G / (G - 1) (R_i - mean(R))                            (2402.14740, RLOO)"""

    name = "leave_one_out"

    def advantages(self, rewards_S: Tensor, groups: Groups) -> Tensor:
        return (rewards_S - groups.mean(rewards_S)) * groups.size_S / (groups.size_S - 1)


@dataclass(frozen=True)
class MeanNormalised(Baseline):
    """A_i = (R_i - mean(R)) / mean(R)                                                             (2602.02710, MaxRL)

    With rewards 0 and 1 it weighs a prompt by 1 / (its share of correct responses), as log-likelihood does.

    Raises:
        DataError: a negative reward, which could turn the sign of a group.
    """

    name = "mean_normalised"

    def advantages(self, rewards_S: Tensor, groups: Groups) -> Tensor:
        if bool((rewards_S < 0).any()):
            raise DataError(
                f"reward {rewards_S.min().item():g}: advantage mean_normalised divides by the mean reward of a group, "
                "so rewards must be 0 or more; shift them, or use another algorithm.advantage"
            )
        mean_S = groups.mean(rewards_S)
        return (rewards_S - mean_S) / mean_S


@dataclass(frozen=True)
class BatchMeanStd(GroupMeanStd):
    """A_i = (R_i - mean(R)) / std(R) over all rewards of the step, or over all returns of its tokens
    (2501.03262, REINFORCE++)"""

    name = "batch_mean_std"
    scope = "batch"
    of_returns = True


@dataclass(frozen=True)
class GroupMeanBatchStd(Baseline):
    """A_i = a_i / std(a) over all responses of the step, a_i = R_i - mean(R) of its group
    (2501.03262, REINFORCE++ with baseline)"""

    name = "mean_batch_std"

    def advantages(self, rewards_S: Tensor, groups: Groups) -> Tensor:
        centred_S = rewards_S - groups.mean(rewards_S)  # their mean over the batch is 0
        return centred_S / (centred_S.square().sum() / (len(centred_S) - 1)).sqrt()


@dataclass(frozen=True)
class NoBaseline(Baseline):
    """A_i = R_i"""

    name = "none"
    scope = "none"

    def advantages(self, rewards_S: Tensor, groups: Groups) -> Tensor:
        return rewards_S


BASELINES: dict[str, type[Baseline]] = table(
    GroupMeanStd, GroupMean, LeaveOneOut, MeanNormalised, BatchMeanStd, GroupMeanBatchStd, NoBaseline
)

EQUAL = 1e-6
"""Rewards of a group are equal when they differ by at most this fraction of their magnitude."""


def group_advantages(
    rewards_S: Tensor | Sequence[float], group_ids_S: Tensor | Sequence[int], baseline: str | Baseline = "mean_std"
) -> Tensor:
    """A_i = baseline(R)_i over the scope of the baseline, and exactly 0 where all rewards of that are equal.

    Such a group, a group of one included, gives no gradient. Rewards that agree to six digits are equal: 0.1 + 0.2 and
    0.3 differ by rounding, and must not become +1 and -1.

    Args:
        rewards_S: one reward per sequence, finite.
        group_ids_S: integers; sequences with equal ones form a group. Any order, groups of any size.
        baseline: a dial, or a key of BASELINES for one with its default parameters.

    Returns:
        [S], in the dtype of the rewards, without gradient; computed in float64.

    Raises:
        DataError: a reward is NaN or infinite, or one that the baseline cannot use.
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

    if baseline.scope == "batch":
        group_ids_S = torch.zeros_like(group_ids_S)
    _, index_S, size_G = torch.unique(group_ids_S, return_inverse=True, return_counts=True)
    groups, reward_S = Groups(index_S, size_G[index_S], len(size_G)), rewards_S.double()
    advantages_S = baseline.advantages(reward_S, groups)
    if baseline.scope != "none":
        advantages_S = torch.where(_varied(reward_S, groups), advantages_S, 0.0)
    return advantages_S.to(torch.promote_types(rewards_S.dtype, torch.float32))


def rewards_differ(rewards: Sequence[float]) -> bool:
    """Whether the rewards of one group differ, by the rule of `group_advantages`: if not, its advantages are 0."""
    return max(rewards) - min(rewards) > EQUAL * max(map(abs, rewards))


def _varied(rewards_S: Tensor, groups: Groups) -> Tensor:
    """Whether the rewards of each sequence's group differ."""

    def extreme(which: str) -> Tensor:
        of_group = rewards_S.new_zeros(groups.num_groups)
        return of_group.scatter_reduce(0, groups.index_S, rewards_S, which, include_self=False)[groups.index_S]

    lowest_S, highest_S = extreme("amin"), extreme("amax")
    return highest_S - lowest_S > EQUAL * torch.maximum(lowest_S.abs(), highest_S.abs())
