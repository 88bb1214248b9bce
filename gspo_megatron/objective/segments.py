"""Sums and means over packed sequences.

All that a sequence-level ratio needs to know about where one response ends and the next begins is in this class. So
context parallelism, which spreads the tokens of one sequence over ranks, has one thing to re-implement: `sum` gains an
all-reduce (with its backward). The lengths, and with them `share_R` and the counts, stay those of whole sequences.

    R  response tokens of all sequences, packed one behind the other      S  sequences
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which of the S sequences each of the R tokens belongs to.

    Sums over a sequence, forward and backward, are accumulated in float64 and rounded once: a response may have 1e5
    tokens, and GSPO looks at the fourth decimal of their mean. No method waits for the device.

    Attributes:
        lengths_S: tokens of each sequence, int64; zero is allowed.
        index_R: the sequence of each token, int64.
        num_sequences: sequences with at least one token. The empty ones take part in nothing.
        num_tokens: the sum of the lengths.
    """

    lengths_S: Tensor
    index_R: Tensor
    num_sequences: int
    num_tokens: int

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Tensor, *, device: torch.device | None = None) -> Segments:
        """Segments of the given lengths, in order, on `device` (that of `lengths` by default; a list's is the CPU).

        A list is free; a tensor on an accelerator costs one wait, since the packed size must be known on the host.
        """
        if isinstance(lengths, Tensor):
            device = device or lengths.device
            lengths = lengths.tolist()
        assert all(length >= 0 for length in lengths), f"negative length in {lengths}"
        num_tokens = sum(lengths)
        lengths_S = torch.tensor(lengths, dtype=torch.int64, device=device)
        index_R = torch.repeat_interleave(lengths_S, output_size=num_tokens)
        return cls(lengths_S, index_R, sum(length > 0 for length in lengths), num_tokens)

    @cached_property
    def share_R(self) -> Tensor:
        """1 / |y| of each token's sequence, [R] float64: what the token counts for where every sequence counts one."""
        return 1.0 / self.lengths_S.double().index_select(0, self.index_R)

    def sum(self, values_R: Tensor) -> Tensor:
        """sum_t values_t of each sequence: [R] -> [S]. An empty sequence sums to 0."""
        sums_S = torch.zeros(self.lengths_S.shape, dtype=torch.float64, device=values_R.device)
        return sums_S.index_add(0, self.index_R, values_R.double()).to(values_R.dtype)

    def mean(self, values_R: Tensor) -> Tensor:
        """(1 / |y|) sum_t values_t of each sequence: [R] -> [S]. An empty sequence has mean 0."""
        return (self.sum(values_R.double()) / self.lengths_S.clamp(min=1)).to(values_R.dtype)

    def spread(self, values_S: Tensor) -> Tensor:
        """The value of each token's sequence: [S] -> [R]. What an empty sequence holds, even NaN, reaches no token."""
        return values_S.double().index_select(0, self.index_R).to(values_S.dtype)
