"""Accuracy and reward on held-out prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from gspo_megatron.base.batches import Rollout
from gspo_megatron.data.sources import PromptSource
from gspo_megatron.rollout.source import RolloutSource


@dataclass(frozen=True)
class Evaluation:
    """The most likely response to each of the first `size` prompts."""

    source: RolloutSource
    prompts: PromptSource
    size: int
    accuracy: Callable[[Rollout], float]

    def __call__(self) -> dict[str, float]:
        """Greedy accuracy, mean reward, and how long that took. Collective."""
        start = time.perf_counter()
        assert self.prompts.size is not None
        rollouts = self.source.greedy([self.prompts[i] for i in range(min(self.size, self.prompts.size))])
        return {
            "eval/accuracy": statistics.fmean(self.accuracy(r) for r in rollouts),
            "eval/reward": statistics.fmean(r.reward for r in rollouts),
            "time/eval_s": time.perf_counter() - start,
        }
