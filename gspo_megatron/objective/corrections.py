"""Corrections for another sampler: a weight for every token, from the ratio of the old policy to what drew the token.

    rho_t = pi_old(y_t) / mu(y_t),    mu the sampler: an engine, another precision, a policy some updates older

The weight multiplies the clip's term, and has no gradient. A sequence has the geometric mean of its tokens' ratios,
exp(mean log rho_t); the product, exp(sum log rho_t), is the unbiased weight, of a variance that grows with the length,
and has a name of its own. Tokens of weight 0 still count in the denominators of the loss.

R  response tokens of all sequences
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.base.metrics import Metric
from gspo_megatron.objective.dials import Correction, Level, Tokens, table
from gspo_megatron.objective.levels import SequenceMeanLevel, SequenceSumLevel, TokenLevel
from gspo_megatron.objective.ratios import capped
from gspo_megatron.objective.segments import Segments


@dataclass(frozen=True)
class NoCorrection(Correction):
    """1"""

    name = "none"
    acts = False

    def weights(self, log_rho_R: Tensor, tokens: Tokens, segments: Segments) -> Tensor:
        return torch.ones_like(log_rho_R)


@dataclass(frozen=True)
class TokenTis(Correction):
    """min(rho, cap): truncated importance sampling                     (fengyao.notion.site/off-policy-rl; cap 2).

    Attributes:
        cap: above 0.

    Raises:
        ConfigError: a parameter out of range.
    """

    name = "token_tis"
    ratio_of: ClassVar[Level] = TokenLevel()
    cap: float = 2.0

    def __post_init__(self) -> None:
        if not self.cap > 0:  # written so that NaN fails
            raise ConfigError(f"correction.cap={self.cap}: the largest weight; set it above 0, such as 2")

    def weights(self, log_rho_R: Tensor, tokens: Tokens, segments: Segments) -> Tensor:
        return capped(self.ratio_of.log_ratio(log_rho_R, segments)).exp().clamp(max=self.cap)


@dataclass(frozen=True)
class SequenceTis(TokenTis):
    """As `token_tis`, of the geometric mean of a sequence."""

    name = "sequence_tis"
    ratio_of = SequenceMeanLevel()


@dataclass(frozen=True)
class SequenceSumTis(TokenTis):
    """As `token_tis`, of the product over a sequence."""

    name = "sequence_sum_tis"
    ratio_of = SequenceSumLevel()


@dataclass(frozen=True)
class TokenMis(Correction):
    """rho where floor <= rho <= cap, else 0: masked importance sampling       (richardli.xyz/rl-collapse).

    Attributes:
        floor, cap: 0 <= floor < cap.

    Raises:
        ConfigError: bounds that cross or are out of range.
    """

    name = "token_mis"
    ratio_of: ClassVar[Level] = TokenLevel()
    floor: float = 0.5
    cap: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.floor < self.cap:  # written so that NaN fails
            raise ConfigError(
                f"correction.floor={self.floor}, correction.cap={self.cap}: ratios between them are kept; set floor "
                "to 0 or more, below cap"
            )

    def weights(self, log_rho_R: Tensor, tokens: Tokens, segments: Segments) -> Tensor:
        rho_R = capped(self.ratio_of.log_ratio(log_rho_R, segments)).exp()
        return torch.where((rho_R >= self.floor) & (rho_R <= self.cap), rho_R, 0.0)


@dataclass(frozen=True)
class SequenceMis(TokenMis):
    """As `token_mis`, of the geometric mean of a sequence."""

    name = "sequence_mis"
    ratio_of = SequenceMeanLevel()


@dataclass(frozen=True)
class SequenceSumMis(TokenMis):
    """As `token_mis`, of the product over a sequence."""

    name = "sequence_sum_mis"
    ratio_of = SequenceSumLevel()


@dataclass(frozen=True)
class IcePop(TokenMis):
    """`token_mis` between 0.5 and 5                                                        (2510.18855, Ring-1T)."""

    name = "icepop"
    cap: float = 5.0


@dataclass(frozen=True)
class GeometricMask(Correction):
    """1 where low <= exp(mean log rho) <= high, else 0: a whole sequence is kept or left out, and none is weighed.

    Attributes:
        low, high: around 1, which no sequence of the policy itself leaves.

    Raises:
        ConfigError: bounds that cross, or do not enclose 1.
    """

    name = "geometric_mask"
    ratio_of: ClassVar[Level] = SequenceMeanLevel()
    low: float = 0.999
    high: float = 1.002

    def __post_init__(self) -> None:
        if not 0 <= self.low < 1 < self.high:  # written so that NaN fails
            raise ConfigError(
                f"correction.low={self.low}, correction.high={self.high}: the policy's own sequences have ratio 1; set "
                "low below 1 and high above"
            )

    def weights(self, log_rho_R: Tensor, tokens: Tokens, segments: Segments) -> Tensor:
        rho_R = capped(self.ratio_of.log_ratio(log_rho_R, segments)).exp()
        return ((rho_R >= self.low) & (rho_R <= self.high)).to(log_rho_R.dtype)


@dataclass(frozen=True)
class OffPolicyMask(Correction):
    """0 where A < 0 and mean(log mu - log pi) > delta, else 1            (2512.02556, DeepSeek-V3.2, off-policy mask).

    A bad response that the policy has already left, whether by updates or because the sampler is another, teaches
    nothing more.

    Attributes:
        delta: nats a token, 0 or more.

    Raises:
        ConfigError: a parameter out of range.
    """

    name = "off_policy_mask"
    ratio_of: ClassVar[Level] = SequenceMeanLevel()
    such_as = MappingProxyType({"delta": 0.1})
    delta: float

    def __post_init__(self) -> None:
        if not 0 <= self.delta < math.inf:  # written so that NaN fails
            raise ConfigError(f"correction.delta={self.delta}: a distance in nats a token; set it to 0 or more")

    def weights(self, log_rho_R: Tensor, tokens: Tokens, segments: Segments) -> Tensor:
        gone_R = -self.ratio_of.log_ratio(log_rho_R + tokens.log_ratio_R, segments)
        return torch.where((tokens.advantages_R < 0) & (gone_R > self.delta), torch.zeros_like(log_rho_R), 1.0)


NO_CORRECTION = NoCorrection()

CORRECTIONS: dict[str, type[Correction]] = table(
    NoCorrection,
    TokenTis,
    SequenceTis,
    SequenceSumTis,
    TokenMis,
    SequenceMis,
    SequenceSumMis,
    IcePop,
    GeometricMask,
    OffPolicyMask,
)

FAR = math.log(2)
POSITIONS = (0, 64, 256, 1024, 4096, 16384, 65536)
"""Where `drift_by_position` begins a new share of the tokens."""


def gap_to_sampler(old_log_probs_R: Tensor, sampler_log_probs_R: Tensor) -> tuple[Tensor, Tensor]:
    """log rho of every token, and whether it is known. A log-prob that is NaN or infinite has a ratio of 1: an engine
    gives such a number now and then, and one spoils a whole sequence."""
    gap_R = old_log_probs_R - sampler_log_probs_R
    known_R = gap_R.isfinite()
    return torch.where(known_R, gap_R, 0.0), known_R


def gap_metrics(gap_R: Tensor, known_R: Tensor) -> dict[str, Metric]:
    """Distance between sampler and old policy, over tokens that the sampler drew: k3 estimates of both divergences."""
    tokens, rho_R = known_R.sum(), capped(gap_R).exp()

    def mean(values_R: Tensor) -> Metric:
        return Metric(values_R.sum(dtype=torch.float64), tokens)

    return {
        "sampler/kl": mean(capped(gap_R).expm1() - gap_R),
        "sampler/kl_reverse": mean(rho_R * gap_R - capped(gap_R).expm1()),
        "sampler/far_fraction": mean(gap_R.abs() > FAR),
        "sampler/not_finite": Metric((~known_R).sum(), reduction="sum"),
    }


def drift_by_position(gap_R: Tensor, position_R: Tensor, longest: int) -> dict[str, Metric]:
    """Mean |log rho| of the tokens from 0, from 64, ... on, up to the next of POSITIONS. `longest` is the number of
    tokens of the longest sequence, known without asking the device."""
    found = {}
    for first, end in zip(POSITIONS, (*POSITIONS[1:], math.inf), strict=True):
        if first < longest:
            here_R = (position_R >= first) & (position_R < end)
            drift_R = torch.where(here_R, gap_R.abs(), 0.0)
            found[f"sampler/drift/from_{first}"] = Metric(drift_R.sum(dtype=torch.float64), here_R.sum())
    return found
