"""The tokens of one forward pass, as attention sees them.

Shapes: T packed tokens (under context parallel those of this rank's part), B sequences (rows), L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from gspo_megatron.base.batches import IntArray
from gspo_megatron.mcore.context_parallel import Part, part_of
from gspo_megatron.mcore.kv_cache import CacheWrite, KVCache


@dataclass
class PackedTokens(PackedSeqParams):
    """The tokens of one forward pass, as attention sees them. Built by `packed`, or by `CachedTokens` for a sampler."""

    positions_T: Tensor = None  # type: ignore[assignment]  # fields behind Megatron's own need a default
    slots_T: Tensor = None  # type: ignore[assignment]
    """Where each token of the whole pack (through a cache: of its prompts) stands in a [B, L] grid, flattened."""
    grid: tuple[int, int] = (0, 0)
    part: Part | None = None
    """Context parallel: how this rank's tokens fit into the whole pack. None: they are the whole pack."""
    cos_TD: Tensor | None = None
    sin_TD: Tensor | None = None
    cache: KVCache | None = None
    write: CacheWrite | None = None
    seen_BL: Tensor | None = None
    """Through a cache, the first B tokens continue B rows of it: the positions of its row that each attends to."""
    first_row: int = 0
    """The first of these rows; the others follow it."""


def packed(
    positions_T: Tensor, cu_seqlens: Tensor, max_seqlen: int, context: ProcessGroup | None = None
) -> PackedTokens:
    """Whole sequences, one behind the other; `cu_seqlens` [B + 1] are their borders. With `context`, the group of the
    context-parallel ranks, `positions_T` are those of this rank's part."""
    size = 1 if context is None else context.size()
    num_rows, num_tokens = cu_seqlens.numel() - 1, positions_T.numel() * size
    rows = torch.arange(num_rows, device=positions_T.device)
    row_T = torch.repeat_interleave(rows, cu_seqlens.diff(), output_size=num_tokens)
    inside_T = torch.arange(num_tokens, device=positions_T.device) - cu_seqlens[row_T]
    return PackedTokens(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        positions_T=positions_T,
        slots_T=row_T * max_seqlen + inside_T,
        grid=(num_rows, max_seqlen),
        part=None if size == 1 or context is None else part_of(cu_seqlens, max_seqlen, num_tokens, context),
    )


@dataclass
class CachedTokens:
    """The tokens of one forward through a cache, on the host: the new tokens of rows `first_row`, `first_row` + 1, ...
    at `positions` of these rows; whole prompts, each (its length, the rows that it fills); padding up to `num_tokens`,
    whose attention is 0."""

    first_row: int
    positions: IntArray
    prompts: Sequence[tuple[int, Sequence[int]]]
    num_tokens: int

    def arrays(self) -> list[IntArray]:
        """What the device has to hear, for `packed`."""
        new = np.arange(len(self.positions))
        inside = [np.arange(length) for length, _ in self.prompts]
        starts = np.cumsum([len(new), *map(len, inside)])
        longest = self._grid[1]
        copies = [(start + x, x, rows) for start, x, (_, rows) in zip(starts[:-1], inside, self.prompts, strict=True)]
        return [
            np.concatenate([self.positions, *inside, np.zeros(self.num_tokens - starts[-1], dtype=np.int64)]),
            np.concatenate([i * longest + x for i, x in enumerate(inside)] or [new[:0]]),
            np.concatenate([new, *(np.tile(source, len(rows)) for source, _, rows in copies)]),
            np.concatenate([self.first_row + new, *(np.repeat(rows, len(x)) for _, x, rows in copies)]),
            np.concatenate([self.positions, *(np.tile(x, len(rows)) for _, x, rows in copies)]),
        ]

    def packed(self, cache: KVCache, positions_T: Tensor, slots_T: Tensor, *write: Tensor) -> PackedTokens:
        """`arrays`, on the device."""
        length = int(self.positions.max(initial=-1)) + 1
        positions_B1 = positions_T[: len(self.positions), None]
        return PackedTokens(
            qkv_format="thd",
            positions_T=positions_T,
            slots_T=slots_T,
            grid=self._grid,
            cache=cache,
            write=CacheWrite(*write),
            seen_BL=torch.arange(length, device=positions_T.device) <= positions_B1,
            first_row=self.first_row,
        )

    @property
    def _grid(self) -> tuple[int, int]:
        return len(self.prompts), max((length for length, _ in self.prompts), default=0)
