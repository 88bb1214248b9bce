"""Levels: what has a ratio, a token or a sequence, and how it is computed.

R  response tokens of all sequences, packed end to end      S  sequences
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gspo_megatron.objective.dials import Level, table
from gspo_megatron.objective.segments import Segments

MEAN_WIDEST_CLIP = 0.1
"""The widest clip range that acts on a mean over the response.

log s is a mean of |y| token log-ratios. Where these have standard deviation sigma, log s has sigma / sqrt(|y|). An
update with sigma = 0.1 is already large; 0.1 is then three standard deviations of log s, even in responses of only ten
tokens. The 0.2 that is usual for token ratios is wider; the paper's 3e-4 and 4e-4, and the 3e-2 and 4e-2 that suit ten
tokens, are narrower.
"""

MEAN_CLIP_ADVICE = (
    f"the ratio is a mean over the response and stays within {MEAN_WIDEST_CLIP} of 1; usual: clip_low=3e-4, "
    "clip_high=4e-4, or 3e-2 and 4e-2 for responses of about ten tokens"
)


@dataclass(frozen=True)
class TokenLevel(Level):
    """log w_t = log pi(y_t) - log pi_old(y_t)                                                   (2507.18071 Eq. 3)"""

    name = "token"
    unit = "token"

    def log_ratio(self, log_ratio_R: Tensor, segments: Segments) -> Tensor:
        return log_ratio_R


@dataclass(frozen=True)
class SequenceMeanLevel(Level):
    """log s = (1 / |y|) sum_t log w_t, on every token of y                                      (2507.18071 Eq. 7)"""

    name = "sequence_mean"
    unit = "sequence"
    widest_clip = MEAN_WIDEST_CLIP
    clip_advice = MEAN_CLIP_ADVICE

    def log_ratio(self, log_ratio_R: Tensor, segments: Segments) -> Tensor:
        return segments.spread(segments.mean(log_ratio_R))


@dataclass(frozen=True)
class SequenceSumLevel(Level):
    """log r = sum_t log w_t = |y| log s, on every token of y. Its spread grows with the length of the response."""

    name = "sequence_sum"
    unit = "sequence"

    def log_ratio(self, log_ratio_R: Tensor, segments: Segments) -> Tensor:
        return segments.spread(segments.sum(log_ratio_R))


@dataclass(frozen=True)
class SequenceTokenLevel(Level):
    """log s_t = sg[log s] + log pi(y_t) - sg[log pi(y_t)]: the value of log s, the gradient of the token
    (2507.18071 Eq. 14)."""

    name = "sequence_token"
    unit = "token"
    widest_clip = MEAN_WIDEST_CLIP
    clip_advice = MEAN_CLIP_ADVICE

    def log_ratio(self, log_ratio_R: Tensor, segments: Segments) -> Tensor:
        frozen_R = log_ratio_R.detach()
        return segments.spread(segments.mean(frozen_R)) + (log_ratio_R - frozen_R)


LEVELS: dict[str, type[Level]] = table(TokenLevel, SequenceMeanLevel, SequenceSumLevel, SequenceTokenLevel)
