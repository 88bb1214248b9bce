"""The attention core: RoPE by position, then causal grouped-query attention inside each sequence.

Megatron's own local attention rejects packed sequences; this core replaces it in the layer spec. `PackedTokens` is
passed down the model as Megatron's `packed_seq_params`, so the layers in between need no change.

Shapes: T packed tokens (under context parallel those of this rank's part), B sequences (rows), L positions, Q query
heads, K key/value heads of this tensor-parallel rank, D head dimension, Dv that of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from gspo_megatron.mcore.context_parallel import Part, whole
from gspo_megatron.mcore.kv_cache import CacheUse
from gspo_megatron.mcore.packed_tokens import PackedTokens
from gspo_megatron.models.rope import Rope


class Rotary:
    """RoPE angles: position p turns pair (i, i + D/2) by p * rope.inverse_D2[i]; cosines and sines have the factor
    rope.factor."""

    def __init__(self, rope: Rope, num_positions: int, device: torch.device, dtype: torch.dtype) -> None:
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        positions = torch.arange(num_positions, dtype=torch.float64, device=device)
        angles = torch.outer(positions, rope.inverse_D2.to(device))
        angles = torch.cat([angles, angles], dim=1)
        self.cos, self.sin = ((turned * rope.factor).to(precise) for turned in (angles.cos(), angles.sin()))

    def prepare(self, tokens: PackedTokens) -> None:
        """Looks up the angles of this forward once; every layer then uses the same rows."""
        if tokens.cos_TD is None:
            tokens.cos_TD, tokens.sin_TD = self.cos[tokens.positions_T], self.sin[tokens.positions_T]


def rotate(x_THD: Tensor, tokens: PackedTokens) -> Tensor:
    """x cos + rotate_half(x) sin, computed in the precision of the angles, returned in that of x. Dimensions beyond
    those that have angles stay as they are."""
    assert tokens.cos_TD is not None and tokens.sin_TD is not None
    cos, sin = tokens.cos_TD[:, None, :], tokens.sin_TD[:, None, :]
    if (width := cos.size(-1)) < x_THD.size(-1):
        return torch.cat([rotate(x_THD[..., :width], tokens), x_THD[..., width:]], dim=-1)
    x = x_THD.to(cos.dtype)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x_THD.dtype)


class PackedAttention(torch.nn.Module):
    """Core attention: [T, Q, D] queries, [T, K, D] keys and [T, K, Dv] values in, [T, Q * Dv] out.

    softmax(q k^T * scale) v over the earlier tokens of the same sequence; `softmax_scale` None is 1 / sqrt(D). Where
    `config` gives the layer a window, over the last window_size[0] + 1 of them; with its softmax_type `learnable`, each
    head has a sink s, and its weights are softmax([q k^T * scale, s]) without the last. `rotates`: queries and keys
    come without RoPE. `fused`, if given, is the core attention that computes this for packs of whole sequences
    (Transformer Engine's, which splits sequences over context-parallel ranks as this package does); attention over a
    cache is always computed here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        fused: ModuleSpec | type | None = None,
        rotates: bool = True,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.layer_number, self.rotates, self.scale = layer_number, rotates, softmax_scale
        if "v_channels" in kwargs:
            # The kernels for packed sequences want values as wide as keys; `_fused` pads them.
            kwargs["v_channels"] = kwargs["k_channels"]
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None
        self.softmax_offset = sinks_of(config) if config.softmax_type == "learnable" else None
        self.fused = fused and build_module(
            fused, config=config, layer_number=layer_number, softmax_scale=softmax_scale, **kwargs
        )

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
        if self.rotates:
            query, key = rotate(query, tokens), rotate(key, tokens)
        if tokens.through_cache is not None:
            return self._attend_cached(query, key, value, tokens, tokens.through_cache)
        if self.fused is not None:
            return self._fused(query, key, value, attention_mask, packed_seq_params=tokens, **kwargs)
        if tokens.part is not None:
            return attend_part(query, key, value, tokens, tokens.part, self._attend)
        return attend_packed(query, key, value, tokens, self._attend)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None) -> Tensor:
        return attend(query, key, value, seen, self.scale, self.window, self.softmax_offset)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert self.fused is not None
        width, missing = value.size(-1), key.size(-1) - value.size(-1)
        out = self.fused(query, key, F.pad(value, (0, missing)) if missing else value, *args, **kwargs)
        return out.unflatten(-1, (-1, width + missing))[..., :width].flatten(-2) if missing else out

    def _attend_cached(self, query: Tensor, key: Tensor, value: Tensor, tokens: PackedTokens, use: CacheUse) -> Tensor:
        """Keys and values of all but the padding are written to the cache first."""
        keys, values = use.cache.write(self.layer_number, (key, value), use.write)
        return attend_cached(
            tokens,
            use,
            continued=lambda new: attend_rows(query[new], keys, values, use, self._attend),
            prompts=lambda old: attend_packed(query[old], key[old], value[old], tokens, self._attend),
            padding=lambda num_tokens: query.new_zeros(num_tokens, query.size(1) * value.size(2)),
            num_tokens=len(query),
        )


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Queries [B, Q, L, D], keys [B, K, S, D], values [B, K, S, Dv] and which keys each query sees -> [B, Q, L, Dv]."""


def sinks_of(config: TransformerConfig) -> torch.nn.Parameter:
    """[Q]: a sink for each head of this tensor-parallel rank."""
    num_heads = config.num_attention_heads // config.tensor_model_parallel_size
    sinks = torch.nn.Parameter(torch.zeros(num_heads, dtype=config.params_dtype))
    sinks.tensor_model_parallel = True  # type: ignore[attr-defined]  # counted in the gradient norm on every rank
    return sinks


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    scale: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """An Attend. `seen`, broadcast to [B, Q, L, S], marks the first keys up to the query's own position; None: queries
    and keys are the same tokens, and each query sees those up to itself."""
    if window is None and sinks is None:
        return _attend_fast(query, key, value, seen, scale)
    num_keys = key.size(2)
    positions = torch.arange(num_keys, device=key.device)
    if seen is None:
        seen = positions <= positions[:, None]
    if window is not None:
        seen = seen & (positions >= seen.sum(-1, keepdim=True) - window)
    if sinks is None:
        return _attend_fast(query, key, value, seen, scale)
    # Heads that share a key are the dimension before queries.
    grouped = query.unflatten(1, (key.size(1), -1))
    scores = grouped @ key[:, :, None].mT * (query.size(-1) ** -0.5 if scale is None else scale)
    seen = seen[:, :, None] if seen.dim() == 4 else seen
    scores = scores.masked_fill(~seen, float("-inf"))
    sink = sinks.view(key.size(1), -1, 1, 1).expand(*scores.shape[:-1], 1)
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1, dtype=precise)[..., :num_keys]
    return (weights.to(value.dtype) @ value[:, :, None]).flatten(1, 2)


def _attend_fast(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float | None) -> Tensor:
    """By torch's kernels."""
    if seen is None or query.size(2) > 1:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, enable_gqa=True, scale=scale
        )
    # No key is copied: the query heads that share a key head take the dimension of query positions.
    rows = query.unflatten(1, (key.size(1), -1)).flatten(2, 3)
    return F.scaled_dot_product_attention(rows, key, value, attn_mask=seen, scale=scale).flatten(1, 2)[:, :, None]


def attend_packed(query: Tensor, key: Tensor, value: Tensor, tokens: PackedTokens, attend: Attend) -> Tensor:
    """Attention on a [B, L] grid. The padding of a row follows its tokens, where the causal mask hides it."""
    query, key, value = (spread(x, tokens.slots_T, tokens.grid) for x in (query, key, value))
    return collect(attend(query, key, value, None), tokens.slots_T)


def attend_part(query: Tensor, key: Tensor, value: Tensor, tokens: PackedTokens, part: Part, attend: Attend) -> Tensor:
    """The same when this rank holds two chunks of every sequence. Keys and values of all ranks are gathered (as in
    arXiv 2407.21783, Section 3.3.2; grouped queries keep them small), and each chunk of queries attends to the keys up
    to its end."""
    both = whole(torch.cat([key, value], dim=-1), part).split([key.size(-1), value.size(-1)], dim=-1)
    key, value = (spread(x, tokens.slots_T, tokens.grid) for x in both)
    out = query.new_zeros(query.size(0), query.size(1) * value.size(-1))
    for chunk in part.chunks:
        num_queries, num_keys = chunk.seen.shape[-2:]
        queries = spread(query[chunk.tokens], chunk.slots, (tokens.grid[0], num_queries))
        rows = attend(queries, key[:, :, :num_keys], value[:, :, :num_keys], chunk.seen)
        out = out.index_copy(0, chunk.tokens, collect(rows, chunk.slots))
    return out


def attend_cached(
    tokens: PackedTokens,
    use: CacheUse,
    *,
    continued: Callable[[slice], Tensor],
    prompts: Callable[[slice], Tensor],
    padding: Callable[[int], Tensor],
    num_tokens: int,
) -> Tensor:
    """[T, Q * Dv]: new tokens attend to their rows of the cache, prompts to themselves, and padding gives zeros; each
    by a function of its place in the pack, which is called if there are any."""
    num_new, num_prompt_tokens = len(use.seen_BL), len(tokens.slots_T)
    end = num_new + num_prompt_tokens
    parts = [continued(slice(0, num_new))] if num_new else []
    parts += [prompts(slice(num_new, end))] if num_prompt_tokens else []
    parts += [padding(num_tokens - end)] if num_tokens > end else []
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def attend_rows(query: Tensor, keys: Tensor, values: Tensor, use: CacheUse, attend: Attend) -> Tensor:
    """One query per row, [B, Q, D], over the positions of its row that it may see: [B, Q * Dv]. The rows are adjacent:
    nothing is copied."""
    num_rows, length = use.seen_BL.shape
    rows = slice(use.first_row, use.first_row + num_rows)
    seen = use.seen_BL[:, None, None, :]
    return attend(query[:, :, None], keys[rows, :, :length], values[rows, :, :length], seen).flatten(1)


def spread(x_THD: Tensor, slots_T: Tensor, grid: tuple[int, int]) -> Tensor:
    """[T, H, D] -> [B, H, L, D], zeros where there is no token."""
    num_rows, length = grid
    spread = x_THD.new_zeros(num_rows * length, *x_THD.shape[1:]).index_copy(0, slots_T, x_THD)
    return spread.view(num_rows, length, *x_THD.shape[1:]).transpose(1, 2)


def collect(x_BHLD: Tensor, slots_T: Tensor) -> Tensor:
    """[B, H, L, D] -> [T, H * D]."""
    return x_BHLD.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, slots_T)
