"""The dials of the objective: small tables of functions, from which a row of `variants.VARIANTS` picks one each.

    loss = -aggregate(clip(level(log pi(y_t) - log pi_old(y_t))))

Every function works on one number per response token, [R]: a sequence-level quantity is repeated over the tokens of its
sequence. So a micro-batch, or a context-parallel rank, that holds some of the tokens computes its share of the loss by
the same code, an empty response takes part in nothing, having no token, and KL and entropy terms fit every row.

    R  response tokens of all sequences, packed one behind the other      S  sequences
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from gspo_megatron.objective.segments import Segments

# --- level: what a ratio is the ratio of ---


def token_level(log_ratio_R: Tensor, segments: Segments) -> Tensor:
    """log w_t = log pi(y_t) - log pi_old(y_t)                                                   (2507.18071 Eq. 3)"""
    return log_ratio_R


def sequence_mean_level(log_ratio_R: Tensor, segments: Segments) -> Tensor:
    """log s = (1 / |y|) sum_t log w_t, on every token of y                                      (2507.18071 Eq. 7)"""
    return segments.spread(segments.mean(log_ratio_R))


def sequence_sum_level(log_ratio_R: Tensor, segments: Segments) -> Tensor:
    """log r = sum_t log w_t = |y| log s, on every token of y. Its spread grows with the length of the response."""
    return segments.spread(segments.sum(log_ratio_R))


def sequence_token_level(log_ratio_R: Tensor, segments: Segments) -> Tensor:
    """log s_t = sg[log s] + log pi(y_t) - sg[log pi(y_t)]: the value of log s, the gradient of the token
    (2507.18071 Eq. 14)."""
    frozen_R = log_ratio_R.detach()
    return sequence_mean_level(frozen_R, segments) + (log_ratio_R - frozen_R)


class Level(NamedTuple):
    """`log_ratio(log_ratio_R, segments) -> [R]`; `unit`, "sequence" or "token", is what has one ratio of its own.

    `widest_clip`: a clip range beyond it hardly ever acts. log s is a mean of |y| token log-ratios; where these spread
    by sigma, it spreads by sigma / sqrt(|y|). Updates that move tokens by sigma = 0.1 are already large, and then, with
    responses as short as ten tokens, 0.1 is three standard deviations of log s. The 0.2 that is usual for token ratios
    lies beyond; the 3e-4 and 4e-4 of the paper, and the 3e-2 and 4e-2 that suit ten tokens, lie within.
    """

    log_ratio: Callable[[Tensor, Segments], Tensor]
    unit: str
    widest_clip: float


LEVELS = {
    "token": Level(token_level, "token", math.inf),
    "sequence_mean": Level(sequence_mean_level, "sequence", 0.1),
    "sequence_sum": Level(sequence_sum_level, "sequence", math.inf),
    "sequence_token": Level(sequence_token_level, "token", 0.1),
}


# --- clip: the surrogate of one token, and whether a bound holds it ---


# --- aggregate: from tokens to this micro-batch's share of the mean ---


# --- estimates of KL(pi || ref) from tokens that pi drew (joschu.net/blog/kl-approx.html) ---
