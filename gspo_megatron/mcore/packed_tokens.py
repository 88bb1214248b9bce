"""The tokens of one forward pass, as attention sees them.

`packed` builds them from whole sequences, for training and scoring; `cached_tokens` from the newest tokens of rows in a
cache and from whole prompts, for a sampler.

Shapes: T packed tokens (under context parallel those of this rank's part), P prompt tokens among them, B sequences
(rows), L positions, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.distributed import ProcessGroup

from gspo_megatron.base.batches import IntArray
from gspo_megatron.mcore.context_parallel import Part, part_of
from gspo_megatron.mcore.kv_cache import CachedPrompts, CacheUse, CacheWrite, KVCache
from gspo_megatron.mcore.routing import Routing


@dataclass
class PackedTokens(PackedSeqParams):
    """What attention needs to know about one forward, passed down the model in place of Megatron's own parameters."""

    positions_T: Tensor = None  # type: ignore[assignment]  # fields after Megatron's own need a default
    slots_T: Tensor = None  # type: ignore[assignment]
    """The slot of each token of the whole pack in a flattened [B, L] grid. With a cache: of the prompts only."""
    grid: tuple[int, int] = (0, 0)
    part: Part | None = None
    """Context parallel: how this rank's tokens fit into the whole pack. None: they are the whole pack."""
    cos_TD: Tensor | None = None
    sin_TD: Tensor | None = None
    through_cache: CacheUse | None = None
    """None: the pack consists of whole sequences."""
    routing: Routing | None = None
    """What decides the experts of these tokens. None: the routers."""


def packed(
    positions_T: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    context: ProcessGroup | None = None,
    routing: Routing | None = None,
) -> PackedTokens:
    """Whole sequences, concatenated; `cu_seqlens` [B + 1] are their boundaries. With `context`, the group of the
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
        routing=routing,
    )


class CachedPrompt(NamedTuple):
    """A whole prompt of `length` tokens, and the rows of the cache that it fills."""

    length: int
    rows: Sequence[int]


class CachedTokens(NamedTuple):
    """The tokens of one forward through a cache, in the order of the pack: `num_continued` newest tokens of the rows
    from `first_row` on, whole prompts, and padding, whose attention is 0. `cached_tokens` makes the tensors on the
    host; `packed` needs them on the device."""

    positions_T: Tensor
    prompt_slots_P: Tensor
    prompt_grid: tuple[int, int]
    write: CacheWrite
    prompts: CachedPrompts
    first_row: int
    num_continued: int
    longest: int
    """Length of the longest continued row, its newest token included."""

    def packed(self, cache: KVCache, routing: Routing | None = None) -> PackedTokens:
        """What attention sees of these tokens, and what decides their experts."""
        position_B1 = self.positions_T[: self.num_continued, None]
        seen_BL = torch.arange(self.longest, device=self.positions_T.device) <= position_B1
        return PackedTokens(
            qkv_format="thd",
            positions_T=self.positions_T,
            slots_T=self.prompt_slots_P,
            grid=self.prompt_grid,
            through_cache=CacheUse(cache, self.write, self.first_row, seen_BL, self.prompts),
            routing=routing,
        )


def cached_tokens(
    first_row: int, positions_B: IntArray, prompts: Sequence[CachedPrompt], num_tokens: int
) -> CachedTokens:
    """Tokens at `positions_B` of the rows `first_row`, `first_row` + 1, ...; `prompts`; padding up to `num_tokens`."""
    continued = np.arange(len(positions_B))
    positions = [np.arange(prompt.length) for prompt in prompts]
    num_prompt_tokens = sum(prompt.length for prompt in prompts)
    longest_prompt = max((prompt.length for prompt in prompts), default=0)
    token_W, row_W, position_W = [continued], [first_row + continued], [positions_B]
    start = len(continued)
    for prompt, inside in zip(prompts, positions, strict=True):
        token_W.append(np.tile(start + inside, len(prompt.rows)))
        row_W.append(np.repeat(prompt.rows, prompt.length))
        position_W.append(np.tile(inside, len(prompt.rows)))
        start += prompt.length
    padding = np.zeros(num_tokens - len(continued) - num_prompt_tokens, dtype=np.int64)
    return CachedTokens(
        positions_T=_joined([positions_B, *positions, padding]),
        prompt_slots_P=_joined([continued[:0], *(i * longest_prompt + x for i, x in enumerate(positions))]),
        prompt_grid=(len(prompts), longest_prompt),
        write=CacheWrite(_joined(token_W), _joined(row_W), _joined(position_W)),
        prompts=CachedPrompts(
            torch.tensor([prompt.length for prompt in prompts], dtype=torch.long),
            torch.tensor([i for i, prompt in enumerate(prompts) for _ in prompt.rows], dtype=torch.long),
            torch.tensor([row for prompt in prompts for row in prompt.rows], dtype=torch.long),
        ),
        first_row=first_row,
        num_continued=len(continued),
        longest=int(positions_B.max(initial=-1)) + 1,
    )


def _joined(arrays: Sequence[IntArray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))
