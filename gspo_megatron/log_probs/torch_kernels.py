"""The arithmetic of one block of logits, element by element, in plain torch. triton_kernels.py has the same functions.

Shape suffixes: b rows and c columns of a block, K statistics of a row. `columns_b` is the target of a row, counted in
columns of this block; outside [0, c) it is in another block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_statistics(
    z_bc: Tensor, columns_b: Tensor, *, with_entropy: bool, kept_bc: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """lse, log p(y | block) and, on request, the entropy of every row within the block: [K, b], see `shards.merge`.

    Returns them with the maxima of the rows, [b]. `kept_bc`, of any float format, receives e^{z - max}. Overwrites z.
    """
    max_b = z_bc.amax(1)
    z_bc.sub_(max_b[:, None])
    index_b, is_inside_b = position(columns_b, z_bc.shape[1])
    z_y_b = z_bc.gather(1, index_b[:, None])[:, 0]
    is_exact = kept_bc is not None and kept_bc.dtype == z_bc.dtype
    exp_bc = torch.exp(z_bc, out=kept_bc if is_exact else None if with_entropy else z_bc)
    sum_b = exp_bc.sum(1)
    log_sum_b = sum_b.log()
    stats = [max_b + log_sum_b, torch.where(is_inside_b, z_y_b - log_sum_b, -torch.inf)]
    if with_entropy:
        stats.append(log_sum_b - z_bc.mul_(exp_bc).sum(1) / sum_b)
    if kept_bc is not None and not is_exact:
        kept_bc.copy_(exp_bc)
    return torch.stack(stats), max_b


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

    Overwrites z. `lse_b` and the entropy are those of the whole vocabulary.
    """
    log_p_bc = z_bc.sub_(lse_b[:, None])
    if entropy_and_gradient_b is None:
        d_bc = log_p_bc.exp_().mul_(-d_log_probs_b[:, None])
    else:
        entropy_b, d_entropy_b = entropy_and_gradient_b
        p_bc = log_p_bc.exp()
        d_bc = log_p_bc.add_(entropy_b[:, None]).mul_(-d_entropy_b[:, None]).sub_(d_log_probs_b[:, None]).mul_(p_bc)
    _add_at_targets(d_bc, columns_b, d_log_probs_b)
    if out_bc is not z_bc:
        out_bc.copy_(d_bc)


def gradients_of_kept(kept_bc: Tensor, columns_b: Tensor, log_scale_b: Tensor, d_log_probs_b: Tensor) -> None:
    """D = g (1[y = v] - kept e^{log_scale}) in place of kept = e^{z - max}; log_scale = max - lse."""
    kept_bc.mul_((-d_log_probs_b * log_scale_b.exp())[:, None])
    _add_at_targets(kept_bc, columns_b, d_log_probs_b)


def position(columns_b: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(an index that is safe to gather with, whether the target lies in this block)."""
    return columns_b.clamp(0, width - 1), (columns_b >= 0) & (columns_b < width)


def _add_at_targets(d_bc: Tensor, columns_b: Tensor, values_b: Tensor) -> None:
    index_b, is_inside_b = position(columns_b, d_bc.shape[1])
    d_bc.scatter_add_(1, index_b[:, None], torch.where(is_inside_b, values_b, 0.0).to(d_bc.dtype)[:, None])
