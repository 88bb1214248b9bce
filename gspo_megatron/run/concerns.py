"""Warnings of steps that teach the policy little or the wrong thing, from their rows of metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gspo_megatron.base.batches import RolloutGroup
from gspo_megatron.rewards.rewards import listed

STEPS_A_WARNING = 20
"""Of steps in a row with the same fault the first is warned of, and every one of this number."""
CLIPPED = 1 / 3
"""A clip that removes the gradient of more than this share of the tokens is too narrow for the updates."""


class Concerns:
    """Counts steps in a row, up to the last one: without a policy gradient, with a third of the tokens clipped, with
    failed rewards."""

    def __init__(self) -> None:
        self.flat_steps = self.clipped_steps = self.failed_steps = 0

    def of(self, row: dict[str, Any], groups: list[RolloutGroup]) -> Iterator[str]:
        """What to warn of after a step."""
        self.flat_steps = self.flat_steps + 1 if row["groups/zero_variance_fraction"] == 1 else 0
        if _is_due(self.flat_steps):
            yield (
                f"step {row['step']}: within each of the {len(groups)} groups all rewards are equal (in the first "
                f"group {groups[0].rollouts[0].reward:g}){_so_far(self.flat_steps)}, so every advantage is 0 and there "
                "is no policy gradient; use easier or harder prompts, a larger rollout.group_size or a finer-grained "
                "reward"
            )
        self.clipped_steps = self.clipped_steps + 1 if row["clip_fraction"] > CLIPPED else 0
        if _is_due(self.clipped_steps):
            yield (
                f"step {row['step']}: the clip removes the gradient of {row['clip_fraction']:.0%} of the tokens"
                f"{_so_far(self.clipped_steps)}: the band is too narrow for these updates; widen algorithm.clip_low "
                "and algorithm.clip_high, or lower optimizer.lr or algorithm.updates_per_rollout"
            )
        failed = [r for g in groups for r in g.rollouts if r.reward_error]
        self.failed_steps = self.failed_steps + 1 if failed else 0
        if _is_due(self.failed_steps):
            yield (
                f"step {row['step']}: {len(failed)} rollouts have no reward, which counts as 0"
                f"{_so_far(self.failed_steps)}. The first of them:\n{listed(failed)}"
            )


def _is_due(steps: int) -> bool:
    return steps == 1 or (steps > 0 and steps % STEPS_A_WARNING == 0)


def _so_far(steps: int) -> str:
    return f", as in the {steps - 1} steps before" if steps > 1 else ""
