"""The arithmetic of one block of logits in Triton, for Hopper GPUs, and a forward that never writes a logit to memory.

The functions of torch_kernels.py in one pass over the block each, and `linear_statistics`. All arithmetic is float32
on float32 accumulators. There are no atomics and there is no tuning at run time, so a row's results depend neither on
the run nor on the other rows. For float32, bfloat16 and float16 inputs, not float64.

Shape suffixes: n rows, v columns of this shard that are token ids, b rows and c columns of one block, K statistics of
a row, P parts of the columns, H hidden size; in kernels, r rows and c columns of one tile. The target of a row is
counted in the columns that a function is given; outside of them it is in another block or shard.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gspo_megatron.log_probs.shards import merge

# Below every logit, and finite: unlike -inf, it can be multiplied by its exponential, 0.
FLOOR = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)

ROW_CHUNK = tl.constexpr(4096)
"""Columns that a program holds in registers at a time. Each of the 8 or more programs on a multiprocessor has 16 KB of
logits in flight: more than is needed to hide the latency of memory."""


class Tile(NamedTuple):
    """What one program of `linear_statistics` computes at a time, and how."""

    rows: int
    columns: int
    hidden: int
    warps: int
    stages: int


# One fixed size each, without autotuning, which would decide the order of a sum.
# Two groups of four warps with 64 x 256 accumulators each, 128 registers per thread: the largest tile that fits, and so
# the most arithmetic per byte from the L2 cache. 4 stages of 48 KB are the most that shared memory holds.
TENSOR_CORE_TILE = Tile(rows=128, columns=256, hidden=64, warps=8, stages=4)
# float32 is multiplied as float32, outside the tensor cores: TF32 would round its factors to 11 bits.
FLOAT32_TILE = Tile(rows=64, columns=64, hidden=16, warps=8, stages=3)
TILES_OF_PART = tl.constexpr(8)
"""Tiles that make up the columns of a part: the statistics of a part are 12 bytes per 2048 logits."""
ROW_TILES_TOGETHER = tl.constexpr(16)
"""Programs that run at the same time share 16 row tiles of hidden and a few parts of weight, which fit the L2 cache."""


def row_statistics(
    z_bc: Tensor, columns_b: Tensor, *, with_entropy: bool, kept_bc: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """lse, log p(y | block) and, on request, the entropy of every row within the block: [K, b], see `shards.merge`.

    Returns them with the maxima of the rows, [b]. `kept_bc`, of any float format, receives e^{z - max}; it may be z
    itself. z is float32, its rows may have any stride.
    """
    num_rows, num_columns = z_bc.shape
    stats_Kb = _of_no_columns(z_bc, with_entropy)
    max_b = torch.full_like(stats_Kb[0], -torch.inf)
    if num_rows and num_columns:
        _row_statistics[(num_rows,)](
            z_bc,
            z_bc.stride(0),
            kept_bc,
            0 if kept_bc is None else kept_bc.stride(0),
            columns_b.contiguous(),
            stats_Kb,
            max_b,
            num_rows,
            num_columns,
            WITH_ENTROPY=with_entropy,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return stats_Kb, max_b


def logit_gradients(
    z_bc: Tensor,
    columns_b: Tensor,
    lse_b: Tensor,
    d_log_probs_b: Tensor,
    entropy_and_gradient_b: tuple[Tensor, Tensor] | None = None,
    *,
    out_bc: Tensor,
) -> None:
    """D = dL/dz = g (1[y = v] - p) - g_H p (log p + H), with p = e^{z - lse}, into `out_bc`, which may be z itself.

    `lse_b` and the entropy are those of the whole vocabulary. z is float32, `out_bc` of any float format.
    """
    entropy_b, d_entropy_b = entropy_and_gradient_b or (None, None)
    _gradients(z_bc, columns_b, lse_b, d_log_probs_b, entropy_b, d_entropy_b, out_bc=out_bc, of_logits=True)


def gradients_of_kept(kept_bc: Tensor, columns_b: Tensor, log_scale_b: Tensor, d_log_probs_b: Tensor) -> None:
    """D = g (1[y = v] - kept e^{log_scale}) in place of kept = e^{z - max}; log_scale = max - lse."""
    _gradients(kept_bc, columns_b, log_scale_b, d_log_probs_b, None, None, out_bc=kept_bc, of_logits=False)


def linear_statistics(
    hidden_nH: Tensor, weight_vH: Tensor, columns_n: Tensor, inverse_temperature: float, *, with_entropy: bool
) -> Tensor:
    """`row_statistics` of z = h W^T inverse_temperature, without a block of logits in memory: [K, n].

    Each program computes the statistics of one row tile within one part of the columns; `merge` combines the parts in
    order. Besides the result this takes 4 K n bytes per 2048 columns (512 for float32), and a copy of hidden or weight
    where its rows are not aligned to 16 bytes, as the hardware's tile loads require.
    """
    num_rows, num_columns = len(hidden_nH), len(weight_vH)
    tile = FLOAT32_TILE if hidden_nH.dtype == torch.float32 else TENSOR_CORE_TILE
    num_parts = triton.cdiv(num_columns, tile.columns * TILES_OF_PART.value)
    stats_Kn = _of_no_columns(hidden_nH, with_entropy)
    if not num_rows or not num_parts:
        return stats_Kn
    hidden_nH, weight_vH = _aligned(hidden_nH), _aligned(weight_vH)
    parts_PKn = stats_Kn.new_empty((num_parts, *stats_Kn.shape))
    _linear_statistics[(triton.cdiv(num_rows, tile.rows) * num_parts,)](
        TensorDescriptor.from_tensor(hidden_nH, [tile.rows, tile.hidden]),
        TensorDescriptor.from_tensor(weight_vH, [tile.columns, tile.hidden]),
        columns_n.contiguous(),
        parts_PKn,
        num_rows,
        num_columns,
        hidden_nH.shape[1],
        num_parts,
        inverse_temperature,
        WITH_ENTROPY=with_entropy,
        TILE_ROWS=tile.rows,
        TILE_COLUMNS=tile.columns,
        TILE_HIDDEN=tile.hidden,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return merge(parts_PKn)


def _of_no_columns(like: Tensor, with_entropy: bool) -> Tensor:
    stats_Kn = torch.full((3 if with_entropy else 2, len(like)), -torch.inf, device=like.device)
    stats_Kn[2:] = 0.0
    return stats_Kn


def _aligned(x: Tensor) -> Tensor:
    unit = 16 // x.itemsize
    if x.stride(1) == 1 and x.stride(0) % unit == 0 and x.data_ptr() % 16 == 0:
        return x
    return torch.nn.functional.pad(x, (0, -x.shape[1] % unit)).contiguous()


def _gradients(x_bc: Tensor, *per_row: Tensor | None, out_bc: Tensor, of_logits: bool) -> None:
    num_rows, num_columns = x_bc.shape
    if num_rows and num_columns:
        _row_gradients[(num_rows, triton.cdiv(num_columns, ROW_CHUNK.value))](
            x_bc,
            x_bc.stride(0),
            out_bc,
            out_bc.stride(0),
            *(x_b if x_b is None else x_b.contiguous() for x_b in per_row),
            num_columns,
            OF_LOGITS=of_logits,
            num_warps=4,
            enable_fp_fusion=True,
        )


@triton.jit
def _add_columns(
    z_rc: tl.tensor,
    max_r: tl.tensor,
    sum_r: tl.tensor,
    weighted_r: tl.tensor,
    to_base_2: tl.tensor,
    WITH_ENTROPY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Over the columns so far and those of z: max z, sum e^{s (z - max)} and sum (z - max) e^{s (z - max)}, where s is
    to_base_2 / log2 e. z - max is exact where it matters, near 0: s is not multiplied into z, which would round it."""
    new_max_r = tl.maximum(max_r, tl.max(z_rc, 1))
    shift_r = max_r - new_max_r
    scale_r = tl.exp2(shift_r * to_base_2)
    z_rc -= new_max_r[:, None]
    exp_rc = tl.exp2(z_rc * to_base_2)
    if WITH_ENTROPY:
        weighted_r = scale_r * (weighted_r + shift_r * sum_r) + tl.sum(exp_rc * z_rc, 1)
    sum_r = scale_r * sum_r + tl.sum(exp_rc, 1)
    return new_max_r, sum_r, weighted_r


@triton.jit
def _store_statistics(
    stats: tl.tensor,
    num_rows: tl.tensor,
    row_r: tl.tensor,
    max_r: tl.tensor,
    sum_r: tl.tensor,
    weighted_r: tl.tensor,
    target_r: tl.tensor,
    has_target_r: tl.tensor,
    scale: tl.tensor,
    WITH_ENTROPY: tl.constexpr,
) -> None:
    """lse, log p(y | columns) and entropy from the sums of `_add_columns`, to [K, num_rows]."""
    log_sum_r = tl.log(sum_r)
    is_row_r = row_r < num_rows
    tl.store(stats + row_r, max_r * scale + log_sum_r, mask=is_row_r)
    log_p_r = tl.where(has_target_r, (target_r - max_r) * scale - log_sum_r, -float("inf"))
    tl.store(stats + num_rows + row_r, log_p_r, mask=is_row_r)
    if WITH_ENTROPY:
        tl.store(stats + 2 * num_rows + row_r, log_sum_r - weighted_r / sum_r * scale, mask=is_row_r)


@triton.jit(do_not_specialize=["num_rows"])
def _row_statistics(
    z: tl.tensor,
    z_stride: tl.tensor,
    kept: tl.tensor | None,
    kept_stride: tl.tensor,
    targets: tl.tensor,
    stats: tl.tensor,
    maxima: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    WITH_ENTROPY: tl.constexpr,
) -> None:
    """One program per row."""
    row_r = tl.program_id(0) + tl.arange(0, 1)
    z_r = z + row_r.to(tl.int64) * z_stride
    # Before the loop, whose reductions synchronise all warps: where z is also `kept`, it is overwritten later.
    column_r = tl.load(targets + row_r)
    has_target_r = (column_r >= 0) & (column_r < num_columns)
    target_r = tl.load(z_r + column_r, mask=has_target_r, other=0.0)
    max_r = tl.full((1,), FLOOR, tl.float32)
    sum_r = tl.zeros((1,), tl.float32)
    weighted_r = tl.zeros((1,), tl.float32)
    for start in range(0, num_columns, ROW_CHUNK):
        column_c = start + tl.arange(0, ROW_CHUNK)
        z_rc = tl.load(z_r[:, None] + column_c[None, :], mask=column_c[None, :] < num_columns, other=FLOOR)
        max_r, sum_r, weighted_r = _add_columns(z_rc, max_r, sum_r, weighted_r, LOG2_E, WITH_ENTROPY)

    tl.store(maxima + row_r, max_r)
    _store_statistics(stats, num_rows, row_r, max_r, sum_r, weighted_r, target_r, has_target_r, 1.0, WITH_ENTROPY)
    if kept is not None:
        kept_r = kept + row_r.to(tl.int64) * kept_stride
        for start in range(0, num_columns, ROW_CHUNK):
            column_c = start + tl.arange(0, ROW_CHUNK)
            is_column_rc = column_c[None, :] < num_columns
            z_rc = tl.load(z_r[:, None] + column_c[None, :], mask=is_column_rc, other=FLOOR)
            tl.store(kept_r[:, None] + column_c[None, :], tl.exp2((z_rc - max_r[:, None]) * LOG2_E), mask=is_column_rc)


@triton.jit
def _row_gradients(
    x: tl.tensor,
    x_stride: tl.tensor,
    out: tl.tensor,
    out_stride: tl.tensor,
    targets: tl.tensor,
    shifts: tl.tensor,
    d_log_probs: tl.tensor,
    entropies: tl.tensor | None,
    d_entropies: tl.tensor | None,
    num_columns: tl.tensor,
    OF_LOGITS: tl.constexpr,
) -> None:
    """One program per row and chunk of columns. x holds logits and shift their lse, or x holds e^{z - max} and shift
    max - lse."""
    row = tl.program_id(0).to(tl.int64)
    column_c = tl.program_id(1) * ROW_CHUNK + tl.arange(0, ROW_CHUNK)
    is_column_c = column_c < num_columns
    x_c = tl.load(x + row * x_stride + column_c, mask=is_column_c, other=FLOOR).to(tl.float32)
    shift = tl.load(shifts + row)
    d_log_prob = tl.load(d_log_probs + row)
    if OF_LOGITS:
        log_p_c = x_c - shift
        p_c = tl.exp2(log_p_c * LOG2_E)
    else:
        p_c = x_c * tl.exp2(shift * LOG2_E)
    d_c = -d_log_prob * p_c
    if entropies is not None:
        d_c -= tl.load(d_entropies + row) * p_c * (log_p_c + tl.load(entropies + row))
    d_c += tl.where(column_c == tl.load(targets + row), d_log_prob, 0.0)
    tl.store(out + row * out_stride + column_c, d_c, mask=is_column_c)


# The counts of rows and columns change from call to call; specialised kernels for some of them would gain nothing.
@triton.jit(do_not_specialize=["num_rows", "num_columns", "num_parts"])
def _linear_statistics(
    hidden: tl.tensor_descriptor,
    weight: tl.tensor_descriptor,
    targets: tl.tensor,
    parts: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    hidden_size: tl.tensor,
    num_parts: tl.tensor,
    inverse_temperature: tl.tensor,
    WITH_ENTROPY: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_HIDDEN: tl.constexpr,
) -> None:
    """One program per row tile and part of the columns. Loads beyond hidden and weight give 0."""
    row_tile, part = _place_of_program(tl.cdiv(num_rows, TILE_ROWS), num_parts)
    row_r = row_tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    first = part * (TILES_OF_PART * TILE_COLUMNS)
    num_tiles = tl.minimum(tl.cdiv(num_columns - first, TILE_COLUMNS), TILES_OF_PART)
    column_r = tl.load(targets + row_r, mask=row_r < num_rows, other=-1) - first
    has_target_r = (column_r >= 0) & (column_r < num_tiles * TILE_COLUMNS) & (column_r < num_columns - first)
    column_r = tl.where(has_target_r, column_r, -1).to(tl.int32)

    max_r = tl.full((TILE_ROWS,), FLOOR, tl.float32)
    sum_r = tl.zeros((TILE_ROWS,), tl.float32)
    weighted_r = tl.zeros((TILE_ROWS,), tl.float32)
    target_r = tl.zeros((TILE_ROWS,), tl.float32)
    to_base_2 = inverse_temperature * LOG2_E
    # Not flatten=True, which would let copies run ahead into the next tile: Triton before 3.9 fails on loops with
    # branches. One loop over all steps, written by hand, spills registers with 3.9.
    for tile in tl.range(0, num_tiles):
        z_rc = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
        for h in tl.range(0, hidden_size, TILE_HIDDEN):
            hidden_rh = hidden.load([row_tile * TILE_ROWS, h])
            weight_ch = weight.load([first + tile * TILE_COLUMNS, h])
            z_rc = tl.dot(hidden_rh, weight_ch.T, z_rc, input_precision="ieee")
        # What only few tiles need is a third of the work on one, hence the branches. They must not return a tile: the
        # compiler would serialise the products.
        column_c = tile * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        if tl.max((column_r // TILE_COLUMNS == tile).to(tl.int32), 0) > 0:
            target_r += tl.sum(tl.where(column_c[None, :] == column_r[:, None], z_rc, 0.0), 1)
        if (tile + 1) * TILE_COLUMNS <= num_columns - first:
            max_r, sum_r, weighted_r = _add_columns(z_rc, max_r, sum_r, weighted_r, to_base_2, WITH_ENTROPY)
        else:
            z_rc = tl.where(column_c[None, :] < num_columns - first, z_rc, FLOOR)
            max_r, sum_r, weighted_r = _add_columns(z_rc, max_r, sum_r, weighted_r, to_base_2, WITH_ENTROPY)

    num_stats: tl.constexpr = 3 if WITH_ENTROPY else 2
    _store_statistics(
        parts + part.to(tl.int64) * num_stats * num_rows,
        num_rows,
        row_r,
        max_r,
        sum_r,
        weighted_r,
        target_r,
        has_target_r,
        inverse_temperature,
        WITH_ENTROPY,
    )


@triton.jit
def _place_of_program(num_row_tiles: tl.tensor, num_parts: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """(row tile, part), such that consecutive programs share 16 row tiles."""
    program = tl.program_id(0)
    first = program // (ROW_TILES_TOGETHER * num_parts) * ROW_TILES_TOGETHER
    together = tl.minimum(num_row_tiles - first, ROW_TILES_TOGETHER)
    within = program % (ROW_TILES_TOGETHER * num_parts)
    return first + within % together, within // together
