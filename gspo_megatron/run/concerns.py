"""Warnings of steps that teach the policy little or the wrong thing, from their rows of metrics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from gspo_megatron.base.batches import RolloutGroup
from gspo_megatron.base.errors import plural
from gspo_megatron.rewards.rewards import listed
from gspo_megatron.run.algorithm import Algorithm

STEPS_A_WARNING = 20
"""Of steps in a row with the same fault the first is warned of, and every one of this number."""
CLIPPED = 1 / 3
"""A clip that removes the gradient of more than this share of the tokens is too narrow for the updates."""
NOISY = 1 / 4
"""Ratios that differ from 1 by more than this share of the clip range, before anything was learned, are noisy."""


class Concerns:
    """Counts steps in a row, up to the last one: without a policy gradient, with a third of the tokens clipped, with
    ratios that are noise, with failed rewards."""

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.flat_steps = self.clipped_steps = self.noisy_steps = self.failed_steps = 0

    def of(self, row: dict[str, Any], groups: list[RolloutGroup]) -> Iterator[str]:
        """What to warn of after a step."""
        self.flat_steps = self.flat_steps + 1 if row["groups/zero_variance_fraction"] == 1 else 0
        if _is_due(self.flat_steps):
            yield (
                f"step {row['step']}: within each group all rewards are equal (in the first of {len(groups)}: "
                f"{groups[0].rollouts[0].reward:g}){_so_far(self.flat_steps)}, so every advantage is 0 and there is no "
                "policy gradient; use easier or harder prompts, a larger rollout.group_size or a finer-grained reward"
            )
        self.clipped_steps = self.clipped_steps + 1 if row["clip_fraction"] > CLIPPED else 0
        if _is_due(self.clipped_steps):
            yield (
                f"step {row['step']}: the clip removes the gradient of {row['clip_fraction']:.0%} of the tokens"
                f"{_so_far(self.clipped_steps)}: the band is too narrow for these updates; widen algorithm.clip_low "
                "and algorithm.clip_high, or lower optimizer.lr or algorithm.updates_per_rollout"
            )
        clip, noise = self.algorithm.variant.clip, row["ratio/first_update_noise"]
        self.noisy_steps = self.noisy_steps + 1 if noise > NOISY * clip.reach else 0
        if _is_due(self.noisy_steps):
            bounds = ", ".join(f"{name} {x:g}" for name, x in clip.parameters().items() if math.isfinite(x))
            yield (
                f"step {row['step']}: before its first update, ratios differ from 1 by up to {noise:.1e}, "
                f"{noise / clip.reach:.2g} times the clip range ({bounds}){_so_far(self.noisy_steps)}: rounding, not "
                f"what was learned, decides which responses are clipped; {self._advice()} (docs/numerics.md)"
            )
        failed = [r for g in groups for r in g.rollouts if r.reward_error]
        self.failed_steps = self.failed_steps + 1 if failed else 0
        if _is_due(self.failed_steps):
            yield (
                f"step {row['step']}: {plural(len(failed), 'rollout')} without a reward, which counts as 0"
                f"{_so_far(self.failed_steps)}. The first of them:\n{listed(failed)}"
            )

    def _advice(self) -> str:
        if self.algorithm.old_log_probs == "sampler":
            return (
                "algorithm.old_log_probs=rollout takes the old log-probs from the sampler, which rounds differently; "
                "use auto, which scores with the trainer, or precision.dtype=fp32"
            )
        return (
            "the same forward gave two results: look for a kernel that does not repeat (precision.deterministic=true)"
        )


def _is_due(steps: int) -> bool:
    return steps == 1 or (steps > 0 and steps % STEPS_A_WARNING == 0)


def _so_far(steps: int) -> str:
    return f", as in the {plural(steps - 1, 'step')} before" if steps > 1 else ""
