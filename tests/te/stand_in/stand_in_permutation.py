"""transformer_engine/pytorch/permutation.py in torch; its own functions start Triton kernels.

A row of the permuted tensor belongs to one expert of one token: first all rows of expert 0, in the order of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def moe_permute(inp: Tensor, routing_map: Tensor, num_out_tokens: int = -1, **_: Any) -> tuple[Tensor, Tensor]:
    """(rows, the token of each row)."""
    token_of_row = routing_map.bool().T.nonzero()[:, 1]
    assert num_out_tokens in (-1, len(token_of_row))
    return inp.index_select(0, token_of_row), token_of_row


def moe_permute_with_probs(
    inp: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, the probability of each, the token of each)."""
    rows, token_of_row = moe_permute(inp, routing_map, num_out_tokens)
    return rows, probs.T.masked_select(routing_map.bool().T), token_of_row


def moe_unpermute(
    inp: Tensor,
    row_id_map: Tensor,
    merging_probs: Tensor | None = None,
    restore_shape: torch.Size | None = None,
    map_type: str = "mask",
    pad_offsets: Tensor | None = None,
) -> Tensor:
    """The sum of each token's rows, in float32 and in the order of the experts: unlike Megatron's own on a GPU, always
    the same."""
    assert merging_probs is None and map_type == "mask" and pad_offsets is None
    out = torch.zeros(restore_shape or inp.shape, dtype=torch.promote_types(inp.dtype, torch.float32))
    return out.index_add(0, row_id_map, inp.to(out.dtype)).to(inp.dtype)


def moe_sort_chunks_by_index(inp: Tensor, split_sizes: Tensor, sorted_index: Tensor) -> Tensor:
    chunks = inp.split(split_sizes.tolist())
    return torch.cat([chunks[i] for i in sorted_index.tolist()])


def moe_sort_chunks_by_index_with_probs(
    inp: Tensor, probs: Tensor, split_sizes: Tensor, sorted_index: Tensor
) -> tuple[Tensor, Tensor]:
    rows, of_rows = (moe_sort_chunks_by_index(x, split_sizes, sorted_index) for x in (inp, probs))
    return rows, of_rows
