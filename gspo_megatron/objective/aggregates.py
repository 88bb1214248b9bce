"""Aggregates: from per-token terms to this micro-batch's share of their mean over the update.

R  response tokens of all sequences
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from gspo_megatron.base.errors import ConfigError
from gspo_megatron.objective.dials import Aggregate, table
from gspo_megatron.objective.segments import Segments

BY_LENGTH = "would weight it by the length of the response, as the row 'luspo' does on purpose"


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
    unit_reason = BY_LENGTH

    def share(self, terms_R: Tensor, segments: Segments, num_sequences: int, num_tokens: int) -> Tensor:
        return terms_R.sum(dtype=torch.float64) / num_tokens


@dataclass(frozen=True)
class SequenceSum(Aggregate):
    """(1 / num_sequences) sum_y sum_t terms_t: |y| times `sequence_mean`.

    Of token ratios it is the gradient of log pi(y), with no mean over the response. Of a sequence's ratio it is
    |y| s A, the length weight of LUSPO                                                                (2602.05261).
    """

    name = "sequence_sum"

    def share(self, terms_R: Tensor, segments: Segments, num_sequences: int, num_tokens: int) -> Tensor:
        return terms_R.sum(dtype=torch.float64) / num_sequences


@dataclass(frozen=True)
class ConstantLength(Aggregate):
    """(1 / num_sequences) sum_y (1 / length) sum_t terms_t, the same length for all       (2503.20783, Dr. GRPO).

    Attributes:
        length: tokens, above 0. A run takes rollout.max_new_tokens.

    Raises:
        ConfigError: a length out of range.
    """

    name = "constant_length"
    units = ("token",)
    unit_reason = BY_LENGTH
    follows = MappingProxyType({"length": "rollout.max_new_tokens"})
    length: float

    def __post_init__(self) -> None:
        if not 0 < self.length < math.inf:
            raise ConfigError(f"aggregate.length={self.length}: a sum is divided by it; set it above 0")

    def share(self, terms_R: Tensor, segments: Segments, num_sequences: int, num_tokens: int) -> Tensor:
        return terms_R.sum(dtype=torch.float64) / (num_sequences * self.length)


AGGREGATES: dict[str, type[Aggregate]] = table(SequenceMean, TokenMean, SequenceSum, ConstantLength)
