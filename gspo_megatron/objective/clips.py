"""Clips: each token's surrogate, and whether a bound is active.

R  response tokens of all sequences
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.objective.dials import Clip, Level, Surrogate, table
from gspo_megatron.objective.ratios import capped


@dataclass(frozen=True)
class PpoClip(Clip):
    """min(s A, clip(s, 1 - low, 1 + high) A) with s = exp(level(log_ratio))            (2507.18071 Eq. 2, 5 and 13).

    min() is one-sided: A > 0 stops gaining above 1 + high, A < 0 stops below 1 - low; the other two sides are open.
    The gradient on log s of a response far outside:
        A > 0, log s -> +inf   0 (clipped)             A > 0, log s -> -inf   s A -> 0 (s itself vanishes)
        A < 0, log s -> -inf   0 (clipped)             A < 0, log s -> +inf   s A down to e^20 A, no further: `capped`

    Attributes:
        low: in [0, 1).
        high: 0 or more; inf for no upper bound.

    Raises:
        ConfigError: a bound out of range.
    """

    name = "ppo"
    low: float
    high: float

    def __post_init__(self) -> None:
        # Written so that NaN fails both.
        if not 0 <= self.low < 1:
            raise ConfigError(f"clip_low={self.low}: the lowest ratio is 1 - clip_low; set it in [0, 1)")
        if not self.high >= 0:
            raise ConfigError(f"clip_high={self.high}: the highest ratio is 1 + clip_high; set it to 0 or more")

    def surrogate(self, log_ratio_R: Tensor, advantages_R: Tensor, level: Callable[[Tensor], Tensor]) -> Surrogate:
        ratio_R = capped(level(log_ratio_R)).exp()
        low_R = (ratio_R < 1 - self.low) & (advantages_R < 0)
        high_R = (ratio_R > 1 + self.high) & (advantages_R > 0)
        # min() by the decision. torch.minimum halves the gradient where both products round to the same number, which
        # happens on the open side of a bound, within an ulp or two of it.
        bounded_R = ratio_R.detach().clamp(1 - self.low, 1 + self.high)
        return Surrogate(
            terms_R=torch.where(low_R | high_R, bounded_R, ratio_R) * advantages_R,
            ratio_R=ratio_R,
            clipped_low_R=low_R,
            clipped_high_R=high_R,
        )

    @property
    def reach(self) -> float:
        return (self.low + self.high) / 2

    def warnings(self, level: Level) -> list[str]:
        wide = [f"clip_{name}={value}" for name, value in self.parameters().items() if value > level.widest_clip]
        return wide and [f"{', '.join(wide)}: too wide to act at level {level.name!r}, where {level.clip_advice}"]


CLIPS: dict[str, type[Clip]] = table(PpoClip)
