"""Vocabulary shards. `merge` combines the results of parts, either blocks of one matrix or the shards of several ranks;
`Shards` holds the collectives between the ranks.

Shape suffixes: n scored rows, K statistics of a row (2, or 3 with the entropy), P parts of the vocabulary, t ranks,
H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed these two collectives and warns on every call of the old names.
_NEW_NAMES = hasattr(dist, "all_gather_single")
_all_gather = dist.all_gather_single if _NEW_NAMES else dist.all_gather_into_tensor
_reduce_scatter = dist.reduce_scatter_single if _NEW_NAMES else dist.reduce_scatter_tensor


def merge(parts_PKn: Tensor) -> Tensor:
    """Chain rule over disjoint parts A of the vocabulary, with p(A) = softmax_A(lse_A):

        lse      = log sum_A e^{lse_A}
        log p(y) = log p(A_y) + log p(y | A_y)
        entropy  = sum_A p(A) H_A - sum_A p(A) log p(A)

    The K rows of a part, [P, K, n], and of the result, [K, n]:
        0  lse_A         log of the sum of e^z over the part; -inf for a part without columns
        1  log p(y | A)  of the target within the part; -inf where the part does not hold the target
        2  H_A           entropy of the softmax within the part (absent when no entropy is wanted)

    Unlike z_y - lse, no step subtracts two large numbers: log p(y) of an almost certain token keeps its digits.
    """
    lse_Pn, log_p_within_Pn = parts_PKn[:, 0], parts_PKn[:, 1]
    log_p_part_Pn = lse_Pn.log_softmax(0)
    merged = [lse_Pn.logsumexp(0), (log_p_part_Pn + log_p_within_Pn).amax(0)]
    if parts_PKn.shape[1] == 3:
        p_part_Pn = log_p_part_Pn.exp()
        merged.append((p_part_Pn * parts_PKn[:, 2] + torch.special.entr(p_part_Pn)).sum(0))
    return torch.stack(merged)


@dataclass(frozen=True)
class Shards:
    """The ranks that share the vocabulary. A single rank communicates nothing."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Shards:
        return cls(None, 0, 1) if group is None else cls(group, dist.get_rank(group), dist.get_world_size(group))

    def gather(self, mine: Tensor) -> Tensor:
        """Every rank's tensor, in rank order: [...] -> [t, ...]. The order keeps later results bitwise equal on all."""
        if self.size == 1:
            return mine[None]
        gathered = mine.new_empty((self.size * mine.shape[0], *mine.shape[1:]))
        _all_gather(gathered, mine.contiguous(), group=self.group)
        return gathered.view(self.size, *mine.shape)

    def start_sum(self, mine: Tensor) -> Any:
        """Starts the sum over the ranks, in place; call `wait` on the result. None: there is nothing to wait for."""
        return dist.all_reduce(mine, group=self.group, async_op=True) if self.size > 1 else None

    def start_scatter(self, own: Tensor, all_t: Tensor) -> Any:
        """Starts the sum over the ranks of `all_t` [t * m, ...]; each rank receives its part in `own` [m, ...]."""
        return _reduce_scatter(own, all_t, group=self.group, async_op=True)
