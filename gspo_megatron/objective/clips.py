"""Clip rules: the surrogate of one token, and whether a bound holds it.

R  response tokens of all sequences
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gspo_megatron.objective.ratios import capped


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
