"""Clips of the form weight * A * log pi(y_t): a policy gradient whose weight depends on the ratio, and has no gradient.

R  response tokens of all sequences
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.objective.dials import Clip, Level, Surrogate, Tokens
from gspo_megatron.objective.ratios import capped


class Weighted(Clip):
    """sg[weight(s)] A log pi(y_t), with s = exp(level(log_ratio))."""

    weighs_tokens = True

    @abstractmethod
    def weight(self, log_ratio_R: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """From log s, of at most 20: the weights, and where a lower and an upper bound act."""

    def surrogate(self, tokens: Tokens, level: Callable[[Tensor], Tensor]) -> Surrogate:
        frozen = tokens._replace(log_probs_R=tokens.log_probs_R.detach())
        log_ratio_R = capped(level(frozen.weighed_log_ratio_R))
        weight_R, low_R, high_R = self.weight(log_ratio_R, frozen)
        return Surrogate(weight_R * tokens.advantages_R * tokens.log_probs_R, log_ratio_R.exp(), low_R, high_R)


@dataclass(frozen=True)
class CappedWeight(Weighted):
    """clip(s, 1 - low, 1 + high)                                                          (2506.13585 Eq. 4-5, CISPO).

    A bound limits the weight of a token; no token loses its gradient.

    Attributes:
        low: in [0, 1]; 1 for no lower bound, as in the paper.
        high: 0 or more.

    Raises:
        ConfigError: a bound out of range.
    """

    name = "capped_weight"
    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low <= 1:  # both written so that NaN fails
            raise ConfigError(f"clip_low={self.low}: the smallest weight is 1 - clip_low; set it in [0, 1], 1 for none")
        if not self.high >= 0:
            raise ConfigError(f"clip_high={self.high}: the largest weight is 1 + clip_high; set it to 0 or more")

    def weight(self, log_ratio_R: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        ratio_R = log_ratio_R.exp()
        return ratio_R.clamp(1 - self.low, 1 + self.high), ratio_R < 1 - self.low, ratio_R > 1 + self.high

    def warnings(self, level: Level) -> list[str]:
        if self.low == 1:
            return []
        return [f"clip_low={self.low}: CISPO bounds the weight from above only; set clip_low=1"]


@dataclass(frozen=True)
class GammaWeight(Weighted):
    """e^lambda s^k e^(-lambda s), k and lambda by the sign of A                                (2602.10693, VESPO).

    1 at s = 1; 0 far below and far above. s is between 1e-8 and e^20.

    Attributes:
        k_pos, lambda_pos: where A >= 0; above 0.
        k_neg, lambda_neg: where A < 0; above 0.

    Raises:
        ConfigError: a parameter out of range.
    """

    name = "gamma"
    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        for name, value in self.parameters().items():
            if not 0 < value < math.inf:
                raise ConfigError(f"clip.{name}={value}: the weight must vanish on both sides of 1; set it above 0")

    def weight(self, log_ratio_R: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        positive_R = tokens.advantages_R >= 0
        k_R = torch.full_like(log_ratio_R, self.k_neg).masked_fill(positive_R, self.k_pos)
        lambda_R = torch.full_like(log_ratio_R, self.lambda_neg).masked_fill(positive_R, self.lambda_pos)
        log_R = log_ratio_R.clamp(min=math.log(1e-8))
        never_R = torch.zeros_like(positive_R)
        # exp(x) - 1 keeps the digits of a ratio near 1, where k log s and lambda (s - 1) nearly cancel.
        return (k_R * log_R - lambda_R * log_R.expm1()).exp(), never_R, never_R


@dataclass(frozen=True)
class TotalVariationMask(Weighted):
    """min(s, cap), and 0 where A > 0 and p - p_old > width, or A < 0 and p_old - p > width
                                                                                            (2602.04879, DPPO with TV).

    p is the probability of the token: a rare token may change its ratio a lot before its probability does.

    Attributes:
        width: above 0, at most 1.
        cap: above 1.

    Raises:
        ConfigError: a parameter out of range.
    """

    name = "tv_mask"
    units = ("token",)
    unit_reason = "looks at the probability of each token"
    width: float = 0.15
    cap: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:  # both written so that NaN fails
            raise ConfigError(f"clip.width={self.width}: probabilities differ by at most 1; set it above 0, at most 1")
        if not self.cap > 1:
            raise ConfigError(f"clip.cap={self.cap}: an unchanged policy has weight 1; set it above 1")

    def far(self, tokens: Tokens) -> Tensor:
        """Whether the token's probability has moved beyond the width, to either side."""
        return (_probability(tokens.log_probs_R) - _probability(tokens.old_log_probs_R)).abs() > self.width

    def weight(self, log_ratio_R: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        far_R = self.far(tokens)
        low_R = far_R & (tokens.log_ratio_R < 0) & (tokens.advantages_R < 0)
        high_R = far_R & (tokens.log_ratio_R > 0) & (tokens.advantages_R > 0)
        return torch.where(low_R | high_R, 0.0, log_ratio_R.exp().clamp(max=self.cap)), low_R, high_R

    @property
    def reach(self) -> float:
        return 2 * self.width


@dataclass(frozen=True)
class BinaryKlMask(TotalVariationMask):
    """As `tv_mask`, with the divergence of the outcomes "this token" and "another" in place of p - p_old:
    KL = p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))                    (2602.04879, DPPO with KL)."""

    name = "kl_mask"
    width: float = 0.05

    def far(self, tokens: Tokens) -> Tensor:
        # No token is likelier than 1 - TINY: p = 1 would be infinitely far from everything else.
        log_p_R, log_old_R = (x_R.clamp(max=math.log1p(-TINY)) for x_R in tokens[:2])
        old_R = log_old_R.exp()
        this_R = old_R * (log_old_R - log_p_R)
        another_R = -log_old_R.expm1() * ((-log_old_R.expm1()).log() - (-log_p_R.expm1()).log())
        return this_R + another_R > self.width


TINY = 1e-7
"""Largest number by which a probability may be rounded down; 1 - 1e-7 is not 1 in float32."""


def _probability(log_prob_R: Tensor) -> Tensor:
    return log_prob_R.clamp(max=0).exp()


@dataclass(frozen=True)
class Reinforce(Weighted):
    """1: the policy gradient. The ratio is measured only, so updates after the first are off-policy by its distance."""

    name = "reinforce"
    corrects = False

    def weight(self, log_ratio_R: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        never_R = torch.zeros_like(log_ratio_R, dtype=torch.bool)
        return torch.ones_like(log_ratio_R), never_R, never_R
