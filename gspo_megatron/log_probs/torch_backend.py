"""The arithmetic of one vocabulary shard in plain torch, block by block.

A block is R rows by C columns of the logits z = h W^T / temperature. It is made, used and dropped, and made again in
the backward pass. With a = 4 bytes (8 for float64 inputs) an accumulator, the workspace stays below

    a * (4 R C + (2 R + 3 C) H)   bytes,

whatever the number of rows and the size of the vocabulary are.

Shape suffixes: n scored rows, v columns of this shard that are token ids, K statistics of a row, H hidden size;
b and c the rows and columns of one block. `columns_n` is the target of a row, counted in columns of this shard;
a target outside [0, v) belongs to another shard.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gspo_megatron.log_probs.shards import merge

# (R, C). A CPU core is fastest when a block fits its cache; an accelerator when a block outweighs its kernel launches.
CPU_BLOCK = (512, 1024)
ACCELERATOR_BLOCK = (4096, 8192)


def statistics(
    hidden_nH: Tensor, weight_vH: Tensor, columns_n: Tensor, inverse_temperature: float, *, with_entropy: bool
) -> Tensor:
    """lse, log p(y | shard) and, on request, the entropy of every row within this shard: [K, n], see `merge`."""
    of_no_columns_K = [-torch.inf, -torch.inf, 0.0] if with_entropy else [-torch.inf, -torch.inf]
    stats_K = hidden_nH.new_tensor(of_no_columns_K, dtype=accumulator(hidden_nH))
    stats_Kn = stats_K[:, None].repeat(1, len(hidden_nH))
    block_rows, block_columns = _block_shape(hidden_nH)
    for rows in _slices(len(hidden_nH), block_rows):
        blocks = []
        for part in _slices(len(weight_vH), block_columns):
            z_bc = _product(hidden_nH[rows], weight_vH[part].T).mul_(inverse_temperature)
            blocks.append(_block_statistics(z_bc, columns_n[rows] - part.start, with_entropy))
        if blocks:
            stats_Kn[:, rows] = merge(torch.stack(blocks))
    return stats_Kn


def gradients(
    hidden_nH: Tensor,
    weight_vH: Tensor,
    columns_n: Tensor,
    inverse_temperature: float,
    lse_n: Tensor,
    d_log_probs_n: Tensor,
    entropy_and_gradient_n: tuple[Tensor, Tensor] | None,
    *,
    d_weight_vH: Tensor,
) -> Tensor:
    """d_hidden = D W and d_weight = D^T h, with D = dL/d(h W^T) made again block by block.

    Returns this shard's part of d_hidden, [n, H], not rounded: the parts of all shards are to be added first.
    Writes `d_weight_vH`, rounded once. `lse_n` and the entropy are those of the whole vocabulary.
    """
    d_hidden_nH = torch.zeros_like(hidden_nH, dtype=accumulator(hidden_nH))
    per_row = [lse_n, d_log_probs_n * inverse_temperature]
    if entropy_and_gradient_n is not None:
        entropy_n, d_entropy_n = entropy_and_gradient_n
        per_row += [entropy_n, d_entropy_n * inverse_temperature]
    block_rows, block_columns = _block_shape(hidden_nH)
    for part in _slices(len(weight_vH), block_columns):
        weight_cH = weight_vH[part].to(_factor_dtype(weight_vH))
        d_weight_cH = torch.zeros_like(weight_cH, dtype=accumulator(weight_vH))
        for rows in _slices(len(hidden_nH), block_rows):
            hidden_bH = hidden_nH[rows].to(weight_cH.dtype)
            z_bc = _product(hidden_bH, weight_cH.T).mul_(inverse_temperature)
            d_bc = _logit_gradients(z_bc, columns_n[rows] - part.start, *(x_n[rows] for x_n in per_row))
            d_bc = d_bc.to(weight_cH.dtype)
            d_hidden_nH[rows] += _product(d_bc, weight_cH)
            d_weight_cH += _product(d_bc.T, hidden_bH)
        d_weight_vH[part] = d_weight_cH
    return d_hidden_nH


def logits(hidden_nH: Tensor, weight_VpH: Tensor) -> Tensor:
    """z = h W^T of this shard, [n, Vp], in the accumulator's dtype."""
    _, block_columns = _block_shape(hidden_nH)
    parts = _slices(len(weight_VpH), block_columns)
    return torch.cat([_product(hidden_nH, weight_VpH[part].T) for part in parts], dim=1)


def accumulator(x: Tensor) -> torch.dtype:
    """What products of x are added up in, and results returned in: float64 for float64, float32 for all else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _block_statistics(z_bc: Tensor, columns_b: Tensor, with_entropy: bool) -> Tensor:
    """The statistics of one block, [K, b]. Overwrites z."""
    max_b = z_bc.amax(1)
    z_bc.sub_(max_b[:, None])
    exp_bc = z_bc.exp()
    sum_b = exp_bc.sum(1)
    log_sum_b = sum_b.log()
    index_b, is_inside_b = _position(columns_b, z_bc.shape[1])
    z_y_b = z_bc.gather(1, index_b[:, None])[:, 0]
    stats = [max_b + log_sum_b, torch.where(is_inside_b, z_y_b - log_sum_b, -torch.inf)]
    if with_entropy:
        stats.append(log_sum_b - exp_bc.mul_(z_bc).sum(1) / sum_b)
    return torch.stack(stats)


def _logit_gradients(
    z_bc: Tensor,
    columns_b: Tensor,
    lse_b: Tensor,
    d_log_prob_b: Tensor,
    entropy_b: Tensor | None = None,
    d_entropy_b: Tensor | None = None,
) -> Tensor:
    """D = dL/dz = g (1[y = v] - p) - g_H p (log p + H), with p = e^{z - lse}. Overwrites z."""
    log_p_bc = z_bc.sub_(lse_b[:, None])
    p_bc = log_p_bc.exp()
    if entropy_b is None or d_entropy_b is None:
        d_bc = p_bc.mul_(-d_log_prob_b[:, None])
    else:
        d_bc = log_p_bc.add_(entropy_b[:, None]).mul_(-d_entropy_b[:, None]).sub_(d_log_prob_b[:, None]).mul_(p_bc)
    index_b, is_inside_b = _position(columns_b, z_bc.shape[1])
    return d_bc.scatter_add_(1, index_b[:, None], torch.where(is_inside_b, d_log_prob_b, 0.0)[:, None])


def _position(columns_b: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(an index that is safe to gather with, whether the target lies in this block)."""
    return columns_b.clamp(0, width - 1), (columns_b >= 0) & (columns_b < width)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, added up in and returned in the accumulator's dtype: bf16 factors give logits that were never bf16."""
    dtype = accumulator(a)
    factor = _factor_dtype(a)
    if factor == dtype:
        return a.to(dtype) @ b.to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def _factor_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which factors enter a product. Accelerators multiply bf16 into float32 (torch >= 2.8); a CPU, or an
    older torch, has only products whose result is rounded to bf16, so there the factors are widened first."""
    can_widen = x.device.type != "cpu" and "dtype" in torch.ops.aten.mm.overloads()
    return x.dtype if can_widen else accumulator(x)


def _block_shape(x: Tensor) -> tuple[int, int]:
    return CPU_BLOCK if x.device.type == "cpu" else ACCELERATOR_BLOCK


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
