"""From the terms of tokens to this micro-batch's share of their mean over the update.

R  response tokens of all sequences
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gspo_megatron.objective.segments import Segments


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
