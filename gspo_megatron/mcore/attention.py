"""Attention over packed tokens: RoPE by position, causal grouped-query attention inside each sequence, a KV cache.

Megatron's own local attention refuses packed sequences; this core replaces it in the layer spec. `PackedTokens` travels
down the model in the place of Megatron's `packed_seq_params`, so no layer in between knows about it.

Shapes: T packed tokens (under context parallel those of this rank's part), B sequences (rows), L positions, Q query
heads, K key/value heads of this tensor-parallel rank, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from gspo_megatron.mcore.context import Part, part_of, whole


class KVCache:
    """Keys and values of every layer on this rank for a fixed number of rows, [row, K, position, D], plus a scratch
    row.

    The scratch row takes what padding tokens write.
    """

    def __init__(self, num_rows: int, num_positions: int) -> None:
        self.num_rows, self.num_positions = num_rows, num_positions
        self.scratch_row = num_rows
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(keys, values) of a layer, allocated at its first use in the number format of `like` [T, K, D]."""
        if number not in self._layers:
            shape = (self.num_rows + 1, like.size(1), self.num_positions, like.size(2))
            self._layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[number]


@dataclass
class CacheWrite:
    """Token `source[i]` of the pack becomes position `positions[i]` of cache row `rows[i]`; a token may fill many
    rows."""

    source: Tensor
    rows: Tensor
    positions: Tensor


@dataclass
class PackedTokens(PackedSeqParams):
    """The tokens of one forward pass, as attention sees them. Built by `packed` or `decoding`."""

    positions_T: Tensor = None  # type: ignore[assignment]  # fields behind Megatron's own need a default
    slots_T: Tensor = None  # type: ignore[assignment]
    """Where each token of the whole pack stands in a [B, L] grid, flattened."""
    grid: tuple[int, int] = (0, 0)
    part: Part | None = None
    """Context parallel: how this rank's tokens fit into the whole pack. None: they are the whole pack."""
    cos_TD: Tensor | None = None
    sin_TD: Tensor | None = None
    cache: KVCache | None = None
    write: CacheWrite | None = None
    seen_BL: Tensor | None = None
    """Decoding, one new token a row: the positions of its row that it attends to. None: sequences attend within
    themselves."""


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


def decoding(positions_T: Tensor, rows_T: Tensor, cache: KVCache) -> PackedTokens:
    """One new token for each row in `rows_T`, at `positions_T` of that row."""
    write = CacheWrite(torch.arange(rows_T.numel(), device=rows_T.device), rows_T, positions_T)
    # Here, once a forward: on a device the longest position is a value to wait for.
    seen_BL = torch.arange(int(positions_T.max()) + 1, device=rows_T.device) <= positions_T[:, None]
    return PackedTokens(qkv_format="thd", positions_T=positions_T, cache=cache, write=write, seen_BL=seen_BL)


class Rotary:
    """RoPE angles: position p turns pair (i, i + D/2) by p * base^(-2i/D). arXiv 2104.09864, Eq. 15 (half-split
    pairs)."""

    def __init__(
        self, head_dim: int, base: float, num_positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        inverse_D2 = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float64, device=device), inverse_D2)
        angles = torch.cat([angles, angles], dim=1)
        self.cos, self.sin = angles.cos().to(precise), angles.sin().to(precise)

    def prepare(self, tokens: PackedTokens) -> None:
        """Looks the angles of this forward up once; every layer then uses the same rows."""
        if tokens.cos_TD is None:
            tokens.cos_TD, tokens.sin_TD = self.cos[tokens.positions_T], self.sin[tokens.positions_T]


def rotate(x_THD: Tensor, tokens: PackedTokens) -> Tensor:
    """x cos + rotate_half(x) sin, in the angles' precision, returned in x's."""
    assert tokens.cos_TD is not None and tokens.sin_TD is not None
    cos, sin = tokens.cos_TD[:, None, :], tokens.sin_TD[:, None, :]
    x = x_THD.to(cos.dtype)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x_THD.dtype)


class PackedAttention(torch.nn.Module):
    """Core attention: [T, Q, D] queries, [T, K, D] keys and values in, [T, Q * D] out.

    softmax(q k^T / sqrt(D)) v over the same sequence's earlier tokens. `fused`, where given, is the core attention that
    does this for whole packs (Transformer Engine's, whose context parallel splits sequences as ours); keys and values
    in a cache are always ours.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *, fused: ModuleSpec | type | None = None, **kwargs: Any
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.fused = fused and build_module(fused, config=config, layer_number=layer_number, **kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedTokens,
        **kwargs: Any,
    ) -> Tensor:
        tokens = packed_seq_params
        query, key = rotate(query, tokens), rotate(key, tokens)
        if tokens.cache is not None and tokens.write is not None:
            keys, values = tokens.cache.layer(self.layer_number, key)
            w = tokens.write
            keys[w.rows, :, w.positions] = key[w.source]
            values[w.rows, :, w.positions] = value[w.source]
            if tokens.seen_BL is not None:
                return _attend_cache(query, keys, values, w.rows, tokens.seen_BL)
        elif self.fused is not None:
            return self.fused(query, key, value, attention_mask, packed_seq_params=tokens, **kwargs)
        if tokens.part is not None:
            return _attend_part(query, key, value, tokens, tokens.part)
        return _attend_packed(query, key, value, tokens)


def _attend_packed(query: Tensor, key: Tensor, value: Tensor, tokens: PackedTokens) -> Tensor:
    """Packed tokens spread over a [B, L] grid. A row's empty places lie behind its tokens, where causality hides
    them."""
    query, key, value = (_spread(x, tokens.slots_T, tokens.grid) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return _collect(out, tokens.slots_T)


def _attend_part(query: Tensor, key: Tensor, value: Tensor, tokens: PackedTokens, part: Part) -> Tensor:
    """The same where this rank holds two chunks of every sequence: keys and values of all ranks are gathered (as in
    2407.21783 Section 3.3.2; grouped queries make them few), and each chunk of queries meets the keys up to its end."""
    both = whole(torch.cat([key, value], dim=-1), part)
    key, value = (_spread(x, tokens.slots_T, tokens.grid) for x in both.chunk(2, dim=-1))
    out = query.new_zeros(query.size(0), query.size(1) * query.size(2))
    for chunk in part.chunks:
        num_queries, num_keys = chunk.seen.shape[-2:]
        rows = F.scaled_dot_product_attention(
            _spread(query[chunk.tokens], chunk.slots, (tokens.grid[0], num_queries)),
            key[:, :, :num_keys],
            value[:, :, :num_keys],
            attn_mask=chunk.seen,
            enable_gqa=True,
        )
        out = out.index_copy(0, chunk.tokens, _collect(rows, chunk.slots))
    return out


def _spread(x_THD: Tensor, slots_T: Tensor, grid: tuple[int, int]) -> Tensor:
    """[T, H, D] -> [B, H, L, D], zeros where no token stands."""
    num_rows, length = grid
    spread = x_THD.new_zeros(num_rows * length, *x_THD.shape[1:]).index_copy(0, slots_T, x_THD)
    return spread.view(num_rows, length, *x_THD.shape[1:]).transpose(1, 2)


def _collect(x_BHLD: Tensor, slots_T: Tensor) -> Tensor:
    """[B, H, L, D] -> [T, H * D]."""
    return x_BHLD.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, slots_T)


def _attend_cache(query: Tensor, keys: Tensor, values: Tensor, rows: Tensor, seen_BL: Tensor) -> Tensor:
    """One query for each of `rows`, [B, Q, D], against the positions of that cache row that it may see."""
    length = seen_BL.size(1)
    out = F.scaled_dot_product_attention(
        query.unsqueeze(2),
        keys[rows, :, :length],
        values[rows, :, :length],
        attn_mask=seen_BL[:, None, None, :],
        enable_gqa=True,
    )
    return out.flatten(1)


def prompts_into_cache(
    lengths: Sequence[int], rows: Sequence[Sequence[int]], cache: KVCache, tokens: PackedTokens
) -> None:
    """Makes a forward over packed prompts fill the cache: prompt i, of `lengths[i]` tokens, goes to every row in
    `rows[i]`."""
    source: list[int] = []
    to_row: list[int] = []
    to_position: list[int] = []
    start = 0
    for length, targets in zip(lengths, rows, strict=True):
        for row in targets:
            source.extend(range(start, start + length))
            to_row.extend([row] * length)
            to_position.extend(range(length))
        start += length
    device = tokens.positions_T.device
    tokens.cache = cache
    tokens.write = CacheWrite(
        *(torch.tensor(x, dtype=torch.long, device=device) for x in (source, to_row, to_position))
    )
