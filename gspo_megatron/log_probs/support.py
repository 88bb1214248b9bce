"""The support S of a row: the ids that its softmax runs over, where these are not all.

    log p(y) = z_y - log sum_{v in S} e^{z_v},   p_v = 0 and dL/dz_v = 0 for v outside S

S is given, as top-k and top-p have chosen it when y was sampled; nothing is differentiated through the choice. The
matmuls are those of all ids, block by block. Of each block only the kept logits are read; these few are kept for the
backward, which computes no logits again.

Shape suffixes: b rows of a chunk, v columns of this shard that are token ids, c columns of a block, E kept ids of the
rows in this shard, row by row, e those within a block, K statistics of a row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gspo_megatron.base.ragged import Ragged, entries_of
from gspo_megatron.base.tensors import on_device
from gspo_megatron.log_probs.blocks import RowGradients, Workspace, block_shape, logit_block, padded, slices
from gspo_megatron.log_probs.products import accumulator, add_product, factor_dtype, padded_rows


class Places:
    """Where the kept ids of some rows lie in a shard of `num_columns`, which holds ids from `first_id` on."""

    def __init__(self, support: Ragged, targets_b: Tensor, first_id: int, num_columns: int, like: Tensor) -> None:
        """`targets_b` are ids, on the host. Everything is laid out there, so nothing waits for the device of `like`."""
        column_E, row_E = support.ids_E.long() - first_id, support.token_E
        here = ((column_E >= 0) & (column_E < num_columns)).nonzero().flatten()
        column_E, row_E = column_E[here], row_E[here]
        width = block_shape(like)[1]
        block_E = (column_E // width).int()
        order_E = block_E.argsort(stable=True)
        at_3E = torch.stack([order_E, row_E[order_E], column_E[order_E] % width])
        sizes = block_E.bincount(minlength=-(-num_columns // width)).tolist()
        target = (column_E == targets_b[row_E] - first_id).nonzero().flatten()
        self.row_E = on_device(row_E, like.device)
        self._counts_b = row_E.bincount(minlength=len(support))
        self.counts_b = on_device(self._counts_b, like.device)
        self.target_E, self.target_row = on_device(target, like.device), on_device(row_E[target], like.device)
        self.blocks = on_device(at_3E, like.device).split(sizes, dim=1)
        """(which of the E, row, column) of those in each block."""

    def entries_of(self, rows_r: Tensor) -> Tensor:
        """Which of the E belong to some rows, given on the host, row by row."""
        return on_device(entries_of(self._counts_b, rows_r), self.row_E.device)


def statistics(
    places: Places, hidden_bH: Tensor, weight_vH: Tensor, inverse_temperature: float, *, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """lse, log p(y | shard) and, on request, the entropy of every row over its kept ids in this shard, [K, b] (see
    `shards.merge`), with the logits of these, [E]."""
    z_E = places.row_E.new_empty(len(places.row_E), dtype=accumulator(hidden_bH))
    factors_bH, workspace = _factors(hidden_bH, weight_vH), Workspace(hidden_bH, accumulator(hidden_bH))
    for part, (entry_e, row_e, column_e) in zip(_blocks(weight_vH), places.blocks, strict=True):
        z_bc = logit_block(factors_bH, weight_vH[part], inverse_temperature, workspace)
        z_E[entry_e] = z_bc[row_e, column_e]
    max_b = _of_rows("max", z_E, places, initial=-torch.inf)
    z_less_max_E = z_E - max_b[places.row_E]
    exp_E = z_less_max_E.exp()
    sum_b = _of_rows("sum", exp_E, places)
    log_sum_b = sum_b.log()
    log_p_b = torch.full_like(max_b, -torch.inf)
    log_p_b[places.target_row] = z_less_max_E[places.target_E] - log_sum_b[places.target_row]
    stats = [max_b + log_sum_b, log_p_b]
    if with_entropy:
        entropy_b = log_sum_b - _of_rows("sum", z_less_max_E * exp_E, places) / sum_b
        stats.append(torch.where(places.counts_b > 0, entropy_b, 0.0))
    return torch.stack(stats), z_E


def gradients(
    places: Places,
    hidden_bH: Tensor,
    weight_vH: Tensor,
    row: RowGradients,
    z_E: Tensor,
    *,
    d_weight_vH: Tensor | None,
    with_hidden: Callable[[Tensor], None],
) -> None:
    """As `blocks.gradients`, with D = g (1[y = v] - p) - g_H p (log p + H) on the kept ids and 0 elsewhere."""
    log_p_E = z_E - row.lse[places.row_E]
    p_E = log_p_E.exp()
    d_E = -row.d_log_probs[places.row_E] * p_E
    # g (1 - p) from log p, which is exact: 1 - p of a rounded p near 1 would not be.
    d_E[places.target_E] = (-row.d_log_probs * row.log_probs.expm1())[places.target_row]
    if row.entropy is not None and row.d_entropy is not None:
        d_E -= row.d_entropy[places.row_E] * p_E * (log_p_E + row.entropy[places.row_E])
    hidden_bH, num_rows = _factors(hidden_bH, weight_vH), len(hidden_bH)
    d_hidden_bH = torch.zeros_like(hidden_bH, dtype=accumulator(hidden_bH))
    workspace = Workspace(hidden_bH, hidden_bH.dtype)
    for part, (entry_e, row_e, column_e) in zip(_blocks(weight_vH), places.blocks, strict=True):
        weight_cH = weight_vH[part].to(hidden_bH.dtype)
        d_bc = workspace.block(len(hidden_bH), len(weight_cH)).zero_()
        d_bc[row_e, column_e] = d_E[entry_e].to(d_bc.dtype)
        add_product(d_hidden_bH, d_bc, weight_cH)
        if part.stop == len(weight_vH):
            with_hidden(d_hidden_bH[:num_rows])
        if d_weight_vH is not None:
            add_product(d_weight_vH[part], d_bc.T, hidden_bH)
    if not len(weight_vH):
        with_hidden(d_hidden_bH[:num_rows])


def _factors(hidden_bH: Tensor, weight_vH: Tensor) -> Tensor:
    """hidden as a factor of products, padded to the rows that these take."""
    width = min(block_shape(hidden_bH)[1], len(weight_vH))
    return padded(hidden_bH, padded_rows(len(hidden_bH), hidden_bH, width)).to(factor_dtype(hidden_bH))


def _blocks(weight_vH: Tensor) -> list[slice]:
    return list(slices(len(weight_vH), block_shape(weight_vH)[1]))


def _of_rows(reduce: str, x_E: Tensor, places: Places, initial: float = 0.0) -> Tensor:
    """[b]. One row after the other, in order: the same bits in every run."""
    return torch.segment_reduce(x_E, reduce, lengths=places.counts_b, unsafe=True, initial=initial)
