"""Aggregates: from per-token terms to this micro-batch's share of their mean over the update.

R  response tokens of all sequences
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gspo_megatron.objective.dials import Aggregate, table
from gspo_megatron.objective.segments import Segments


@dataclass(frozen=True)
class SequenceMean(Aggregate):
    """(1 / num_sequences) sum_y (1 / |y|) sum_t terms_t: every response counts the same."""

    name = "sequence_mean"

    def share(self, terms_R: Tensor, segments: Segments, num_sequences: int, num_tokens: int) -> Tensor:
        return (terms_R * segments.share_R).sum() / num_sequences


@dataclass(frozen=True)
class TokenMean(Aggregate):
    """(1 / num_tokens) sum_y sum_t terms_t: a response counts by its length."""

    name = "token_mean"
    units = ("token",)
    unit_reason = "would weight it by the length of the response"

    def share(self, terms_R: Tensor, segments: Segments, num_sequences: int, num_tokens: int) -> Tensor:
        return terms_R.sum(dtype=torch.float64) / num_tokens


AGGREGATES: dict[str, type[Aggregate]] = table(SequenceMean, TokenMean)
