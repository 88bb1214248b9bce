"""Context parallelism: communication between the ranks that share the tokens of every sequence.

The split is `data.packing.zigzag`: a sequence of L tokens is divided into 2 * cp chunks of n = L / (2 * cp), and rank c
holds chunks c and 2 * cp - 1 - c. Every rank then has the same share of causal attention:
(c + 1/2) + (2 cp - 1 - c + 1/2) = 2 cp chunks of keys, for any c.

Shapes: T tokens of all ranks, Tc those of this one, B sequences (rows), n the longest chunk, L = 2 * cp * n positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


class SumOverRanks(torch.autograd.Function):
    """s = sum_c p_c over the ranks of a group, on each of them.

    Each rank then computes its share l_c of the loss from s, and the gradient needed is that of the sum of the shares,
    d(sum_c l_c) / d p_c' = sum_c d l_c / d s: the backward is a sum over ranks, too.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


@dataclass
class Chunk:
    """The queries of one chunk of every sequence: their indices among this rank's tokens, their slots in a [B, n] grid,
    and which of the sequence's first K keys each of them sees, [B, 1, n, K]."""

    tokens: Tensor
    slots: Tensor
    seen: Tensor


@dataclass
class Part:
    """This rank's part of the packed sequences of one forward. The gathered tokens of all ranks, indexed by `order_T`,
    are the pack."""

    group: dist.ProcessGroup
    order_T: Tensor
    chunks: tuple[Chunk, Chunk]


def part_of(cu_seqlens: Tensor, max_seqlen: int, num_tokens: int, group: dist.ProcessGroup) -> Part:
    """This rank's part of sequences with boundaries `cu_seqlens` [B + 1] and `num_tokens` tokens in all. Does not wait
    for the device."""
    size, rank, device = group.size(), group.rank(), cu_seqlens.device
    borders, rows = cu_seqlens.long(), torch.arange(cu_seqlens.numel() - 1, device=device)
    chunk_B = borders.diff() // (2 * size)

    row_T = torch.repeat_interleave(rows, borders.diff(), output_size=num_tokens)
    number_T, inside_T = _divmod(torch.arange(num_tokens, device=device) - borders[row_T], chunk_B[row_T])
    late_T = number_T >= size
    owner_T = torch.where(late_T, 2 * size - 1 - number_T, number_T)
    # On its rank, a row begins at its offset in the pack divided by cp, and its early chunk precedes its late one.
    order_T = owner_T * (num_tokens // size) + borders[row_T] // size + late_T * chunk_B[row_T] + inside_T

    def chunk(number: int, late: bool) -> Chunk:
        longest = max_seqlen // (2 * size)
        row = torch.repeat_interleave(rows, chunk_B, output_size=num_tokens // (2 * size))
        inside = torch.arange(row.numel(), device=device) - borders[row] // (2 * size)
        first_B = number * chunk_B
        position_Bn = first_B[:, None] + torch.arange(longest, device=device)
        seen = position_Bn[:, None, :, None] >= torch.arange((number + 1) * longest, device=device)
        return Chunk(borders[row] // size + late * chunk_B[row] + inside, row * longest + inside, seen)

    return Part(group, order_T, (chunk(rank, False), chunk(2 * size - 1 - rank, True)))


def whole(x: Tensor, part: Part) -> Tensor:
    """[Tc, ...] of every rank -> [T, ...] in the order of the pack. The gradient of a token's value is summed over all
    ranks that used it."""
    return gather_from_sequence_parallel_region(x, group=part.group).index_select(0, part.order_T)


def own(x: Tensor, part: Part) -> Tensor:
    """The inverse: [T, ...] in the order of the pack -> this rank's [Tc, ...]."""
    num_tokens = len(part.order_T) // part.group.size()
    place_T = torch.empty_like(part.order_T)
    place_T[part.order_T] = torch.arange(len(part.order_T), device=part.order_T.device)
    start = part.group.rank() * num_tokens
    return x.index_select(0, place_T[start : start + num_tokens])


def _divmod(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a // b, a % b
