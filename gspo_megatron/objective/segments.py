"""Sums and means over packed sequences.

`Segments` alone knows where one response ends and the next begins, and it is all that context parallelism changes: the
tokens of one sequence are then spread over ranks, and `over_ranks` adds up each rank's partial sums, [S]. The lengths,
and with them `share_R` and the counts, remain those of whole sequences, so the ranks' shares of the loss add up.

    R  response tokens of all sequences, packed end to end      S  sequences
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gspo_megatron.base.tensors import on_device


@dataclass(frozen=True)
class Segments:
    """Which of the S sequences each of the R tokens belongs to.

    Sums over a sequence, forward and backward, are accumulated in float64 and rounded once: a response may have 1e5
    tokens, and GSPO depends on the fourth decimal of their mean. No method synchronises with the device.

    Attributes:
        lengths_S: tokens of each sequence on all ranks, int64; zero is allowed.
        index_R: the sequence of each of this rank's tokens, int64.
        num_sequences: sequences with at least one token. Empty ones contribute nothing.
        num_tokens: the sum of the lengths.
        over_ranks: adds up [S] partial sums over the ranks that share the sequences, forward and backward. None: this
            rank holds whole sequences.
    """

    lengths_S: Tensor
    index_R: Tensor
    num_sequences: int
    num_tokens: int
    over_ranks: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int] | Tensor,
        *,
        index_R: Tensor | None = None,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | None = None,
    ) -> Segments:
        """Segments of the given lengths, in order, on `device` (default: that of `lengths`, the CPU for a list).

        `index_R`, with `over_ranks`, where this rank holds only some of the tokens; without, all of them in order. A
        tensor on an accelerator costs one synchronisation, since the packed size must be known on the host.
        """
        if isinstance(lengths, Tensor):
            device = device or lengths.device
            lengths = lengths.tolist()
        assert all(length >= 0 for length in lengths), f"negative length in {lengths}"
        num_tokens = sum(lengths)
        lengths_S = on_device(torch.tensor(lengths, dtype=torch.int64), device or torch.device("cpu"))
        if index_R is None:
            index_R = torch.repeat_interleave(lengths_S, output_size=num_tokens)
        return cls(lengths_S, index_R, sum(length > 0 for length in lengths), num_tokens, over_ranks)

    @cached_property
    def share_R(self) -> Tensor:
        """1 / |y| of each token's sequence, [R] float64: the token's weight where every sequence has weight 1."""
        return 1.0 / self.lengths_S.double().index_select(0, self.index_R)

    def sum(self, values_R: Tensor) -> Tensor:
        """sum_t values_t of each sequence: [R] -> [S]. An empty sequence sums to 0."""
        sums_S = torch.zeros(self.lengths_S.shape, dtype=torch.float64, device=values_R.device)
        sums_S = sums_S.index_add(0, self.index_R, values_R.double())
        return (sums_S if self.over_ranks is None else self.over_ranks(sums_S)).to(values_R.dtype)

    def mean(self, values_R: Tensor) -> Tensor:
        """(1 / |y|) sum_t values_t of each sequence: [R] -> [S]. An empty sequence has mean 0."""
        return (self.sum(values_R.double()) / self.lengths_S.clamp(min=1)).to(values_R.dtype)

    def spread(self, values_S: Tensor) -> Tensor:
        """The value of each token's sequence: [S] -> [R]. An empty sequence's value, even NaN, reaches no token."""
        return values_S.double().index_select(0, self.index_R).to(values_S.dtype)
