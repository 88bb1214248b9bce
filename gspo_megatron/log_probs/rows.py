"""The scored rows of a micro-batch: which they are, where their hidden states are, and how their gradients return.

All of it is decided on the host, before the first matmul. Rows are processed chunk by chunk. With sequence parallelism
every rank holds a contiguous part of the rows; a chunk then takes an equal range of each rank's scored ones, so that
one reduce-scatter returns the chunk's gradients to their owners while other matmuls run.

Shape suffixes: N rows, n scored ones in the order of the chunks, b some of one chunk, m this rank's part of them, t
ranks, H hidden size. Indices are int64 on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gspo_megatron.base.tensors import on_device
from gspo_megatron.log_probs.shards import Shards


class Chunk(NamedTuple):
    """Rows `rows` of the n. With sequence parallelism they are the scored rows `start` to `stop` of every rank."""

    rows: slice
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self.rows.stop - self.rows.start


@dataclass(frozen=True)
class Rows:
    """`order_n`: the scored rows among the N. `source_n`: their positions in what `gather` returns.

    `counts` and `own_m` where the ranks hold different rows: the number of scored ones on each rank, and which of this
    rank's rows are scored. None where each rank holds all rows.
    """

    shards: Shards
    order_n: Tensor
    source_n: Tensor
    counts: list[int] | None = None
    own_m: Tensor | None = None

    @classmethod
    def of(cls, is_scored_N: Tensor, shards: Shards, *, sequence_parallel: bool) -> Rows:
        """`is_scored_N` is on the host and the same on all ranks."""
        order_n = is_scored_N.nonzero().flatten()
        if not (sequence_parallel and shards.size > 1 and len(order_n)):
            return cls(shards, order_n, order_n)
        is_scored_tN = is_scored_N.view(shards.size, -1)
        counts = is_scored_tN.sum(1)
        # The k-th scored row of every rank, then the next: so a chunk takes an equal range of each.
        place_n, rank_n = (torch.arange(int(counts.max()))[:, None] < counts).nonzero().unbind(1)
        first_of_rank = counts.cumsum(0) - counts
        return cls(
            shards,
            order_n[first_of_rank[rank_n] + place_n],
            rank_n * counts.max() + place_n,
            counts.tolist(),
            is_scored_tN[shards.rank].nonzero().flatten(),
        )

    def __len__(self) -> int:
        return len(self.order_n)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """All rows, in order; each chunk has at most `size` of them, or one of every rank."""
        if self.counts is None:
            for start in range(0, len(self), size):
                stop = min(start + size, len(self))
                yield Chunk(slice(start, stop), start, stop)
            return
        most, first = max(self.counts), 0
        step = max(1, size // self.shards.size)
        for start in range(0, most, step):
            stop = min(start + step, most)
            rows = sum(min(max(count, start), stop) - start for count in self.counts)
            yield Chunk(slice(first, first + rows), start, stop)
            first += rows

    def gather(self, hidden_NH: Tensor) -> Tensor:
        """What `source_n` points into: the hidden states themselves or, padded to equal lengths, the scored ones of all
        ranks."""
        if self.counts is None or self.own_m is None:
            return hidden_NH
        padded_H = hidden_NH.new_zeros((max(self.counts), hidden_NH.shape[1]))
        padded_H[: len(self.own_m)] = hidden_NH.index_select(0, on_device(self.own_m, hidden_NH.device))
        return self.shards.gather(padded_H).flatten(0, 1)

    def take(self, gathered_H: Tensor, index_b: Tensor) -> Tensor:
        """The hidden states of rows `index_b` of the n, without a copy where they are contiguous."""
        source_b = self.source_n[index_b]
        if self.counts is None and len(source_b) and int(source_b[-1] - source_b[0]) == len(source_b) - 1:
            return gathered_H[int(source_b[0]) : int(source_b[-1]) + 1]
        return gathered_H.index_select(0, on_device(source_b, gathered_H.device))


class GradientReturn:
    """Returns the gradients of hidden states to their rows, summed over the ranks and rounded once. One chunk is in
    flight at a time, while the caller computes."""

    def __init__(self, rows: Rows, hidden_NH: Tensor) -> None:
        self.rows, self.d_hidden_NH = rows, torch.zeros_like(hidden_NH)
        self._under_way: tuple[Any, Tensor, Tensor, Tensor] | None = None

    def send(self, chunk: Chunk, index_b: Tensor, d_hidden_bH: Tensor) -> None:
        """Starts to send the chunk's rows `index_b` (of the n). Collective: every rank sends the same rows."""
        self._arrive()
        rows, shards = self.rows, self.rows.shards
        if rows.counts is None or rows.own_m is None:
            self._under_way = shards.start_sum(d_hidden_bH), d_hidden_bH, d_hidden_bH, rows.order_n[index_b]
            return
        source_b, most, length = rows.source_n[index_b], max(rows.counts), chunk.stop - chunk.start
        at_b = source_b // most * length + source_b % most - chunk.start
        all_tH = d_hidden_bH.new_zeros((shards.size * length, d_hidden_bH.shape[1]))
        all_tH.index_copy_(0, on_device(at_b, all_tH.device), d_hidden_bH)
        own_H = all_tH.new_empty((length, all_tH.shape[1]))
        # What is being sent must stay in memory until it is sent.
        self._under_way = shards.start_scatter(own_H, all_tH), all_tH, own_H, rows.own_m[chunk.start : chunk.stop]

    def finish(self) -> Tensor:
        """The gradient of this rank's hidden states; 0 in rows that were not sent."""
        self._arrive()
        return self.d_hidden_NH

    def _arrive(self) -> None:
        if self._under_way is None:
            return
        work, _, d_hidden_mH, at_m = self._under_way
        if work is not None:
            work.wait()
        d_hidden_mH = d_hidden_mH[: len(at_m)].to(self.d_hidden_NH.dtype)
        self.d_hidden_NH.index_copy_(0, on_device(at_m, self.d_hidden_NH.device), d_hidden_mH)
        self._under_way = None
