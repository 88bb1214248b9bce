"""A chunk of rows times one vocabulary shard, block by block: the matmuls around the kernels of a block.

A block is b rows by c columns of the logits z = h W^T / temperature. It is computed, used and dropped, and computed
again in the backward pass, unless `Store` has room to keep its exponentials. With a = 4 bytes per accumulator (8 for
float64 inputs) and f bytes per matmul factor, the workspace stays below

    a * (2 b c + b H) + f * (b c + b H + c H)   bytes

for any number of rows and any size of the vocabulary. (oneDNN, which multiplies large blocks on the CPU, takes about as
much again for its results and copies, and caches a kernel for each shape.)

Shape suffixes: b rows of a chunk, v columns of this shard that are token ids, c columns of a block, K statistics of a
row, H hidden size. `columns_b` is the target of a row as a column of this shard; a target outside [0, v) belongs to
another shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gspo_megatron.log_probs.products import accumulator, add_product, factor_dtype, padded_rows, product
from gspo_megatron.log_probs.shards import merge
from gspo_megatron.log_probs.support import Places
from gspo_megatron.log_probs.torch_kernels import position

# (b, c). A CPU core is fastest when a block fits its cache; an accelerator when a block outweighs the kernel launches.
CPU_BLOCK = (1024, 1024)
ACCELERATOR_BLOCK = (4096, 4096)


class Kernels(Protocol):
    """torch_kernels.py, or triton_kernels.py, which also has `linear_statistics`: row_statistics without a block of
    logits in memory, `(hidden_bH, weight_vH, columns_b, inverse_temperature, *, with_entropy) -> [K, b]`."""

    def row_statistics(
        self, z_bc: Tensor, columns_b: Tensor, *, with_entropy: bool, kept_bc: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def logit_gradients(
        self,
        z_bc: Tensor,
        columns_b: Tensor,
        lse_b: Tensor,
        d_log_probs_b: Tensor,
        entropy_and_gradient_b: tuple[Tensor, Tensor] | None = None,
        *,
        out_bc: Tensor,
    ) -> None: ...

    def gradients_of_kept(
        self, kept_bc: Tensor, columns_b: Tensor, log_scale_b: Tensor, d_log_probs_b: Tensor
    ) -> None: ...


class Kept(NamedTuple):
    """e^{z - max} of a block, in the format of the gradient's matmul, and the maxima of its rows."""

    exp_bc: Tensor
    max_b: Tensor


class Store:
    """Memory for what is kept between forward and backward: one block of up to `max_bytes`, handed out in parts."""

    def __init__(self, max_bytes: int, chunks: Sequence[int], columns: int, like: Tensor) -> None:
        """`chunks`: the rows of each chunk. Allocates no more than they can use."""
        dtype, width = factor_dtype(like), min(block_shape(like)[1], columns)
        rows = sum(padded_rows(rows, like, width) for rows in chunks)
        self._free = like.new_empty(min(max_bytes // dtype.itemsize, rows * columns), dtype=dtype)

    def take(self, rows: int, columns: int) -> Tensor | None:
        """[rows, columns], or None when too little is left."""
        if rows * columns > self._free.numel():
            return None
        block, self._free = self._free.split([rows * columns, self._free.numel() - rows * columns])
        return block.view(rows, columns)


class RowGradients(NamedTuple):
    """For each row of a chunk, [b]: its results over the whole vocabulary and their gradients, which are already
    divided by the temperature."""

    lse: Tensor
    log_probs: Tensor
    d_log_probs: Tensor
    entropy: Tensor | None = None
    d_entropy: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> RowGradients:
        """`change` applied to each of them."""
        return RowGradients(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]


def statistics(
    kernels: Kernels,
    hidden_bH: Tensor,
    weight_vH: Tensor,
    columns_b: Tensor,
    inverse_temperature: float,
    *,
    with_entropy: bool,
    store: Store,
    support: Places | None = None,
) -> tuple[Tensor, list[Kept]]:
    """lse, log p(y | shard) and, on request, the entropy of every row within this shard, [K, b] (see `merge`), with
    what `store` had room for: the first blocks. `support`: the ids that count, None: all."""
    fused = None if support else getattr(kernels, "linear_statistics", None)
    workspace = _Workspace(hidden_bH, accumulator(hidden_bH))
    num_rows, width = len(hidden_bH), block_shape(hidden_bH)[1]
    rows = padded_rows(num_rows, hidden_bH, min(width, len(weight_vH)))
    hidden_bH, columns_b = _padded(hidden_bH, rows), _padded(columns_b, rows, -1)
    factors_bH = hidden_bH.to(factor_dtype(hidden_bH))
    stats: list[Tensor] = []
    kept: list[Kept] = []
    for number, part in enumerate(_slices(len(weight_vH), width)):
        has_room = len(kept) == number  # the first blocks are kept, without a gap
        kept_bc = store.take(rows, part.stop - part.start) if has_room else None
        if kept_bc is None and fused:
            rest_vH = weight_vH[part.start :]
            columns = columns_b - part.start
            stats.append(fused(hidden_bH, rest_vH, columns, inverse_temperature, with_entropy=with_entropy))
            break
        z_bc = _logits(factors_bH, weight_vH[part], inverse_temperature, workspace)
        if support:
            support.keep(number, z_bc)
        stats_Kb, max_b = kernels.row_statistics(
            z_bc, columns_b - part.start, with_entropy=with_entropy, kept_bc=kept_bc
        )
        stats.append(stats_Kb)
        if kept_bc is not None:
            kept.append(Kept(kept_bc, max_b))
    stats_Kb = merge(torch.stack(stats)) if stats else no_statistics(hidden_bH, rows, with_entropy)
    return stats_Kb[:, :num_rows], kept


def gradients(
    kernels: Kernels,
    hidden_bH: Tensor,
    weight_vH: Tensor,
    columns_b: Tensor,
    inverse_temperature: float,
    row: RowGradients,
    kept: Sequence[Kept],
    kept_rows_b: Tensor | None = None,
    *,
    d_weight_vH: Tensor | None,
    with_hidden: Callable[[Tensor], None],
    support: Places | None = None,
) -> None:
    """d_hidden = D W and d_weight += D^T h (where it is wanted), with D = dL/d(h W^T) computed block by block, from
    what is `kept` or from h and W. `kept_rows_b`: positions of the rows in what is kept; None: all of them, in order.

    `with_hidden` receives this shard's part of d_hidden, [b, H], unrounded: the parts of all shards are added first. It
    is called before the last block's d_weight, so that the communication it starts overlaps with a matmul.
    """
    num_rows, width = len(hidden_bH), block_shape(hidden_bH)[1]
    rows = padded_rows(num_rows, hidden_bH, min(width, len(weight_vH)))
    hidden_bH, columns_b, row = (
        _padded(hidden_bH, rows),
        _padded(columns_b, rows, -1),
        row.each(lambda x: _padded(x, rows)),
    )
    d_hidden_bH = torch.zeros_like(hidden_bH, dtype=accumulator(hidden_bH))
    logits, factors = (_Workspace(hidden_bH, dtype) for dtype in (accumulator(hidden_bH), factor_dtype(hidden_bH)))
    entropy = None if row.entropy is None or row.d_entropy is None else (row.entropy, row.d_entropy)
    hidden_bH = hidden_bH.to(factor_dtype(hidden_bH))
    for number, part in enumerate(_slices(len(weight_vH), width)):
        weight_cH, columns = weight_vH[part].to(hidden_bH.dtype), columns_b - part.start
        if number < len(kept) and entropy is None:
            exp_bc, max_b = kept[number]
            if kept_rows_b is not None:
                max_b, some_bc = _padded(max_b[kept_rows_b], rows), factors.block(rows, exp_bc.shape[1])
                torch.index_select(exp_bc, 0, kept_rows_b, out=some_bc[:num_rows])
                exp_bc = some_bc
                exp_bc[num_rows:] = 0
            kernels.gradients_of_kept(exp_bc, columns, max_b - row.lse, row.d_log_probs)
            _set_at_targets(exp_bc, columns, -row.d_log_probs * row.log_probs.expm1())
            d_bc = exp_bc
        else:
            z_bc = _logits(hidden_bH, weight_cH, inverse_temperature, logits)
            if support:
                support.keep(number, z_bc)
            d_bc = z_bc if z_bc.dtype == hidden_bH.dtype else factors.block(*z_bc.shape)
            kernels.logit_gradients(z_bc, columns, row.lse, row.d_log_probs, entropy, out_bc=d_bc)
        add_product(d_hidden_bH, d_bc, weight_cH)
        if part.stop == len(weight_vH):
            with_hidden(d_hidden_bH[:num_rows])
        if d_weight_vH is not None:
            add_product(d_weight_vH[part], d_bc.T, hidden_bH)
    if not len(weight_vH):
        with_hidden(d_hidden_bH[:num_rows])


def no_statistics(like: Tensor, num_rows: int, with_entropy: bool) -> Tensor:
    """Statistics of a part of the vocabulary without columns, [K, num_rows]."""
    stats_Kn = like.new_full((2 + with_entropy, num_rows), -torch.inf, dtype=accumulator(like))
    stats_Kn[2:] = 0
    return stats_Kn


def logits(hidden_nH: Tensor, weight_VpH: Tensor) -> Tensor:
    """z = h W^T of this shard, [n, Vp], in the accumulator's dtype."""
    parts = _slices(len(weight_VpH), block_shape(hidden_nH)[1])
    return torch.cat([product(hidden_nH, weight_VpH[part].T) for part in parts], dim=1)


def block_shape(x: Tensor) -> tuple[int, int]:
    """(b, c) on x's device."""
    return CPU_BLOCK if x.device.type == "cpu" else ACCELERATOR_BLOCK


class _Workspace:
    """Memory that one block after another uses."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype, self.memory = like, dtype, like.new_empty(0, dtype=dtype)

    def block(self, rows: int, columns: int) -> Tensor:
        if self.memory.numel() < rows * columns:
            self.memory = self.like.new_empty(rows * columns, dtype=self.dtype)
        return self.memory[: rows * columns].view(rows, columns)


def _logits(hidden_bH: Tensor, weight_cH: Tensor, inverse_temperature: float, workspace: _Workspace) -> Tensor:
    z_bc = product(hidden_bH, weight_cH.T, out=workspace.block(len(hidden_bH), len(weight_cH)))
    return z_bc if inverse_temperature == 1 else z_bc.mul_(inverse_temperature)


def _set_at_targets(d_bc: Tensor, columns_b: Tensor, values_b: Tensor) -> None:
    """g (1 - p) of the target from log p, which is exact: 1 - p of a rounded p near 1 would not be."""
    index_b, is_inside_b = position(columns_b, d_bc.shape[1])
    values_b1 = torch.where(is_inside_b, values_b, d_bc.gather(1, index_b[:, None])[:, 0])[:, None]
    d_bc.scatter_(1, index_b[:, None], values_b1.to(d_bc.dtype))


def _padded(x: Tensor, rows: int, value: float = 0) -> Tensor:
    if len(x) == rows:
        return x
    padded = x.new_full((rows, *x.shape[1:]), value)
    padded[: len(x)] = x
    return padded


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
