"""The dials of the objective: small tables of functions, from which a row of `variants.VARIANTS` picks one each.

    loss = -aggregate(clip(level(log pi(y_t) - log pi_old(y_t))))

Every function works on one number per response token, [R]: a sequence-level quantity is repeated over the tokens of its
sequence. So a micro-batch, or a context-parallel rank, that holds some of the tokens computes its share of the loss by
the same code, an empty response takes part in nothing, having no token, and KL and entropy terms fit every row.

    R  response tokens of all sequences, packed one behind the other      S  sequences
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from gspo_megatron.objective.segments import Segments
from gspo_megatron.types import ConfigError, did_you_mean

Row = TypeVar("Row")

MAX_LOG_RATIO = 20.0
"""exp() sees at most this (e^20 = 4.9e8), far beyond any ratio worth training on and far inside float32."""


def lookup(table: Mapping[str, Row], name: str, what: str) -> Row:
    """table[name], or ConfigError with the nearest right name."""
    if name not in table:
        raise ConfigError(f"{what} {name!r} is unknown{did_you_mean(name.lower(), table)}; known: {', '.join(table)}")
    return table[name]


def capped(log_ratio: Tensor) -> Tensor:
    """min(log_ratio, MAX_LOG_RATIO) with the gradient of log_ratio.

    Without the cap a runaway response gives inf, and inf * 0 = NaN for the whole batch. A plain clamp would be finite
    too, but has no gradient: the one response that most needs to be pushed back (A < 0, ratio grown out of all bounds,
    where min() takes the unclipped branch) would get no push. Here it gets the push of a response at the cap. There is
    no cap from below: exp() goes to 0 there, and its gradient with it.
    """
    return log_ratio - (log_ratio - MAX_LOG_RATIO).clamp(min=0).detach()


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


class Surrogate(NamedTuple):
    """Each token's term of the objective (to be maximised), its ratio, and where the lower or upper bound is the reason
    that the term has no gradient (bool)."""

    terms_R: Tensor
    ratio_R: Tensor
    clipped_low_R: Tensor
    clipped_high_R: Tensor


def ppo_clip(
    log_ratio_R: Tensor, advantages_R: Tensor, clip_low: float, clip_high: float, level: Callable[[Tensor], Tensor]
) -> Surrogate:
    """min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) with s = exp(level(log_ratio))    (2507.18071 Eq. 2, 5 and 13).

    min() is one-sided: A > 0 stops gaining above 1 + clip_high, A < 0 stops below 1 - clip_low, and the other two sides
    are open. What a response far outside gets as gradient on log s:
        A > 0, log s -> +inf   0 (clipped)             A > 0, log s -> -inf   s A -> 0 (s itself vanishes)
        A < 0, log s -> -inf   0 (clipped)             A < 0, log s -> +inf   s A down to e^20 A, no further: `capped`
    """
    ratio_R = capped(level(log_ratio_R)).exp()
    clipped_ratio_R = ratio_R.clamp(1 - clip_low, 1 + clip_high)
    return Surrogate(
        terms_R=torch.minimum(ratio_R * advantages_R, clipped_ratio_R * advantages_R),
        ratio_R=ratio_R,
        clipped_low_R=(ratio_R < 1 - clip_low) & (advantages_R < 0),
        clipped_high_R=(ratio_R > 1 + clip_high) & (advantages_R > 0),
    )


CLIPS = {"ppo": ppo_clip}
"""(log_ratio_R, advantages_R, clip_low, clip_high, level) -> Surrogate. A rule is handed the level as a function, and
so decides itself whether it bounds what goes into the level or what comes out."""


# --- aggregate: from tokens to this micro-batch's share of the mean ---


def sequence_mean(terms_R: Tensor, segments: Segments, num_sequences: int, num_tokens: int) -> Tensor:
    """(1 / num_sequences) sum_y (1 / |y|) sum_t terms_t, float64: every response counts the same."""
    return (terms_R * segments.share_R).sum() / num_sequences


def token_mean(terms_R: Tensor, segments: Segments, num_sequences: int, num_tokens: int) -> Tensor:
    """(1 / num_tokens) sum_y sum_t terms_t, float64: a response counts by its length."""
    return terms_R.sum(dtype=torch.float64) / num_tokens


class Aggregate(NamedTuple):
    """`share(terms_R, segments, num_sequences, num_tokens) -> scalar`; each `unit` ("sequence", "token") counts one."""

    share: Callable[[Tensor, Segments, int, int], Tensor]
    unit: str


AGGREGATES = {
    "sequence_mean": Aggregate(sequence_mean, "sequence"),
    "token_mean": Aggregate(token_mean, "token"),
}


# --- estimates of KL(pi || ref) from tokens that pi drew (joschu.net/blog/kl-approx.html) ---


def k1(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """log pi - log ref. Unbiased, of both signs, noisy.

    As a loss its gradient is that of log pi, whose mean over pi is zero: it does not pull towards ref. Only to watch.
    """
    return log_probs_R - ref_log_probs_R


def k2(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """(log pi - log ref)^2 / 2. Never negative, slightly biased.

    As a loss its gradient, (log pi - log ref) grad log pi, has the gradient of KL(pi || ref) as its mean over pi.
    """
    return (log_probs_R - ref_log_probs_R).square() / 2


def k3(log_probs_R: Tensor, ref_log_probs_R: Tensor) -> Tensor:
    """ref / pi - 1 - log(ref / pi). Unbiased, never negative                                    (2402.03300 Eq. 4).

    As a loss its gradient, (1 - ref / pi) grad log pi, has the gradient of KL(ref || pi), the other direction, as its
    mean over pi. A token that ref likes more than e^20 times as well as pi is pulled as one at e^20 (see `capped`).
    """
    log_ratio_R = ref_log_probs_R - log_probs_R
    # exp(x) - 1 in float32 would lose x^2 / 2, the whole of the result, where x is small.
    return capped(log_ratio_R).expm1() - log_ratio_R


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
