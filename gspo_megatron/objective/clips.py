"""Clips: each token's surrogate, and whether a bound is active. Those of weights.py complete the table.

R  response tokens of all sequences
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.objective.dials import Clip, Level, Surrogate, Tokens, table
from gspo_megatron.objective.ratios import capped
from gspo_megatron.objective.weights import BinaryKlMask, CappedWeight, GammaWeight, Reinforce, TotalVariationMask


@dataclass(frozen=True)
class PpoClip(Clip):
    """min(s A, clip(s, 1 - low, 1 + high) A) with s = exp(level(log_ratio))            (2507.18071 Eq. 2, 5 and 13),
    and for A < 0 at least ceiling * A                                                                  (1912.09729).

    min() is one-sided: A > 0 stops gaining above 1 + high, A < 0 stops below 1 - low; the other two sides are open.
    The gradient on log s of a response far outside:
        A > 0, log s -> +inf   0 (clipped)             A > 0, log s -> -inf   s A -> 0 (s itself vanishes)
        A < 0, log s -> -inf   0 (clipped)             A < 0, log s -> +inf   s A down to e^20 A, no further: `capped`
    The ceiling of a dual clip closes the last of them: a ratio beyond it is no longer pushed back.

    Attributes:
        low: in [0, 1).
        high: 0 or more; inf for no upper bound.
        ceiling: above 1; inf for none.

    Raises:
        ConfigError: a bound out of range.
    """

    name = "ppo"
    low: float
    high: float
    ceiling: float = math.inf

    def __post_init__(self) -> None:
        # Written so that NaN fails all three.
        if not 0 <= self.low < 1:
            raise ConfigError(f"clip_low={self.low}: the lowest ratio is 1 - clip_low; set it in [0, 1)")
        if not self.high >= 0:
            raise ConfigError(f"clip_high={self.high}: the highest ratio is 1 + clip_high; set it to 0 or more")
        if not self.ceiling > 1:
            raise ConfigError(f"clip.ceiling={self.ceiling}: an unchanged policy has ratio 1; set it above 1")

    def surrogate(self, tokens: Tokens, level: Callable[[Tensor], Tensor]) -> Surrogate:
        advantages_R = tokens.advantages_R
        ratio_R = capped(level(tokens.weighed_log_ratio_R)).exp()
        low_R = (ratio_R < 1 - self.low) & (advantages_R < 0)
        high_R = (ratio_R > 1 + self.high) & (advantages_R > 0)
        # min() by the decision. torch.minimum halves the gradient where both products round to the same number, which
        # happens on the open side of a bound, within an ulp or two of it.
        bounded_R = ratio_R.detach().clamp(1 - self.low, 1 + self.high)
        terms_R = torch.where(low_R | high_R, bounded_R, ratio_R) * advantages_R
        if self.ceiling < math.inf:
            over_R = (ratio_R > self.ceiling) & (advantages_R < 0)
            terms_R, high_R = torch.where(over_R, self.ceiling * advantages_R, terms_R), high_R | over_R
        return Surrogate(terms_R, ratio_R, low_R, high_R)

    @property
    def reach(self) -> float:
        return (self.low + self.high) / 2

    def warnings(self, level: Level) -> list[str]:
        bounds = {"clip_low": self.low, "clip_high": self.high}
        wide = [f"{name}={value}" for name, value in bounds.items() if value > level.widest_clip]
        return wide and [f"{', '.join(wide)}: too wide to act at level {level.name!r}, where {level.clip_advice}"]


@dataclass(frozen=True)
class LogClip(Clip):
    """s A with s = exp(level(min(l, clip(l, -low, high)) if A > 0 else max(l, clip(l, -low, high))))
                                                                                                (2507.20673, GMPO).

    l is the log-ratio of a token: each is bounded before the level takes their mean, where `ppo` bounds the mean. A
    bounded token has no gradient; the others of its response keep theirs.

    Attributes:
        low, high: 0 or more, distances of log-ratios from 0.

    Raises:
        ConfigError: a bound out of range.
    """

    name = "log"
    units = ("sequence",)
    unit_reason = "bounds each token's log-ratio before their mean"
    low: float
    high: float

    def __post_init__(self) -> None:
        for name, bound in self.parameters().items():
            if not bound >= 0:  # written so that NaN fails
                raise ConfigError(f"clip_{name}={bound}: log-ratios lie around 0; set it to 0 or more")

    def surrogate(self, tokens: Tokens, level: Callable[[Tensor], Tensor]) -> Surrogate:
        log_ratio_R, advantages_R = tokens.weighed_log_ratio_R, tokens.advantages_R
        low_R = (log_ratio_R < -self.low) & (advantages_R < 0)
        high_R = (log_ratio_R > self.high) & (advantages_R > 0)
        bounded_R = log_ratio_R.detach().clamp(-self.low, self.high)
        ratio_R = capped(level(torch.where(low_R | high_R, bounded_R, log_ratio_R))).exp()
        return Surrogate(ratio_R * advantages_R, ratio_R, low_R, high_R)


@dataclass(frozen=True)
class SoftGate(Clip):
    """(4 / tau) sigmoid(tau (s - 1)) A, tau = tau_pos where A > 0, else tau_neg                 (2511.20347, SAPO).

    A smooth clip: at s = 1 its slope is that of s A, and it falls to 0 on both sides. Nothing is ever cut off.

    Attributes:
        tau_pos, tau_neg: above 0; the higher, the narrower.

    Raises:
        ConfigError: a temperature out of range.
    """

    name = "soft_gate"
    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        for name, tau in self.parameters().items():
            if not 0 < tau < math.inf:
                raise ConfigError(f"clip.{name}={tau}: the gate is 4 / tau high; set it above 0")

    def surrogate(self, tokens: Tokens, level: Callable[[Tensor], Tensor]) -> Surrogate:
        ratio_R = capped(level(tokens.weighed_log_ratio_R)).exp()
        positive_R = tokens.advantages_R > 0
        tau_R = torch.full_like(ratio_R, self.tau_neg).masked_fill(positive_R, self.tau_pos)
        never_R = torch.zeros_like(positive_R)
        return Surrogate(
            4 / tau_R * torch.sigmoid(tau_R * (ratio_R - 1)) * tokens.advantages_R, ratio_R, never_R, never_R
        )


CLIPS: dict[str, type[Clip]] = table(
    PpoClip, LogClip, SoftGate, CappedWeight, GammaWeight, TotalVariationMask, BinaryKlMask, Reinforce
)
