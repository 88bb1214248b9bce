"""The learning rate of every update."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gspo_megatron.config.sections import OptimizerConfig

SHAPES = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}
"""optimizer.lr_decay: the fraction of lr - min_lr that is left after this fraction of the decay."""


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up, then constant, or a decay that would reach min_lr with the update after the run's last
    (`num_updates`): a rate of 0 would waste an update."""

    settings: OptimizerConfig
    num_updates: int

    def __call__(self, update: int) -> float:
        """The rate of update 0, 1, ..., counted from the first RL step."""
        o = self.settings
        if update < o.lr_warmup_updates:
            return o.lr * (update + 1) / o.lr_warmup_updates
        if o.lr_decay == "constant":
            return o.lr
        progress = min(1.0, (update - o.lr_warmup_updates) / max(1, self.num_updates - o.lr_warmup_updates))
        return o.min_lr + (o.lr - o.min_lr) * SHAPES[o.lr_decay](progress)
